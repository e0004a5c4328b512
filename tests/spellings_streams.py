"""The table of spellings, part 3: residual streams, gated or not, with the norm that follows and without.

G1 ``h + gate*y`` in bf16, G3 sandwich ``h + tanh(gate)*norm(y)``, G4 in fp32, G5 product in fp32, G6 single stream
over ``cat([attn, mlp])``, G7 ungated, G8 only the norm of the sum is read. ``absorbed`` counts gated residuals that the
norm's own kernel computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import FP16, FP32, Spelling, table
from .spellings import ln
from .spellings_norms import rms0

ROWS: list[Spelling] = []
spelling = table(ROWS)

WIDE = "residual_gate_norm_modulate absorbed"
STREAM = "h:BLD y:BLD g:B1D s:B1D t:B1D w:DD"


def modulated(h: T, s: T, t: T) -> T:
    return ln(h) * (1 + s) + t


# -- G1: order, layouts, dtypes ----------------------------------------------------------------------------------------


@spelling(WIDE, STREAM)
def g1(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * y
    return h, modulated(h, s, t) @ w


@spelling(WIDE, STREAM)
def g1_gate_last(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + y * g
    return h, modulated(h, s, t) @ w


@spelling(WIDE, STREAM)
def g1_stream_last(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = g * y + h
    return h, modulated(h, s, t) @ w


@spelling(WIDE, STREAM)
def g1_methods(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = y.mul(g).add(h)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, STREAM)
def g1_in_place(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    y = (y @ w).mul_(g)
    h = (h @ w).add_(y)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, STREAM)
def g1_addcmul(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = torch.addcmul(h, g, y)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, "h:BLD y:BLD e:BP w:DD")
def g1_b2_chunk_of_six(h: T, y: T, e: T, w: T) -> tuple[T, T]:
    """Flux, SD3, Qwen-Image: AdaLayerNormZero."""
    _, _, gate, shift, scale, _ = e.chunk(6, dim=1)
    h = h + gate.unsqueeze(1) * y
    return h, (ln(h) * (1 + scale[:, None]) + shift[:, None]) @ w


@spelling(WIDE, "h:BLD y:BLD e:BL6D w:DD")
def g1_l_per_token(h: T, y: T, e: T, w: T) -> tuple[T, T]:
    _, _, gate, shift, scale, _ = e.unbind(dim=2)
    h = h + gate * y
    return h, modulated(h, scale, shift) @ w


@spelling(WIDE, "h:BLD y:BLD e:BLP w:DD")
def g1_l_per_token_in_columns(h: T, y: T, e: T, w: T) -> tuple[T, T]:
    _, _, gate, shift, scale, _ = e.chunk(6, dim=-1)
    h = h + gate * y
    return h, modulated(h, scale, shift) @ w


@spelling(WIDE, "h:1LE y:1LE g:1E s:1E t:1E w:EE")
def g1_batch_1(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g[:, None] * y
    return h, modulated(h, s[:, None], t[:, None]) @ w


@spelling(WIDE, STREAM, FP16)
def g1_fp16(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * y
    return h, modulated(h, s, t) @ w


@spelling(WIDE, STREAM, FP32)
def g1_fp32(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * y
    return h, modulated(h, s, t) @ w


@spelling(WIDE, "h:BLD:f y:BLD:f g:B1D:f s:B1D:f t:B1D:f w:DD:f")
def g1_autocast(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    with torch.autocast("cpu", torch.bfloat16):
        h = h + g * (y @ w)
        return h, modulated(h, s, t) @ w


@spelling(WIDE, "h:BLD y:BLD g:B1D a:D s:B1D t:B1D w:DD")
def g1_rms(h: T, y: T, g: T, a: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * y
    return h, (rms0(h, a) * (1 + s) + t) @ w


@spelling(WIDE, "h:BLD y:BLD g:B1D a:D b:D s:B1D t:B1D w:DD")
def g1_affine_layer_norm(h: T, y: T, g: T, a: T, b: T, s: T, t: T, w: T) -> tuple[T, T]:
    """CogVideoX."""
    h = h + g * y
    return h, (ln(h, a, b) * (1 + s) + t) @ w


# -- the other families ------------------------------------------------------------------------------------------------


@spelling(WIDE, "h:BLD y:BLD g:B1D:f s:B1D:f t:B1D:f w:DD")
def g4_fp32(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """Wan."""
    h = (h.float() + y * g).type_as(h)
    return h, (ln(h.float()) * (1 + s) + t).type_as(h) @ w


@spelling(WIDE, "h:LBD y:LBD g:1BD a:D s:1BD t:1BD w:DD")
def g5_product_in_fp32(h: T, y: T, g: T, a: T, s: T, t: T, w: T) -> tuple[T, T]:
    """Ernie, sequence first."""
    h = h + (g.float() * y.float()).to(h.dtype)
    n = rms0(h, a)
    return h, (n.float() * (1 + s.float()) + t.float()).to(h.dtype) @ w


@spelling(WIDE, "h:BLD m:BLE g:BD s:BD t:BD v:PD w:DD")
def g6_single_stream(h: T, m: T, g: T, s: T, t: T, v: T, w: T) -> tuple[T, T]:
    """Flux: one projection of attention and MLP."""
    joined = torch.cat([h @ w, F.gelu(m, approximate="tanh")], dim=2)
    y = g.unsqueeze(1) * (joined @ v[:108])
    h = h + y
    return h, modulated(h, s[:, None], t[:, None]) @ w


@spelling("residual_norm_modulate", "h:BLD y:BLD s:B1D t:B1D w:DD")
def g7_ungated(h: T, y: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + y
    return h, modulated(h, s, t) @ w


@spelling("residual_norm", "h:BLD y:BLD a:D b:D w:DD")
def g7_affine_layer_norm(h: T, y: T, a: T, b: T, w: T) -> tuple[T, T]:
    h = h + y
    return h, ln(h, a, b) @ w


@spelling("residual_norm", "h:BLD y:BLD a:D w:DD")
def g7_affine_rms_norm(h: T, y: T, a: T, w: T) -> tuple[T, T]:
    h = h + y
    return h, F.rms_norm(h, h.shape[-1:], a, 1e-6) @ w


@spelling("residual_norm", "h:BLD y:BLD w:DD")
def g7_plain_layer_norm(h: T, y: T, w: T) -> tuple[T, T]:
    h = h + y
    return h, ln(h) @ w


@spelling("residual_gate_norm absorbed", "h:BLD y:BLD g:B1D a:D b:D w:DD")
def g1_then_affine_norm(h: T, y: T, g: T, a: T, b: T, w: T) -> tuple[T, T]:
    """Wan, before cross-attention."""
    h = (h.float() + y * g.float()).type_as(h)
    return h, ln(h.float(), a.float(), b.float()).type_as(h) @ w


@spelling(WIDE, STREAM)
def g8_only_the_norm_is_read(h: T, y: T, g: T, s: T, t: T, w: T) -> T:
    """AuraFlow."""
    return modulated(h + g * y, s, t) @ w


@spelling("residual_gate_norm_modulate_dual absorbed", "h:BLD y:BLD g:B1D s:B1D t:B1D u:B1D v:B1D w:DD")
def g1_dual(h: T, y: T, g: T, s: T, t: T, u: T, v: T, w: T) -> tuple[T, T, T]:
    """SD3.5 medium."""
    h = h + g * y
    n = ln(h)
    return h, (n * (1 + s) + t) @ w, (n * (1 + u) + v) @ w


@spelling("norm_modulate absorbed", "h:BLD y:BLD g:B1D a:D w:DD")
def g3_sandwich(h: T, y: T, g: T, a: T, w: T) -> T:
    """Z-Image, Lumina 2: the norm of the branch, not of the stream."""
    return (h + g.tanh() * rms0(y @ w, a)) @ w


@spelling("norm_modulate absorbed", "h:BLD y:BLD g:BD w:DD")
def g3m_sandwich_in_fp32(h: T, y: T, g: T, w: T) -> T:
    """Mochi."""
    n = F.rms_norm((y @ w).float(), y.shape[-1:], eps=1e-6) * torch.tanh(g).unsqueeze(1).float()
    return (h + n.to(h.dtype)) @ w


@spelling("sandwich_gate_norm_modulate absorbed=2", "h:BLD y:BLD g:B1D a:D b:D s:B1D w:DD")
def g3_sandwich_then_modulate(h: T, y: T, g: T, a: T, b: T, s: T, w: T) -> tuple[T, T]:
    """Z-Image, Lumina 2: both norms and the stream between them are one op."""
    h = h + g.tanh() * rms0(y @ w, a)
    return h, (rms0(h, b) * s) @ w


@spelling("sandwich_gate_norm_modulate absorbed=2", "h:BLD y:BLD g:BD s:BD w:DD")
def g3m_sandwich_then_modulate(h: T, y: T, g: T, s: T, w: T) -> tuple[T, T]:
    """Mochi: the norm of the branch and its gate in fp32."""
    n = F.rms_norm((y @ w).float(), y.shape[-1:], eps=1e-6) * torch.tanh(g).unsqueeze(1).float()
    h = h + n.to(h.dtype)
    n = F.rms_norm(h.float(), h.shape[-1:], eps=1e-6)
    return h, (n * (1 + s.unsqueeze(1).float())).to(h.dtype) @ w


@spelling("sandwich_gate_norm absorbed=2", "h:BLD y:BLD g:B1D a:D b:D w:DD")
def g3_sandwich_then_affine_norm(h: T, y: T, g: T, a: T, b: T, w: T) -> tuple[T, T]:
    h = h + rms0(y @ w, a) * g
    return h, rms0(h, b) @ w


@spelling("sandwich_norm_modulate absorbed", "h:BLD y:BLD s:B1D t:B1D w:DD")
def ungated_sandwich_then_modulate(h: T, y: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = ln(y @ w) + h
    return h, modulated(h, s, t) @ w


@spelling("gated_residual", "h:BLD y:BLD g:B1D w:DD")
def gated_residual_alone(h: T, y: T, g: T, w: T) -> T:
    return (h + g * (y @ w)) @ w


@spelling("gated_residual", "h:BLD y:BLD e:BL6D w:DD")
def gated_residual_per_token(h: T, y: T, e: T, w: T) -> T:
    return (h + e[:, :, 2] * (y @ w)) @ w


@spelling("gated_residual", "h:BLD y:BLD e:BLP w:DD")
def gated_residual_per_token_in_columns(h: T, y: T, e: T, w: T) -> T:
    return (h + e.chunk(6, dim=-1)[2] * (y @ w)) @ w


@spelling("", "h:BLD y:BLE w:DD")
def no_gate_but_a_gated_linear_unit(h: T, y: T, w: T) -> T:
    """Two halves, of which neither is conditioning."""
    up, gate = y.chunk(2, dim=-1)
    return (h + gate * up) @ w


# -- chains, cats and slices -------------------------------------------------------------------------------------------


@spelling("residual_gate_norm_modulate=2 absorbed=2", STREAM)
def two_in_a_row(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * y
    h = h + g * (modulated(h, s, t) @ w)
    return h, modulated(h, s, t) @ w


@spelling("gated_residual norm_modulate", STREAM)
def parallel_branches(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """The sum of the branches is pointwise: Inductor adds it to the stream in one kernel, the norm reads the result."""
    h = h + g * (y @ w + F.gelu(y @ w))
    return h, modulated(h, s, t) @ w


@spelling(WIDE, "h:BLD c:BTD y:BSD g:B1D s:B1D t:B1D w:DD")
def split_and_joined_again(h: T, c: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """HunyuanVideo, Flux of older diffusers: text and image are one stream inside a block, two between blocks."""
    joined = torch.cat([c, h], dim=1) + g * y
    c, h = joined[:, :4], joined[:, 4:]
    joined = torch.cat([c, h], dim=1)
    return joined, modulated(joined, s, t) @ w


@spelling(WIDE, "h:BSD y:BSD g:B1D s:B1D t:B1D w:DD")
def split_by_sizes_and_joined_again(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    c, h = (h + g * y).split([4, 6], dim=1)
    joined = torch.cat([c, h], dim=1)
    return joined, modulated(joined, s, t) @ w


@spelling("norm_modulate", "h:BSD s:B1D t:B1D w:DD")
def norm_of_a_row_slice(h: T, s: T, t: T, w: T) -> T:
    return modulated(h[:, 4:], s, t) @ w


@spelling(WIDE, "h:BSD y:BSD g:B1D s:B1D t:B1D w:DD")
def norm_of_a_row_slice_of_the_sum(h: T, y: T, g: T, s: T, t: T, w: T) -> T:
    """The final layer of single-stream models drops the text rows first."""
    h = h + g * y
    return modulated(h[:, 4:], s, t) @ w


@spelling(WIDE, "h:BLD y:BSD g:B1D s:B1D t:B1D w:DD")
def branch_is_a_slice(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """Joint attention's output, split back into text and image."""
    h = h + g * (y @ w)[:, 4:]
    return h, modulated(h, s, t) @ w


# -- a stream that is mixed with the branch, not added to --------------------------------------------------------------


@spelling("gated_residual norm_modulate", STREAM, FP32)
def lerp(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """torch decomposes it into a sum with a factor for each row: a site, and the norm of it another."""
    h = torch.lerp(h, y, g)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, STREAM)
def gate_1_minus(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + (1 - g) * y
    return h, modulated(h, s, t) @ w


# -- a stream in fp32 whose norms read it in bf16 ----------------------------------------------------------------------


@spelling(f"{WIDE} gated_residual", "r:BLD y:BLD g:B1D:f s:B1D t:B1D w:DD")
def stream_rounded_for_its_norm_only(r: T, y: T, g: T, s: T, t: T, w: T) -> T:
    """SkyReels-V2: the sum goes on in fp32."""
    h = r.float() + y.float() * g
    z = (F.layer_norm(h.to(r.dtype), (36,)) * (1 + s) + t) @ w
    return (h + z.float() * g).to(r.dtype)


@spelling("residual_norm", "r:BLD:f y:BLD a:D b:D w:DD")
def stream_rounded_for_its_affine_norm(r: T, y: T, a: T, b: T, w: T) -> tuple[T, T]:
    h = r + y
    return h, F.layer_norm(h.to(y.dtype), (36,), a, b) @ w


@spelling("norm_modulate gated_residual", "r:BLD y:BLD g:B1D:f s:B1D t:B1D w:DD")
def stream_whose_rounding_others_read_too(r: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T, T]:
    """The kernel stores one of the two."""
    h = r.float() + y.float() * g
    rounded = h.to(r.dtype)
    return h, rounded, (F.layer_norm(rounded, (36,)) * (1 + s) + t) @ w
