"""The table of spellings, part 8: norms written out, unit vectors, and gates that are expanded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import FP32, Spelling, table
from .spellings import ln

ROWS: list[Spelling] = []
spelling = table(ROWS)
USUAL = "x:BLD s:B1D t:B1D w:DD"
STREAM = "r:BLD x:BLD g:BD s:B1D t:B1D w:DD"
ROOT = 6.0  # of 36 columns


# -- LayerNorm ---------------------------------------------------------------------------------------------------------


@spelling("norm_modulate", USUAL)
def layer_norm_over_a_rounded_root(x: T, s: T, t: T, w: T) -> T:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return ((x - mean) / torch.sqrt(variance + 1e-6) * (1 + s) + t) @ w


@spelling("norm_modulate", USUAL)
def layer_norm_of_a_sum_of_squares(x: T, s: T, t: T, w: T) -> T:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / x.shape[-1]
    return (centred * (variance + 1e-6) ** -0.5 * (1 + s) + t) @ w


@spelling("norm_modulate", USUAL)
def layer_norm_of_moments(x: T, s: T, t: T, w: T) -> T:
    mean = x.mean(-1, keepdim=True)
    variance = x.pow(2).mean(-1, keepdim=True) - mean.pow(2)
    return ((x - mean) / torch.sqrt(variance + 1e-6) * (1 + s) + t) @ w


@spelling("norm_modulate", USUAL, FP32)
def layer_norm_of_moments_never_negative(x: T, s: T, t: T, w: T) -> T:
    mean, squares = x.sum(-1) / x.shape[-1], (x * x).sum(-1) / x.shape[-1]
    rstd = ((squares - mean * mean).clamp(min=0) + 1e-6).rsqrt()
    return ((x - mean[..., None]) * rstd[..., None] * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD:f s:B1D t:B1D w:DD")
def layer_norm_of_moments_far_from_zero(x: T, s: T, t: T, w: T) -> tuple[T, T]:
    """The kernel subtracts the mean first; eager's difference of two large numbers has lost digits."""
    x = x + 100
    mean = x.mean(-1, keepdim=True)
    variance = torch.square(x).mean(-1, keepdim=True) - mean**2
    return x, (((x - mean) * torch.rsqrt(variance + 1e-6)).to(w.dtype) * (1 + s) + t) @ w


@spelling("unmatched:no_rule scale_shift", USUAL, FP32)
def moments_of_another(x: T, s: T, t: T, w: T) -> T:
    """The mean of squares of x, the mean of 2x: no variance."""
    mean = (2 * x).mean(-1, keepdim=True)
    variance = x.pow(2).mean(-1, keepdim=True) - mean.pow(2)
    return ((x - mean) * torch.rsqrt(variance.abs() + 1e-6) * (1 + s) + t) @ w


@spelling("unmatched:no_rule scale_shift", USUAL, FP32)
def moments_not_below_a_number(x: T, s: T, t: T, w: T) -> T:
    mean = x.mean(-1, keepdim=True)
    variance = (x.pow(2).mean(-1, keepdim=True) - mean.pow(2)).clamp(min=0.1)
    return ((x - mean) * torch.rsqrt(variance) * (1 + s) + t) @ w


@spelling("unmatched:no_rule scale_shift", USUAL, FP32)
def layer_norm_by_a_deviation_and_a_number(x: T, s: T, t: T, w: T) -> T:
    """1 / (std + e) is no 1 / sqrt(var + e): for short rows the two differ."""
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, unbiased=False)
    return ((x - mean) / (std + 1e-2) * (1 + s) + t) @ w


# -- unit vectors, the RMSNorm of lucidrains' mmdit and x-transformers -------------------------------------------------


@spelling("norm", "x:BLD w:DD")
def unit_vector(x: T, w: T) -> T:
    return (F.normalize(x, dim=-1) * ROOT) @ w


@spelling("norm", "x:BLD w:DD")
def unit_vector_by_its_length(x: T, w: T) -> T:
    return (x / x.norm(dim=-1, keepdim=True) * ROOT) @ w


@spelling("norm", "x:BLD g:D w:DD")
def unit_vector_weight_last(x: T, g: T, w: T) -> T:
    return (F.normalize(x, dim=-1) * ROOT * g) @ w


@spelling("norm", "x:BLD g:D w:DD", FP32)
def unit_vector_weight_first(x: T, g: T, w: T) -> T:
    return (F.normalize(x, dim=-1) * g * ROOT) @ w


@spelling("norm", "x:BLD g:D w:DD")
def unit_vector_weight_times_root(x: T, g: T, w: T) -> T:
    return (F.normalize(x, dim=-1) * (g * ROOT)) @ w


@spelling("norm_modulate", "x:BLD g:D s:B1D t:B1D w:DD")
def unit_vector_modulated(x: T, g: T, s: T, t: T, w: T) -> T:
    return (F.normalize(x.float(), dim=-1).to(x.dtype) * ROOT * (g + 1) * (1 + s) + t) @ w


@spelling("norm_rope=2 absorbed=2", "q:BLI k:BLI v:BLI a:C b:H1C c:LR:f s:LR:f")
def unit_vectors_rotated(q: T, k: T, v: T, a: T, b: T, c: T, s: T) -> T:
    """One weight for all heads of the query, one for each head of the key."""

    def rotate(x: T) -> T:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(-2).type_as(x)

    q, k, v = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in (q, k, v))
    q, k = (F.normalize(x, dim=-1) * weight * 4.0 for x, weight in ((q, a), (k, b)))
    return F.scaled_dot_product_attention(rotate(q), rotate(k), v)


@spelling("unmatched:no_rule", "x:BLD g:D w:DD")
def unit_vector_times_another_number(x: T, g: T, w: T) -> T:
    return (F.normalize(x, dim=-1) * 5.0 * g) @ w


@spelling("unmatched:no_rule", "x:BLD g:D w:DD", FP32)
def unit_vector_of_clamped_rows(x: T, g: T, w: T) -> T:
    return (F.normalize(x, dim=-1, eps=4.0) * ROOT * g) @ w


@spelling("unmatched:no_rule", "x:BLD y:BLD w:DD", FP32)
def direction_by_the_length_of_another(x: T, y: T, w: T) -> T:
    return (x / y.norm(dim=-1, keepdim=True).clamp(min=1e-12) * ROOT) @ w


@spelling("norm", "x:BLD w:DD", FP32)
def unit_vector_of_a_row_of_zeros(x: T, w: T) -> T:
    x = x * (torch.arange(x.shape[1]) > 2)[:, None] @ w
    return (F.normalize(x, dim=-1) * ROOT) @ w


# -- unit vectors as queries and keys, attention by the cosine ---------------------------------------------------------


def interleaved(x: T, c: T, s: T) -> T:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(-2).type_as(x)


@spelling("norm_rope=2 absorbed=2", "q:BLI k:BLI v:BLI m:H1 c:LR:f s:LR:f")
def directions_with_a_number_of_each_head(q: T, k: T, v: T, m: T, c: T, s: T) -> T:
    """The logits' scale is multiplied into the query before heads and tokens change places; the key has none."""
    q, k, v = (x.unflatten(-1, (4, 16)) for x in (q, k, v))
    q, k = F.normalize(q, dim=-1) * m.clamp(max=1.0).exp(), F.normalize(k, dim=-1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(interleaved(q, c, s), interleaved(k, c, s), v, scale=1.0)


@spelling("qk_norm=2", "q:BHLC k:BHLC v:BHLC m:H11")
def directions_alone(q: T, k: T, v: T, m: T) -> T:
    q, k = F.normalize(q, dim=-1).mul(m).contiguous(), F.normalize(k, dim=-1).contiguous()
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


@spelling("norm_rope=2 absorbed=2", "q:BLI k:BLI v:BLI m:H c:LR s:LR")
def directions_by_a_scaled_length(q: T, k: T, v: T, m: T, c: T, s: T) -> T:
    """``x * (sqrt(m) / |x|)`` with half of the scale on either side, and a rotation of halves."""
    q, k, v = (x.unflatten(-1, (4, 16)) for x in (q, k, v))
    scale = m.float().abs().sqrt()[:, None]
    lengths = [x.float().pow(2).sum(-1, keepdim=True) for x in (q, k)]
    q, k = (x * (scale * torch.rsqrt(n + 1e-6)).to(x.dtype) for x, n in zip((q, k), lengths, strict=True))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def rotate(x: T) -> T:
        a, b = x.chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    return F.scaled_dot_product_attention(rotate(q), rotate(k), v, scale=1.0)


@spelling("qk_norm=2", "q:BHLC k:BHLC v:BHLC a:C b:C")
def directions_with_weights_and_a_number(q: T, k: T, v: T, a: T, b: T) -> T:
    q, k = (3.0 * (F.normalize(x.float(), dim=-1).type_as(x) * g) for x, g in ((q, a), (k, b)))
    return F.scaled_dot_product_attention(q, k, v)


@spelling("rope unmatched:no_rule", "q:BHLC k:BHLC v:BHLC c:LR:f s:LR:f")
def direction_that_others_read_too(q: T, k: T, v: T, c: T, s: T) -> tuple[T, T]:
    """A norm with a weight would be a kernel of its own, and its rotation none: no site is gained."""
    q = F.normalize(q, dim=-1)
    return F.scaled_dot_product_attention(interleaved(q, c, s), k, v), q.sum(-1)


@spelling("unmatched:no_rule", "q:BHLC k:BHLC v:BHLC", FP32)
def directions_of_clamped_rows(q: T, k: T, v: T) -> T:
    return F.scaled_dot_product_attention(F.normalize(q, dim=-1, eps=4.0) * 2.0, k, v)


@spelling("unmatched:no_rule", "q:BHLC k:BHLC v:BHLC m:BHL1")
def direction_with_a_number_of_each_token(q: T, k: T, v: T, m: T) -> T:
    return F.scaled_dot_product_attention(F.normalize(q, dim=-1) * m, k, v)


@spelling("unmatched:no_rule", "q:BHLC k:BHLC v:BHLC", FP32)
def query_by_the_length_of_the_key(q: T, k: T, v: T) -> T:
    return F.scaled_dot_product_attention(q / k.norm(dim=-1, keepdim=True).clamp(min=1e-12), k, v)


# -- gates -------------------------------------------------------------------------------------------------------------


@spelling("residual_gate_norm_modulate absorbed", STREAM)
def gate_expanded(r: T, x: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = r + x * g[:, None].expand_as(x)
    return (ln(h) * (1 + s) + t) @ w, h


@spelling("residual_gate_norm_modulate absorbed", STREAM)
def gate_repeated(r: T, x: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = r + x * g[:, None].repeat(1, x.shape[1], 1)
    return (ln(h) * (1 + s) + t) @ w, h


@spelling("gated_residual", "r:BLD x:BLD g:BD w:DD")
def gate_expanded_alone(r: T, x: T, g: T, w: T) -> T:
    return (r + x * g[:, None].expand_as(x)) @ w


# -- modulations in full size, shared by the blocks --------------------------------------------------------------------


@spelling("residual_gate_norm_modulate absorbed norm_modulate", "x:LBD s:BD t:BD g:BD w:DD")
def modulations_expanded_once_for_all_blocks(x: T, s: T, t: T, g: T, w: T) -> tuple[T, T]:
    """ERNIE-Image: tokens first, and ``1 + scale`` of every block is one node of the graph."""
    s, t, g = (p.unsqueeze(0).expand_as(x).contiguous() for p in (s, t, g))
    y = (ln(x).float() * (1 + s.float()) + t.float()).to(x.dtype) @ w
    h = x + (g.float() * y.float()).to(x.dtype)
    return (ln(h).float() * (1 + s.float()) + t.float()).to(x.dtype) @ w, h
