"""The table of spellings, part 2: ways to write the norm, the other modulations, and sites that are left alone.

R0..R4 are the kinds of RMSNorm: R0 diffusers' own, which rounds before the weight; R1 torch's; R2 without a weight;
R4 with a weight stored minus one. A2 has no shift, A4 is in fp32, A5 is RMS in fp32, A6 rounds the norm only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import FP32, Spelling, table
from .spellings import ln

ROWS: list[Spelling] = []
spelling = table(ROWS)


def rms0(x: T, weight: T | None = None) -> T:
    """diffusers' RMSNorm (R0): rounds before the weight."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-6)
    return x.to(weight.dtype) * weight if weight is not None else x.to(torch.bfloat16)


# -- the norm: native, affine, by hand ---------------------------------------------------------------------------------


@spelling("norm_modulate", "x:BLD a:D b:D s:BD t:BD w:DD")
def a1a_affine_layer_norm(x: T, a: T, b: T, s: T, t: T, w: T) -> T:
    """CogVideoX."""
    return (ln(x, a, b) * (1 + s)[:, None, :] + t[:, None, :]) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def a1r_r2_no_weight(x: T, s: T, t: T, w: T) -> T:
    """LTX."""
    return (F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD a:D s:B1D t:B1D w:DD")
def a1r_r1_native_weight(x: T, a: T, s: T, t: T, w: T) -> T:
    return (F.rms_norm(x, x.shape[-1:], a) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD a:D s:B1D t:B1D w:DD")
def a1r_r0_diffusers_weight(x: T, a: T, s: T, t: T, w: T) -> T:
    return (rms0(x, a) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD a:D:f s:B1D t:B1D w:DD:f")
def a1r_r0_fp32_weight_leaks(x: T, a: T, s: T, t: T, w: T) -> T:
    """diffusers' RMSNorm returns fp32 when its weight is fp32."""
    return (rms0(x, a) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD a:D:f s:B1D t:B1D w:DD")
def a1r_r4_zero_centred(x: T, a: T, s: T, t: T, w: T) -> T:
    """Krea 2: the weight is stored minus one."""
    n = F.rms_norm(x.float(), x.shape[-1:], eps=1e-5) * (a + 1.0)
    return (n.to(x.dtype) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def ln_by_hand_var(x: T, s: T, t: T, w: T) -> T:
    x32 = x.float()
    centred = x32 - x32.mean(-1, keepdim=True)
    n = centred * torch.rsqrt(x32.var(-1, keepdim=True, unbiased=False) + 1e-6)
    return (n.to(x.dtype) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def ln_by_hand_squares(x: T, s: T, t: T, w: T) -> T:
    centred = x.float() - x.float().mean(dim=-1, keepdim=True)
    n = centred / (centred**2).mean(-1, keepdim=True).add(1e-6).sqrt()
    return (n.to(x.dtype) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def ln_by_hand_var_mean(x: T, s: T, t: T, w: T) -> T:
    variance, mean = torch.var_mean(x.float(), dim=-1, keepdim=True, correction=0)
    return (((x - mean) * torch.rsqrt(variance + 1e-6)).to(x.dtype) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD", FP32)
def ln_by_hand_no_keepdim(x: T, s: T, t: T, w: T) -> T:
    mean, variance = x.mean(-1), x.var(-1, unbiased=False)
    n = (x - mean.unsqueeze(-1)) * torch.rsqrt(variance + 1e-6)[..., None]
    return (n * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD s:B1D w:DD")
def rms_by_hand_x_times_x(x: T, s: T, w: T) -> T:
    x32 = x.float()
    n = x32 * ((x32 * x32).mean(-1, keepdim=True) + 1e-6) ** -0.5
    return (n * (1 + s)).to(x.dtype) @ w


@spelling("norm_modulate", "x:BLD s:B1D w:DD")
def rms_by_hand_sum(x: T, s: T, w: T) -> T:
    x32 = x.float()
    n = x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) / x.shape[-1] + 1e-6)
    return (n.to(x.dtype) * (1 + s)) @ w


@spelling("norm_modulate", "x:BLD s:B1D w:DD")
def rms_by_hand_one_over_sqrt(x: T, s: T, w: T) -> T:
    x32 = x.float()
    n = x32 * (1.0 / torch.sqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6))
    return (n.to(x.dtype) * (1 + s)) @ w


@spelling("norm_modulate", "x:BLD a:D s:B1D w:DD")
def rms_by_hand_statistic_times_weight(x: T, a: T, s: T, w: T) -> T:
    factor = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * a
    return ((x * factor).to(x.dtype) * (1 + s)) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD", FP32)
def rms_without_eps(x: T, s: T, t: T, w: T) -> T:
    return (x * x.pow(2).mean(-1, keepdim=True).rsqrt() * (1 + s) + t) @ w


# -- the other families ------------------------------------------------------------------------------------------------


@spelling("norm_modulate", "x:BLD a:D c:BD v:DD w:DD")
def a2_rms_scale_on_the_row(x: T, a: T, c: T, v: T, w: T) -> T:
    """Lumina 2, Z-Image."""
    scale = 1.0 + c @ v
    return (rms0(x, a) * scale.unsqueeze(1)) @ w


@spelling("norm_modulate", "x:BLD a:D s:B1D w:DD")
def a2_bare_scale(x: T, a: T, s: T, w: T) -> T:
    return (rms0(x, a) * s) @ w


@spelling("norm_modulate", "x:BLD s:BD w:DD")
def a2l(x: T, s: T, w: T) -> T:
    return (ln(x) * (1 + s[:, None])) @ w


@spelling("norm_modulate", "x:BLD e:B6D a:16D:f w:DD")
def a4(x: T, e: T, a: T, w: T) -> T:
    """Wan: fp32 throughout, one rounding."""
    shift, scale, *_ = (a + e.float()).chunk(6, dim=1)
    return (ln(x.float()) * (1 + scale) + shift).type_as(x) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def a4_kandinsky(x: T, s: T, t: T, w: T) -> T:
    return (ln(x.float()) * (s.float() + 1.0) + t.float()).type_as(x) @ w


@spelling("norm_modulate", "x:BLD s:BD w:DD")
def a5(x: T, s: T, w: T) -> T:
    """Mochi."""
    n = F.rms_norm(x.to(torch.float32), x.shape[-1:], eps=1e-6)
    return (n * (1 + s[:, None].to(torch.float32))).to(x.dtype) @ w


@spelling("norm_modulate", "x:LBD a:D s:LBD t:LBD w:DD")
def a6(x: T, a: T, s: T, t: T, w: T) -> T:
    """Ernie: the norm rounds, the affine part is fp32; scale and shift have full size."""
    n = rms0(x, a)
    return (n.float() * (1 + s.float()) + t.float()).to(x.dtype) @ w


@spelling("norm_modulate", "x:BLD t:BD w:DD")
def a8_shift_only(x: T, t: T, w: T) -> T:
    """HunyuanDiT."""
    return (ln(x) + t.unsqueeze(1)) @ w


@spelling("norm_modulate_dual", "x:BLD s:B1D t:B1D u:B1D v:B1D w:DD")
def dual(x: T, s: T, t: T, u: T, v: T, w: T) -> tuple[T, T]:
    """SD3.5: one norm, two modulations."""
    n = ln(x)
    return (n * (1 + s) + t) @ w, (n * (1 + u) + v) @ w


@spelling("norm_modulate", "x:BLD e:BE w:DD")
def final_layer(x: T, e: T, w: T) -> T:
    """AdaLayerNormContinuous."""
    scale, shift = torch.chunk(F.silu(e).to(x.dtype), 2, dim=1)
    return (ln(x) * (1 + scale)[:, None, :] + shift[:, None, :]) @ w


@spelling("norm", "x:BLD w:DD")
def plain_layer_norm(x: T, w: T) -> T:
    return ln(x) @ w


@spelling("norm", "x:BLD w:DD", FP32)
def plain_layer_norm_fp32(x: T, w: T) -> T:
    return ln(x) @ w


@spelling("norm", "x:BLD a:D b:D w:DD")
def affine_layer_norm(x: T, a: T, b: T, w: T) -> T:
    return ln(x, a, b) @ w


@spelling("norm", "x:BLD a:D w:DD")
def affine_rms_norm(x: T, a: T, w: T) -> T:
    return F.rms_norm(x, x.shape[-1:], a, 1e-5) @ w


@spelling("norm", "x:BLD a:D:f b:D:f w:DD")
def affine_fp32_layer_norm(x: T, a: T, b: T, w: T) -> T:
    return ln(x.float(), a, b).to(x.dtype) @ w


@spelling("scale_shift", "x:BLD e:BE w:DD v:DD")
def scale_shift_alone(x: T, e: T, w: T, v: T) -> T:
    """AuraFlow's output modulation."""
    scale, shift = e.chunk(2, dim=1)
    return (x @ v * (1 + scale)[:, None, :] + shift[:, None, :]) @ w


# -- explained and left alone ------------------------------------------------------------------------------------------


@spelling("left:feeds_pointwise", "x:BLD s:B1D t:B1D")
def read_by_pointwise_ops_only(x: T, s: T, t: T) -> T:
    return F.gelu(ln(x) * (1 + s) + t, approximate="tanh")


@spelling("left:pointwise_producer", "x:BLD y:BLD s:B1D t:B1D w:DD")
def of_a_pointwise_value_nobody_else_reads(x: T, y: T, s: T, t: T, w: T) -> T:
    return (ln(F.silu(x) * y) * (1 + s) + t) @ w


@spelling("qk_norm left:pointwise_producer", "x:BLHK a:K")
def of_query_and_key(x: T, a: T) -> T:
    q, k, v = (F.rms_norm(x, x.shape[-1:], a), F.rms_norm(x * 2, x.shape[-1:], a), x)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


@spelling("unmatched:norm_dim", "x:BDL w:LL")
def of_another_dim(x: T, w: T) -> T:
    variance, mean = torch.var_mean(x.float(), dim=1, keepdim=True, correction=0)
    return ((x - mean) * torch.rsqrt(variance + 1e-6)).to(x.dtype) @ w
