"""The table of spellings, part 8: queries and keys that are normed after their rotation.

    @last(weights, tables)   ``norm_last(x, *tables, *weights)`` of x [B,L,H,C] is applied to q and k, then attention

One site for each query or key: its rotation, with the norm absorbed. See `spellings_rope` for sizes and rotations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import BF16, FP16, FP32, Spelling, parse, table
from .spellings_joint import IMAGE, JOINT, STREAMS, projected
from .spellings_norms import rms0
from .spellings_qk import rope
from .spellings_rope import BOTH, FULL, HALF, attend, heads, rms, rotate_half, turned
from .spellings_rope_forms import matrix_product

ROWS: list[Spelling] = []
spelling = table(ROWS)
Part = Callable[..., T]


def last(weights: str = "a:C", tables: str = FULL, dtype: torch.dtype = BF16) -> Callable[[Part], Part]:
    def add(part: Part) -> Part:
        def function(q: T, k: T, v: T, *operands: T) -> T:
            q, k = part(heads(q), *operands), part(heads(k), *operands)
            return attend(q.to(v.dtype), k.to(v.dtype), heads(v))

        inputs = f"q:BLI k:BLI v:BLI {tables} {weights}"
        ROWS.append(Spelling(part.__name__, function, inputs, parse(BOTH), dtype))
        return part

    return add


# -- forms of the rotation ---------------------------------------------------------------------------------------------


@last(tables="f:LR:c")
def last_complex(x: T, f: T, a: T) -> T:
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return rms(torch.view_as_real(z * f.unsqueeze(1)).flatten(3).type_as(x), a)


@last(tables="c:LC s:LC")
def last_halves(x: T, c: T, s: T, a: T) -> T:
    """bf16 arithmetic."""
    return rms(x * c[:, None] + rotate_half(x) * s[:, None], a)


@last(tables=HALF)
def last_slice_writes(x: T, c: T, s: T, a: T) -> T:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = first * c[:, None] - second * s[:, None]
    out[..., 1::2] = first * s[:, None] + second * c[:, None]
    return rms(out, a)


@last(tables="c:L1C:d s:L1C:d")
def last_fp64_tables(x: T, c: T, s: T, a: T) -> T:
    return rms((x * c + turned(x) * s).to(x.dtype), a)


@last(tables="m:L1R22:f")
def last_matrices(x: T, m: T, a: T) -> T:
    return rms(matrix_product(x, m), a)


@last(tables="c:LM:f s:LM:f")
def last_partial_rotary(x: T, c: T, s: T, a: T) -> T:
    first, rest = x[..., : c.shape[-1]], x[..., c.shape[-1] :]
    first = (first.float() * c[:, None] + rotate_half(first).float() * s[:, None]).to(x.dtype)
    return rms(torch.cat((first, rest), dim=-1), a)


# -- forms of the norm -------------------------------------------------------------------------------------------------


@last()
def last_rounded_before_the_weight(x: T, c: T, s: T, a: T) -> T:
    return rms0(rope(x, c, s), a)


@last("")
def last_no_weight(x: T, c: T, s: T) -> T:
    return rms(rope(x, c, s))


@last("a:C b:C")
def last_layer_norm(x: T, c: T, s: T, a: T, b: T) -> T:
    return F.layer_norm(rope(x, c, s), (16,), a, b, 1e-5)


@last("a:C:f")
def last_fp32_throughout(x: T, c: T, s: T, a: T) -> T:
    """The rotated value is not rounded."""
    return rms(x.float() * c[:, None] + turned(x).float() * s[:, None], a)


@last(dtype=FP16)
def last_fp16(x: T, c: T, s: T, a: T) -> T:
    return rms(rope(x, c, s), a)


@last(dtype=FP32)
def last_fp32(x: T, c: T, s: T, a: T) -> T:
    return rms(rope(x, c, s), a)


@last("a:HC")
def last_weight_per_head(x: T, c: T, s: T, a: T) -> T:
    return rms(rope(x, c, s)) * a


@last("a:I")
def last_across_heads(x: T, c: T, s: T, a: T) -> T:
    return heads(rms(rope(x, c, s).flatten(2), a))


@spelling(BOTH, "q:BLI k:BLI v:BLI c:1LI:f s:1LI:f a:I")
def last_of_flat(q: T, k: T, v: T, c: T, s: T, a: T) -> T:
    """Rotation and norm of whole rows."""

    def part(x: T) -> T:
        real, imag = x.unflatten(2, (-1, 2)).unbind(-1)
        return rms((x.float() * c + torch.stack([-imag, real], dim=-1).flatten(2).float() * s).to(x.dtype), a)

    return attend(heads(part(q)), heads(part(k)), heads(v))


@spelling(BOTH, f"q:BLI k:BLI v:BLI {FULL} a:C b:C")
def last_after_the_transpose(q: T, k: T, v: T, c: T, s: T, a: T, b: T) -> T:
    q, k, v = (heads(x).transpose(1, 2) for x in (q, k, v))
    q, k = ((x.float() * c + turned(x).float() * s).to(x.dtype) for x in (q, k))
    return F.scaled_dot_product_attention(rms(q, a), rms(k, b), v).transpose(1, 2).flatten(2)


# -- text and image ----------------------------------------------------------------------------------------------------


@spelling("norm_rope=2 absorbed=6", f"{STREAMS} {IMAGE} f:TC:f g:TC:f")
def last_of_each_stream(x: T, y: T, u: T, w: T, a: T, b: T, d: T, e: T, c: T, s: T, f: T, g: T) -> T:
    """Rotated and normed apart, then joined."""
    (q, k, v), (tq, tk, tv) = projected(x, u), projected(y, w)
    q, k = rms(rope(q, c, s), a), rms(rope(k, c, s), b)
    tq, tk = rms(rope(tq, f, g), d), rms(rope(tk, f, g), e)
    return attend(torch.cat([tq, q], dim=1), torch.cat([tk, k], dim=1), torch.cat([tv, v], dim=1))


@spelling(BOTH, f"x:BLI y:BTI u:IQ w:IQ a:C b:C {JOINT}")
def last_of_a_joint_tensor(x: T, y: T, u: T, w: T, a: T, b: T, c: T, s: T) -> T:
    """Joined, then rotated and normed as one."""
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(projected(y, w), projected(x, u), strict=True))
    return attend(rms(rope(q, c, s), a), rms(rope(k, c, s), b), v)


@spelling(BOTH, f"x:BLI y:BTI u:IQ w:IQ a:C b:C {IMAGE}")
def last_of_a_joint_tensor_partly_rotated(x: T, y: T, u: T, w: T, a: T, b: T, c: T, s: T) -> T:
    """Text is normed with the image and not rotated."""
    (q, k, v), (tq, tk, tv) = projected(x, u), projected(y, w)
    q, k = torch.cat([tq, rope(q, c, s)], dim=1), torch.cat([tk, rope(k, c, s)], dim=1)
    return attend(rms(q, a), rms(k, b), torch.cat([tv, v], dim=1))


@spelling("norm_rope=2 absorbed=4", f"{STREAMS} {IMAGE}")
def last_of_the_image_alone(x: T, y: T, u: T, w: T, a: T, b: T, d: T, e: T, c: T, s: T) -> T:
    (q, k, v), (tq, tk, tv) = projected(x, u), projected(y, w)
    q, k, tq, tk = rms(rope(q, c, s), a), rms(rope(k, c, s), b), rms(tq, d), rms(tk, e)
    return attend(torch.cat([q, tq], dim=1), torch.cat([k, tk], dim=1), torch.cat([v, tv], dim=1))
