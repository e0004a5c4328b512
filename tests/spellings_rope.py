"""The table of spellings, part 4: rotations (Q1..Q10). Each is written as models write it, for one query or key.

    @bshd(tables)   the function rotates x [B,L,H,C]: applied to q and k after an RMS norm per head, then attention
    @bhsd(tables)   the same for x [B,H,L,C]
    @flat(tables)   the same for x [B,L,H*C], normed over all heads

Sizes: L = 6 tokens (4 of text first in `spellings_joint`), H = 4 heads of C = 16 columns, R = C/2 pairs.
Tables are random, so that a column that is read in place of another one shows. Part 5: `spellings_qk`, the norms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import BF16, Spelling, parse

ROWS: list[Spelling] = []
BOTH = "norm_rope=2 absorbed=2"  # q and k: the rotation's kernel computes the norm too
Rotation = Callable[..., T]


def heads(x: T, count: int = 4) -> T:
    """[B,L,H*C] as [B,L,H,C]."""
    return x.unflatten(-1, (count, -1))


def attend(q: T, k: T, v: T, **how: Any) -> T:
    """Attention over [B,L,H,C] as diffusers dispatches it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2).flatten(2, 3)


def rms(x: T, weight: T | None = None, eps: float = 1e-6) -> T:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def in_bshd(rotate: Rotation) -> Callable[..., T]:
    def function(q: T, k: T, v: T, a: T, *tables: T) -> T:
        q, k = (rotate(rms(heads(x), a), *tables) for x in (q, k))
        return attend(q.to(v.dtype), k.to(v.dtype), heads(v))

    return function


def in_bhsd(rotate: Rotation) -> Callable[..., T]:
    def function(q: T, k: T, v: T, a: T, *tables: T) -> T:
        q, k, v = (heads(x).transpose(1, 2) for x in (q, k, v))
        q, k = (rotate(rms(x, a), *tables) for x in (q, k))
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2, 3)

    return function


def in_flat(rotate: Rotation) -> Callable[..., T]:
    def function(q: T, k: T, v: T, a: T, *tables: T) -> T:
        q, k = (rotate(rms(x, a), *tables) for x in (q, k))
        return attend(heads(q), heads(k), heads(v))

    return function


def rows(around: Callable[[Rotation], Callable[..., T]], weight: str) -> Callable[..., Callable]:
    def spelling(tables: str, expected: str = BOTH, dtype: torch.dtype = BF16, batch: str = "B") -> Callable:
        def add(rotate: Rotation) -> Rotation:
            inputs = f"q:{batch}LI k:{batch}LI v:{batch}LI a:{weight} {tables}"
            ROWS.append(Spelling(rotate.__name__, around(rotate), inputs, parse(expected), dtype))
            return rotate

        return add

    return spelling


bshd, bhsd, flat = rows(in_bshd, "C"), rows(in_bhsd, "C"), rows(in_flat, "I")
FULL, HALF = "c:LC:f s:LC:f", "c:LR:f s:LR:f"


# -- Q1: interleaved pairs, real ---------------------------------------------------------------------------------------


def turned(x: T) -> T:
    """diffusers' ``use_real_unbind_dim=-1``: each pair (a, b) as (-b, a)."""
    real, imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-imag, real], dim=-1).flatten(3)


@bshd(FULL)
def q1(x: T, c: T, s: T) -> T:
    """Flux: ``sequence_dim=1``."""
    c, s = c[None, :, None, :], s[None, :, None, :]
    return (x.float() * c + turned(x).float() * s).to(x.dtype)


@bhsd(FULL)
def q1_bhsd(x: T, c: T, s: T) -> T:
    c, s = c[None, None, :, :], s[None, None, :, :]
    return (x.float() * c + turned(x).float() * s).to(x.dtype)


@bshd("c:BLC:f s:BLC:f")
def q1_tables_per_sample(x: T, c: T, s: T) -> T:
    return (x.float() * c.unsqueeze(2) + turned(x).float() * s.unsqueeze(2)).type_as(x)


@bshd(HALF)
def q1_half_tables_repeated_here(x: T, c: T, s: T) -> T:
    c, s = (t.repeat_interleave(2, dim=1)[None, :, None] for t in (c, s))
    return (x.float() * c + turned(x).float() * s).to(x.dtype)


@bshd("c:1L1C:d s:1L1C:d")
def q1_fp64_tables(x: T, c: T, s: T) -> T:
    return (x * c + turned(x) * s).to(x.dtype)


@bshd("c:LC s:LC")
def q1_bf16_tables(x: T, c: T, s: T) -> T:
    c, s = c[None, :, None, :], s[None, :, None, :]
    return (x.float() * c + turned(x).float() * s).to(x.dtype)


@bshd("angles:LR:f")
def q1_angles_repeated_here(x: T, angles: T) -> T:
    c, s = (t.repeat_interleave(2, dim=-1).float()[:, None] for t in (angles.cos(), angles.sin()))
    return (x.float() * c + turned(x).float() * s).to(x.dtype)


@bshd(HALF)
def q1_each_component(x: T, c: T, s: T) -> T:
    """GPT-J: the two results of each pair, stacked."""
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    c, s = c[:, None], s[:, None]
    return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2).to(x.dtype)


# -- Q2: halves --------------------------------------------------------------------------------------------------------


def rotate_half(x: T) -> T:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


@bshd(FULL)
def q2(x: T, c: T, s: T) -> T:
    """diffusers' ``use_real_unbind_dim=-2``."""
    c, s = c[None, :, None, :], s[None, :, None, :]
    real, imag = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    return (x.float() * c + torch.cat([-imag, real], dim=-1).float() * s).to(x.dtype)


@bhsd("c:BLC:f s:BLC:f")
def q2_rotate_half(x: T, c: T, s: T) -> T:
    c, s = c.unsqueeze(1), s.unsqueeze(1)
    return ((x.float() * c) + (rotate_half(x.float()) * s)).to(x.dtype)


@bshd("c:LC s:LC")
def q2b_bf16_arithmetic(x: T, c: T, s: T) -> T:
    c, s = c[None, :, None, :], s[None, :, None, :]
    return (x * c) + (rotate_half(x) * s)


@bshd(FULL)
def q2b_tables_rounded_here(x: T, c: T, s: T) -> T:
    """MiniMax H3."""
    c, s = (t.to(x.dtype)[None, :, None, :] for t in (c, s))
    return x * c + rotate_half(x) * s


@bshd("angles:LR:f")
def q2_angles_joined_here(x: T, angles: T) -> T:
    """StableAudio 3."""
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    a, b = x.float().unflatten(-1, (2, -1)).unbind(-2)
    return (x.float() * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()).to(x.dtype)


@bshd("c:LR:d s:LR:d")
def q2_each_component_fp64(x: T, c: T, s: T) -> T:
    """vLLM and flash-attn: the two halves of the result, joined."""
    c, s = c[None, :, None], s[None, :, None]
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)


@bhsd("c:BHLR:f s:BHLR:f")
def q2_tables_per_head(x: T, c: T, s: T) -> T:
    a, b = torch.split(x.float(), x.shape[-1] // 2, dim=-1)
    return torch.cat([c * a - s * b, s * a + c * b], dim=-1).type_as(x)


# -- Q6, Q7, Q8, Q10 ---------------------------------------------------------------------------------------------------


@bshd("c:LHR:f s:LHR:f")
def q6_mochi(x: T, c: T, s: T) -> T:
    """Half tables learned per head; both components rounded before they are joined."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos = (even * c - odd * s).to(x.dtype)
    sin = (even * s + odd * c).to(x.dtype)
    return torch.stack([cos, sin], dim=-1).flatten(-2)


def split_in_two(x: T, c: T, s: T) -> T:
    """LTX-2's ``apply_split_rotary_emb`` on [B,H,L,C], fp32 out."""
    split = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2).float()
    out = split * c.unsqueeze(-2)
    out[..., :1, :].addcmul_(-s.unsqueeze(-2), split[..., 1:, :])
    out[..., 1:, :].addcmul_(s.unsqueeze(-2), split[..., :1, :])
    return out.reshape(x.shape)


@bhsd("c:BHLR:f s:BHLR:f")
def q7_ltx2_split(x: T, c: T, s: T) -> T:
    return split_in_two(x, c, s).to(x.dtype)


def of_flat(x: T, c: T, s: T) -> T:
    b, h, n, _ = c.shape
    y = x.reshape(b, n, h, -1).swapaxes(1, 2)
    return split_in_two(y, c, s).swapaxes(1, 2).reshape(b, n, -1).to(x.dtype)


@flat("c:BHLR:f s:BHLR:f")
def q7_ltx2_split_of_flat(x: T, c: T, s: T) -> T:
    return of_flat(x, c, s)


@flat("c:1HLR s:1HLR", batch="1")
def q7_ltx2_bf16_tables(x: T, c: T, s: T) -> T:
    return of_flat(x, c, s)


@flat("c:BLI:f s:BLI:f")
def q8_ltx_flat(x: T, c: T, s: T) -> T:
    real, imag = x.unflatten(2, (-1, 2)).unbind(-1)
    turned = torch.stack([-imag, real], dim=-1).flatten(2)
    return (x.float() * c + turned.float() * s).to(x.dtype)


@flat("c:1LI:f s:1LI:f")
def q8_halves_of_flat(x: T, c: T, s: T) -> T:
    return (x.float() * c + rotate_half(x).float() * s).to(x.dtype)
