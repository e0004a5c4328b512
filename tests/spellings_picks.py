"""The table of spellings, part 5: gates, scales and shifts that are picked per token from two rows of each sample."""

from __future__ import annotations

import torch
from torch import Tensor as T

from .harness import FP16, Spelling, table
from .spellings import ln
from .spellings_norms import rms0
from .spellings_streams import WIDE, modulated

ROWS: list[Spelling] = []
spelling = table(ROWS)


def mask(m: T) -> T:
    """[B, L, 1], true for the tokens of index 0."""
    return (m > 0).int().unsqueeze(-1) == 0


def picked(rows: T, m: T, parts: int) -> list[T]:
    """Qwen-Image-Edit: the modulations of two timesteps, one behind the other in the batch dim."""
    b = rows.shape[0] // 2
    return [torch.where(mask(m), r[:b].unsqueeze(1), r[b:].unsqueeze(1)) for r in rows.chunk(parts, dim=-1)]


@spelling("norm_modulate", "x:BLD e:4P m:BL w:DD")
def picked_modulation(x: T, e: T, m: T, w: T) -> T:
    shift, scale, *_ = picked(e, m, 6)
    return (ln(x) * (1 + scale) + shift) @ w


@spelling(WIDE, "h:BLD y:BLD e:4P m:BL w:DD")
def picked_gate_and_modulation(h: T, y: T, e: T, m: T, w: T) -> tuple[T, T]:
    gate, shift, scale, *_ = picked(e, m, 6)
    h = h + gate * y
    return h, modulated(h, scale, shift) @ w


@spelling(WIDE, "h:1LD y:1LD e:2P m:1L w:DD", FP16)
def picked_batch_1(h: T, y: T, e: T, m: T, w: T) -> tuple[T, T]:
    gate, shift, scale, *_ = picked(e, m, 6)
    h = h + gate * y
    return h, modulated(h, scale, shift) @ w


@spelling(WIDE, "h:BLD y:BLD e:4P:f m:BL w:DD")
def picked_in_fp32(h: T, y: T, e: T, m: T, w: T) -> tuple[T, T]:
    gate, shift, scale, *_ = picked(e, m, 6)
    h = (h.float() + y * gate).type_as(h)
    return h, (ln(h.float()) * (1 + scale) + shift).type_as(h) @ w


@spelling(WIDE, "h:BLD y:BLD e:4P m:BL s:B1D t:B1D w:DD")
def picked_gate(h: T, y: T, e: T, m: T, s: T, t: T, w: T) -> tuple[T, T]:
    """Beside a modulation that is the same for all tokens."""
    h = h + picked(e, m, 6)[5] * y
    return h, modulated(h, s, t) @ w


@spelling("residual_gate_norm_modulate=2 norm_modulate absorbed=2", "h:BLD e:4P f:4P m:BL w:DD")
def picked_by_one_mask_computed_often(h: T, e: T, f: T, m: T, w: T) -> tuple[T, T]:
    """Two blocks' worth of sites, each with masks of its own."""
    s0, t0, g0, s1, t1, g1 = picked(e, m, 6)
    s2, t2, *_ = picked(f, m, 6)
    h = h + g0 * (modulated(h, s0, t0) @ w)
    h = h + g1 * (modulated(h, s1, t1) @ w)
    return h, modulated(h, s2, t2) @ w


@spelling("norm_modulate", "x:BLD e:B2D f:B2D m:L w:DD")
def picked_from_neighbours_in_a_middle_dim(x: T, e: T, f: T, m: T, w: T) -> T:
    """One mask for all samples."""
    scale, shift = (torch.where(m[:, None] > 0, r[:, :1], r[:, 1:]) for r in (e, f))
    return modulated(x, scale, shift) @ w


@spelling("norm_modulate", "x:BLD e:2BD f:2BD m:BL1 w:DD")
def picked_by_unbind(x: T, e: T, f: T, m: T, w: T) -> T:
    scale, shift = (torch.where(m > 0, *(row[:, None] for row in r.unbind())) for r in (e, f))
    return modulated(x, scale, shift) @ w


@spelling("norm_modulate", "x:BLD e:BE f:BE m:BL1 w:DD")
def picked_halves_of_a_row(x: T, e: T, f: T, m: T, w: T) -> T:
    """Expanded to all tokens first, as Z-Image does."""
    scale, shift = (
        torch.where(m > 0, *(half.unsqueeze(1).expand(-1, x.shape[1], -1) for half in r.chunk(2, dim=1)))
        for r in (e, f)
    )
    return modulated(x, scale, shift) @ w


@spelling("norm_modulate", "x:BLD e:2D f:2D m:BL1 w:DD")
def picked_rows_of_all_samples(x: T, e: T, f: T, m: T, w: T) -> T:
    return modulated(x, torch.where(m > 0, e[0], e[1]), torch.where(m > 0, f[0], f[1])) @ w


@spelling("norm_modulate_dual", "x:BLD e:4P m:BL w:DD")
def picked_dual(x: T, e: T, m: T, w: T) -> tuple[T, T]:
    s, t, u, v, *_ = picked(e, m, 6)
    n = ln(x)
    return (n * (1 + s) + t) @ w, (n * (1 + u) + v) @ w


@spelling("sandwich_gate_norm_modulate absorbed=2", "h:BLD y:BLD a:D b:D e:4P m:BL w:DD")
def picked_in_a_sandwich(h: T, y: T, a: T, b: T, e: T, m: T, w: T) -> tuple[T, T]:
    gate, scale, *_ = picked(e, m, 6)
    h = h + gate * rms0(y @ w, a)
    return h, (rms0(h, b) * (1 + scale)) @ w


@spelling("gated_residual", "h:BLD y:BLD e:4P m:BL w:DD")
def picked_gate_alone(h: T, y: T, e: T, m: T, w: T) -> T:
    return (h + picked(e, m, 6)[2] * (y @ w)) @ w


# -- left to Inductor: a row for every token would have to be written to memory ----------------------------------------


@spelling("left:pointwise_producer", "x:BLD e:2BD t:B1D m:BL1 w:DD")
def picked_second_row_first(x: T, e: T, t: T, m: T, w: T) -> T:
    return modulated(x, torch.where(m > 0, e[1][:, None], e[0][:, None]), t) @ w


@spelling("left:pointwise_producer", "x:BLD e:2BD t:B1D m:BLD w:DD")
def picked_per_element(x: T, e: T, t: T, m: T, w: T) -> T:
    return modulated(x, torch.where(m > 0, e[0][:, None], e[1][:, None]), t) @ w


@spelling("left:pointwise_producer", "x:BLD e:2BLD t:B1D m:BL1 w:DD")
def picked_from_rows_per_token(x: T, e: T, t: T, m: T, w: T) -> T:
    return modulated(x, torch.where(m > 0, e[0], e[1]), t) @ w


@spelling("left:pointwise_producer", "x:BLD e:2BD f:2BD m:BL1 w:DD")
def picked_by_two_masks(x: T, e: T, f: T, m: T, w: T) -> T:
    scale = torch.where(m > 0, e[0][:, None], e[1][:, None])
    shift = torch.where(m > 1, f[0][:, None], f[1][:, None])
    return modulated(x, scale, shift) @ w


def of_one_sample(rows: T, m: T) -> T:
    """Qwen-Image 2.1: of one sample the two rows are views of one shape, by dims added in another order."""
    return torch.where((m == 0).view(1, -1, 1), rows[:-1].unsqueeze(1), rows[-1:].unsqueeze(0))


@spelling(WIDE, "h:1LD y:1LD e:2P m:L w:DD")
def picked_then_tanh(h: T, y: T, e: T, m: T, w: T) -> tuple[T, T]:
    gate, shift, scale, *_ = (of_one_sample(rows, m) for rows in e.chunk(6, dim=-1))
    h = h + gate.tanh() * y
    return h, modulated(h, scale, shift) @ w


@spelling(WIDE, "h:BLD y:BLD e:3P m:L w:DD")
def picked_beside_a_row_of_all_samples(h: T, y: T, e: T, m: T, w: T) -> tuple[T, T]:
    """Two samples with a row of their own each, and one row for both."""
    gate, shift, scale, *_ = (of_one_sample(rows, m) for rows in e.chunk(6, dim=-1))
    h = h + gate.tanh() * y
    return h, modulated(h, scale, shift) @ w


# -- segments of tokens ------------------------------------------------------------------------------------------------


def in_segments(h: T, at: int, scale: T, shift: T) -> T:
    """ComfyUI's Qwen-Image-Edit: the first tokens and those of reference images, modulated one after the other."""
    first = torch.addcmul(shift[:, :1], h[:, :at], 1 + scale[:, :1])
    return torch.cat([first, torch.addcmul(shift[:, 1:], h[:, at:], 1 + scale[:, 1:])], 1)


@spelling("norm_modulate", "x:BLD s:B2D t:B2D w:DD")
def segments_modulated(x: T, s: T, t: T, w: T) -> T:
    return in_segments(ln(x), 4, s, t) @ w


@spelling(WIDE, "h:BLD y:BLD e:B2P w:DD", FP16)
def segments_gated_and_modulated(h: T, y: T, e: T, w: T) -> tuple[T, T]:
    gate, scale, shift, *_ = e.chunk(6, -1)
    y = y @ w
    h = h + torch.cat([y[:, :4] * gate[:, :1], y[:, 4:] * gate[:, 1:]], 1)
    return h, in_segments(ln(h), 4, scale, shift) @ w


@spelling("norm_modulate", "x:BLD s:BD u:BD t:BD v:BD w:DD")
def segments_with_rows_of_two_tensors(x: T, s: T, u: T, t: T, v: T, w: T) -> T:
    """Brought together by a copy."""
    h, (s, u, t, v) = ln(x), (row.unsqueeze(1) for row in (s, u, t, v))
    return torch.cat([h[:, :2] * (1 + s) + t, h[:, 2:] * (1 + u) + v], 1) @ w


@spelling("left:feeds_pointwise", "x:BLD s:B2D t:B2D w:DD")
def segments_in_another_order(x: T, s: T, t: T, w: T) -> T:
    h = ln(x)
    return torch.cat([h[:, 4:] * (1 + s[:, :1]) + t[:, :1], h[:, :4] * (1 + s[:, 1:]) + t[:, 1:]], 1) @ w


@spelling("left:feeds_pointwise", "x:BLD s:B2D t:B2D w:DD")
def segments_computed_in_two_ways(x: T, s: T, t: T, w: T) -> T:
    h = ln(x)
    return torch.cat([h[:, :4] * (1 + s[:, :1]) + t[:, :1], h[:, 4:] / (1 + s[:, 1:]) + t[:, 1:]], 1) @ w


@spelling("left:feeds_pointwise", "x:BLD s:B2D t:B2D w:DD")
def segments_that_leave_a_token_out(x: T, s: T, t: T, w: T) -> T:
    h = ln(x)
    return torch.cat([h[:, :3] * (1 + s[:, :1]) + t[:, :1], h[:, 4:] * (1 + s[:, 1:]) + t[:, 1:]], 1) @ w


# -- by number ---------------------------------------------------------------------------------------------------------


def number(m: T) -> T:
    """0, 1 or 2 for each token."""
    return (m > -0.5).long() + (m > 0.5).long()


def indexed(rows: T, m: T, parts: int) -> list[T]:
    """MiniMax-H3: rows of several timesteps and modalities, one after the other."""
    return [part.index_select(0, number(m)) for part in rows.chunk(parts, dim=-1)]


@spelling("norm_modulate", "x:LD e:3P m:L w:DD")
def indexed_modulation(x: T, e: T, m: T, w: T) -> T:
    shift, scale, *_ = indexed(e, m, 6)
    return (rms0(x) * (1.0 + scale) + shift).to(x.dtype) @ w


@spelling("residual_gate_norm_modulate=2 norm_modulate absorbed=2", "h:LD e:3P m:L w:DD", FP16)
def indexed_gates_and_modulations(h: T, e: T, m: T, w: T) -> tuple[T, T]:
    s0, t0, g0, s1, t1, g1 = indexed(e, m, 6)
    h = h + g0 * (modulated(h, s0, t0) @ w)
    h = h + g1 * (modulated(h, s1, t1) @ w)
    return h, modulated(h, g0, t1) @ w


@spelling("norm_modulate", "x:BLD e:3D f:3D m:BL w:DD")
def indexed_for_each_sample(x: T, e: T, f: T, m: T, w: T) -> T:
    return modulated(x, e[number(m)], f[number(m)]) @ w


@spelling("norm_modulate", "x:BLD e:3D f:3D m:L w:DD")
def indexed_for_all_samples(x: T, e: T, f: T, m: T, w: T) -> T:
    n = number(m)
    return modulated(x, torch.nn.functional.embedding(n, e), f[n.int()].unsqueeze(0)) @ w


@spelling(WIDE, "h:BLD y:BLD e:3FD m:BL w:DD")
def indexed_parts_of_a_row(h: T, y: T, e: T, m: T, w: T) -> tuple[T, T]:
    gate, shift, scale = (part.squeeze(2) for part in e[number(m)].chunk(3, dim=2))
    h = h + gate * y
    return h, modulated(h, scale, shift) @ w


@spelling("norm_modulate", "x:BLTD e:3D f:3D m:BL w:DD")
def indexed_for_frames(x: T, e: T, f: T, m: T, w: T) -> T:
    n = number(m)
    return modulated(x, e[n].unsqueeze(2), f[n].unsqueeze(2)) @ w


@spelling(WIDE, "h:LD y:LD e:3P s:1D m:L w:DD")
def indexed_beside_one_row(h: T, y: T, e: T, s: T, m: T, w: T) -> tuple[T, T]:
    gate, scale, *_ = indexed(e, m, 6)
    h = h + y * gate
    return h, modulated(h, scale, s) @ w


@spelling("gated_residual", "h:LD y:LD e:3P m:L w:DD")
def indexed_gate_alone(h: T, y: T, e: T, m: T, w: T) -> T:
    return (h + indexed(e, m, 6)[2] * (y @ w)) @ w


@spelling("left:pointwise_producer", "x:LD e:LD t:1D m:L w:DD")
def indexed_in_another_order(x: T, e: T, t: T, m: T, w: T) -> T:
    """As many rows as tokens."""
    return modulated(x, e[number(m)], t) @ w


@spelling("left:pointwise_producer", "x:LD e:3D f:3D m:L w:DD")
def indexed_by_two_tensors(x: T, e: T, f: T, m: T, w: T) -> T:
    return modulated(x, e[number(m)], f[number(-m)]) @ w


# -- rows of two tensors -----------------------------------------------------------------------------------------------

TWO = "h:BLD y:BLD e:BP f:BP m:BL w:DD"


@spelling("norm_modulate", "x:BLD s:B1D u:B1D t:B1D m:BL1 w:DD")
def picked_from_two_tensors(x: T, s: T, u: T, t: T, m: T, w: T) -> T:
    return modulated(x, torch.where(m > 0, s, u), t) @ w


def selected(m: T, noisy: T, clean: T) -> T:
    """FIBO 2, Z-Image with clean and noisy tokens: modulations from two projections."""
    tokens = m.shape[1]
    noisy, clean = (rows.unsqueeze(1).expand(-1, tokens, -1) for rows in (noisy, clean))
    return torch.where(mask(m), noisy, clean)


@spelling(WIDE, TWO)
def picked_of_two_projections(h: T, y: T, e: T, f: T, m: T, w: T) -> tuple[T, T]:
    (g0, s0, *_), (g1, s1, *_) = e.chunk(6, dim=1), f.chunk(6, dim=1)
    h = h + selected(m, g0.tanh(), g1.tanh()) * y
    return h, (ln(h) * selected(m, 1.0 + s0, 1.0 + s1)) @ w


@spelling(WIDE, TWO, FP16)
def picked_of_two_projections_then_tanh(h: T, y: T, e: T, f: T, m: T, w: T) -> tuple[T, T]:
    (g0, s0, t0, *_), (g1, s1, t1, *_) = e.chunk(6, dim=1), f.chunk(6, dim=1)
    h = h + selected(m, g0, g1).tanh() * y
    return h, modulated(h, selected(m, s0, s1), selected(m, t0, t1)) @ w


@spelling(WIDE, "h:BLD y:BLD e:BD f:BP m:BL w:DD")
def picked_of_rows_made_in_two_ways(h: T, y: T, e: T, f: T, m: T, w: T) -> tuple[T, T]:
    h = h + torch.where(mask(m), e[:, None], (f * f).chunk(6, dim=1)[2][:, None]).sigmoid() * y
    return h, modulated(h, selected(m, e, f.chunk(6, dim=1)[0]), selected(m, e, f.chunk(6, dim=1)[1])) @ w


@spelling(WIDE, TWO)
def picked_of_the_batchs_halves(h: T, y: T, e: T, f: T, m: T, w: T) -> tuple[T, T]:
    """What is cut across samples is not brought together as if each had its own."""
    gates = [rows.unsqueeze(0).transpose(0, 1).chunk(6, dim=-1)[0] for rows in (e, f)]
    h = h + torch.where(mask(m), *gates) * y
    scales = [rows.flip(0).chunk(6, dim=-1)[1][:, None] for rows in (e, f)]
    return h, modulated(h, torch.where(mask(m), *scales), torch.where(mask(m), *gates)) @ w
