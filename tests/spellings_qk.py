"""The table of spellings, part 6: norms of queries and keys (K0..K8), mostly with Q1's rotation behind them.

R0 rounds before the weight, R1 does not, R2 has no weight, R4 has a weight stored minus one (see `spellings_norms`).
`norm_rope` is one rotation whose kernel computes the norm as well ("absorbed"); `qk_norm` is a norm that nothing
rotates, `rope` a rotation without a norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import BF16, FP16, FP32, Spelling, parse, table
from .spellings_norms import rms0
from .spellings_rope import BOTH, attend, heads, rms, turned

ROWS: list[Spelling] = []
spelling = table(ROWS)
QKV, TABLES = "q:BLI k:BLI v:BLI", "c:LC:f s:LC:f"


def rope(x: T, c: T, s: T) -> T:
    """Q1 on [B,L,H,C]."""
    c, s = c[None, :, None, :], s[None, :, None, :]
    return (x.float() * c + turned(x).float() * s).to(x.dtype)


Norm = Callable[..., T]


def normed(weights: str = "a:C b:C", expected: str = BOTH, dtype: torch.dtype = BF16) -> Callable[[Norm], Norm]:
    """The decorated ``norm(x, weight)`` applied to q and k in [B,L,H,C], each with its weight, then Q1."""

    def add(norm: Norm) -> Norm:
        def function(q: T, k: T, v: T, c: T, s: T, *weights: T) -> T:
            half = len(weights) // 2
            q, k = norm(heads(q), *weights[:half]), norm(heads(k), *weights[half:])
            return attend(rope(q, c, s).to(v.dtype), rope(k, c, s).to(v.dtype), heads(v))

        ROWS.append(Spelling(norm.__name__, function, f"{QKV} {TABLES} {weights}", parse(expected), dtype))
        return norm

    return add


def across(weights: str = "a:I b:I", expected: str = BOTH) -> Callable[[Norm], Norm]:
    """The same for a norm of [B,L,H*C], split into heads afterwards."""

    def add(norm: Norm) -> Norm:
        def function(q: T, k: T, v: T, c: T, s: T, *weights: T) -> T:
            half = len(weights) // 2
            q, k = norm(q, *weights[:half]), norm(k, *weights[half:])
            return attend(rope(heads(q), c, s).to(v.dtype), rope(heads(k), c, s).to(v.dtype), heads(v))

        ROWS.append(Spelling(norm.__name__, function, f"{QKV} {TABLES} {weights}", parse(expected)))
        return norm

    return add


# -- per head ----------------------------------------------------------------------------------------------------------


@normed()
def k0_r0(x: T, a: T) -> T:
    return rms0(x, a)


@normed("a:C:f b:C:f")
def k0_r0_fp32_weight(x: T, a: T) -> T:
    """The result is fp32, and so is the rotation's."""
    return rms0(x, a)


@normed()
def k0_r0_by_hand(x: T, a: T) -> T:
    """Black Forest Labs."""
    y = x.float()
    return (y * torch.rsqrt(torch.mean(y**2, dim=-1, keepdim=True) + 1e-6)).to(x.dtype) * a


@normed()
def k1_r1(x: T, a: T) -> T:
    return rms(x, a)


@normed()
def k1_without_eps(x: T, a: T) -> T:
    return F.rms_norm(x, (16,), a)


@normed(dtype=FP16)
def k1_fp16(x: T, a: T) -> T:
    return rms(x, a)


@normed(dtype=FP32)
def k1_fp32(x: T, a: T) -> T:
    return rms(x, a)


@normed("")
def k1_r2_no_weight(x: T) -> T:
    return rms(x)


@normed("a:C b:C d:C e:C")
def k3_layer_norm(x: T, a: T, b: T) -> T:
    return F.layer_norm(x, (16,), a, b, 1e-6)


@normed("")
def k4_layer_norm_no_weight(x: T) -> T:
    return F.layer_norm(x.float(), (16,), eps=1e-5).to(x.dtype)


@normed("a:C:f b:C:f")
def k6_fp32_to_the_end(x: T, a: T) -> T:
    """Flux 3: norm and rotation in fp32, one cast before attention."""
    return rms(x.float(), a)


@normed()
def k6_fp32_and_back(x: T, a: T) -> T:
    """Kandinsky: fp32 in, bf16 weight."""
    return F.rms_norm(x.float(), (16,), a).type_as(x)


@normed("a:C:f b:C:f")
def k7_zero_centred(x: T, a: T) -> T:
    """Krea 2."""
    return F.rms_norm(x.float(), (16,), weight=a + 1.0, eps=1e-5).to(x.dtype)


@normed()
def k8_mochi(x: T, a: T) -> T:
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (y * a).to(x.dtype)


@normed("a:HC b:HC")
def k0_weight_per_head(x: T, a: T) -> T:
    return rms(x) * a


# -- across heads ------------------------------------------------------------------------------------------------------


@across()
def k2_r1(x: T, a: T) -> T:
    """Wan."""
    return rms(x, a)


@across()
def k2r_r0(x: T, a: T) -> T:
    return rms0(x, a)


@across()
def k2_wan_by_hand(x: T, a: T) -> T:
    """Wan's own repository."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + 1e-5)).type_as(x) * a


@across("a:I b:I d:I e:I")
def k5_layer_norm(x: T, a: T, b: T) -> T:
    return F.layer_norm(x, (64,), a, b, 1e-5)


@across("")
def k2_no_weight(x: T) -> T:
    return rms(x)


# -- what is normed, and where -----------------------------------------------------------------------------------------


@spelling(BOTH, f"{QKV} {TABLES} a:C b:C")
def after_the_transpose(q: T, k: T, v: T, c: T, s: T, a: T, b: T) -> T:
    """Cosmos."""
    q, k, v = (x.view(2, -1, 4, 16).transpose(1, 2) for x in (q, k, v))
    q, k = rms0(q, a), rms0(k, b)
    q, k = ((x.float() * c + turned(x).float() * s).to(x.dtype) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, -1, 64)


@spelling(BOTH, f"{QKV} {TABLES} a:C b:C")
def eps_of_their_own(q: T, k: T, v: T, c: T, s: T, a: T, b: T) -> T:
    q, k = rms(heads(q), a, 1e-2), rms(heads(k), b, 1e-6)
    return attend(rope(q, c, s), rope(k, c, s), heads(v))


@spelling("norm_rope absorbed rope", f"{QKV} {TABLES} a:C")
def query_normed_only(q: T, k: T, v: T, c: T, s: T, a: T) -> T:
    return attend(rope(rms(heads(q), a), c, s), rope(heads(k), c, s), heads(v))


@spelling("norm_rope absorbed qk_norm", f"{QKV} {TABLES} a:C b:C")
def query_rotated_only(q: T, k: T, v: T, c: T, s: T, a: T, b: T) -> T:
    return attend(rope(rms(heads(q), a), c, s), rms(heads(k), b), heads(v))


@spelling("rope=2", f"{QKV} {TABLES}")
def without_norm(q: T, k: T, v: T, c: T, s: T) -> T:
    return attend(rope(heads(q), c, s), rope(heads(k), c, s), heads(v))


@spelling(BOTH, f"{QKV} {TABLES} a:C b:C")
def norm_after_the_rotation(q: T, k: T, v: T, c: T, s: T, a: T, b: T) -> T:
    return attend(rms(rope(heads(q), c, s), a), rms(rope(heads(k), c, s), b), heads(v))


@spelling("qk_norm=2", f"{QKV} a:C b:C")
def norm_alone(q: T, k: T, v: T, a: T, b: T) -> T:
    return attend(rms(heads(q), a), rms(heads(k), b), heads(v))


@spelling("qk_norm=2", "q:BLI k:BTI v:BTI a:I b:I")
def norm_alone_across_heads(q: T, k: T, v: T, a: T, b: T) -> T:
    """Cross-attention of Wan and LTX."""
    return attend(heads(rms(q, a)), heads(rms(k, b)), heads(v))


@spelling("qk_norm=2", "x:BLI w:IQ")
def norm_alone_of_slices(x: T, w: T) -> T:
    q, k, v = heads(x @ w, 12).transpose(1, 2).chunk(3, dim=1)
    q, k = (F.layer_norm(y.float(), (16,), eps=1e-5).to(y.dtype) for y in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


@spelling("norm_rope=2 absorbed=2", "q:BLI k:BLI v:BLI a:HC b:HC c:LC:f s:LC:f")
def weights_of_each_head_before_heads_and_tokens_change_places(q: T, k: T, v: T, a: T, b: T, c: T, s: T) -> T:
    def prepare(x: T, weight: T) -> T:
        x = (F.rms_norm(x.unflatten(-1, (4, 16)), (16,), eps=1e-6) * weight).transpose(1, 2)
        turned = torch.cat([-x[..., 8:], x[..., :8]], -1)
        return (x.float() * c + turned.float() * s).type_as(x)

    values = v.unflatten(-1, (4, 16)).transpose(1, 2)
    return F.scaled_dot_product_attention(prepare(q, a), prepare(k, b), values)
