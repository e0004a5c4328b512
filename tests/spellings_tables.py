"""The table of spellings, part 8: modulation per token, each a row of a scale-shift table plus a value of the token."""

from __future__ import annotations

import torch
from torch import Tensor as T

from .harness import FP16, FP32, Spelling, table
from .spellings import ln
from .spellings_norms import rms0
from .spellings_streams import WIDE, modulated

ROWS: list[Spelling] = []
spelling = table(ROWS)

APART: dict[str, set[str]] = {}  # spelling -> the tables that its op calls are given, sites that need none left out


def apart(*names: str):
    def note(function):
        APART[function.__name__] = {f"{name}_table" for name in names}
        return function

    return note


def in_fp32(h: T, y: T, shift: T, scale: T, gate: T, w: T) -> tuple[T, T]:
    h = (h.float() + y * gate).type_as(h)
    return h, (ln(h.float()) * (1 + scale) + shift).type_as(h) @ w


@spelling(WIDE, "h:BLD table:6D:f e:BLP y:BLD w:DD")
@apart("gate", "scale", "shift")
def wan(h: T, table: T, e: T, y: T, w: T) -> tuple[T, T]:
    """Wan2.2: a fp32 table, the tokens' values in bf16, chunk and squeeze."""
    mod = table[None, None] + e.unflatten(2, (6, -1)).float()
    shift, scale, gate, *_ = (part.squeeze(2) for part in mod.chunk(6, dim=2))
    return in_fp32(h, y, shift, scale, gate, w)


@spelling(WIDE, "h:BLD table:6D e:BLP y:BLD w:DD")
@apart("gate", "scale", "shift")
def ltx(h: T, table: T, e: T, y: T, w: T) -> tuple[T, T]:
    """LTX-Video: all of it in bf16, where the sum is rounded; unbind."""
    shift, scale, gate, *_ = (table[None, None] + e.reshape(e.shape[0], e.shape[1], 6, -1)).unbind(dim=2)
    h = h + gate * y
    return h, (rms0(h) * (1 + scale) + shift) @ w


@spelling(WIDE, "h:BLD table:6D e:BLP y:BLD w:DD", FP16)
@apart("gate", "scale", "shift")
def table_behind(h: T, table: T, e: T, y: T, w: T) -> tuple[T, T]:
    shift, scale, gate, *_ = (e.unflatten(2, (6, -1)) + table).split(1, dim=2)
    h = h + gate.squeeze(2) * y
    return h, modulated(h, scale.squeeze(2), shift.squeeze(2)) @ w


@spelling(WIDE, "h:BLD table:P e:BLP y:BLD w:DD")
@apart("gate", "scale", "shift")
def flat_table(h: T, table: T, e: T, y: T, w: T) -> tuple[T, T]:
    """Parts side by side in the last dim."""
    shift, scale, gate, *_ = (table + e).chunk(6, dim=-1)
    h = h + gate * y
    return h, modulated(h, scale, shift) @ w


@spelling(WIDE, "h:BLD table:6D:f e:BLP y:BLD w:DD")
@apart("gate", "scale", "shift")
def table_by_rows(h: T, table: T, e: T, y: T, w: T) -> tuple[T, T]:
    """One sum for each part."""
    e = e.unflatten(2, (6, -1)).float()
    shift, scale, gate = (table[i] + e[:, :, i] for i in (0, 1, 2))
    return in_fp32(h, y, shift, scale, gate, w)


@spelling("norm_modulate", "x:BLD s:D t:D e:BLD w:DD")
@apart("scale", "shift")
def own_rows(x: T, s: T, t: T, e: T, w: T) -> T:
    """The last modulation of such models: both parts from one embedding."""
    return modulated(x, s + e, t + e) @ w


@spelling("norm_modulate", "x:BLD s:D t:D e:BLD w:DD")
@apart("scale", "shift")
def one_plus_table(x: T, s: T, t: T, e: T, w: T) -> T:
    """The 1 is added to the row."""
    return (ln(x) * ((1 + s) + e) + (e + t)) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D e:BLD w:DD")
@apart("scale", "shift")
def rows_of_samples(x: T, s: T, t: T, e: T, w: T) -> T:
    """Not a table but a row of each sample."""
    return modulated(x, s + e, t + e) @ w


@spelling("norm_modulate", "x:BLD s:D t:D e:1LD w:DD")
@apart("scale", "shift")
def tokens_of_all_samples(x: T, s: T, t: T, e: T, w: T) -> T:
    return modulated(x, s + e, t + e) @ w


@spelling("norm_modulate_dual", "x:BLD table:6D:f e:BLP w:DD")
@apart("scale", "shift", "scale2", "shift2")
def dual_with_tables(x: T, table: T, e: T, w: T) -> tuple[T, T]:
    s, t, u, v, *_ = (table + e.unflatten(2, (6, -1)).float()).unbind(2)
    n = ln(x.float())
    return (n * (1 + s) + t).type_as(x) @ w, (n * (1 + u) + v).type_as(x) @ w


@spelling("sandwich_gate_norm_modulate absorbed=2", "h:BLD y:BLD a:D b:D table:6D e:BLP w:DD")
@apart("gate", "scale")
def in_a_sandwich(h: T, y: T, a: T, b: T, table: T, e: T, w: T) -> tuple[T, T]:
    gate, scale, *_ = (table + e.unflatten(2, (6, -1))).unbind(2)
    h = h + gate * rms0(y @ w, a)
    return h, (rms0(h, b) * (1 + scale)) @ w


@spelling("gated_residual", "h:BLD y:BLD table:6D e:BLP w:DD")
@apart("gate")
def gate_alone(h: T, y: T, table: T, e: T, w: T) -> T:
    return (h + (table + e.unflatten(2, (6, -1))).unbind(2)[5] * (y @ w)) @ w


@spelling("gated_residual", "h:BLD y:BLD table:6D e:BLP w:DD")
@apart("gate")
def gate_alone_by_rows(h: T, y: T, table: T, e: T, w: T) -> T:
    return (h + (table[5] + e.unflatten(2, (6, -1))[:, :, 5]) * (y @ w)) @ w


@spelling("norm_modulate", "x:BLD table:2D e:4P m:BL1 t:B1D w:DD")
@apart("scale")
def added_to_picked_rows(x: T, table: T, e: T, m: T, t: T, w: T) -> T:
    """A row of two timesteps for each token: `pick` and a table."""
    b, d = x.shape[0], x.shape[-1]
    rows = e[:, None, :d]
    return modulated(x, table[0] + torch.where(m > 0, rows[:b], rows[b:]), t) @ w


@spelling(WIDE, "h:BLD y:BLD s:D t:D e:BFD w:DD")
@apart("gate", "scale", "shift")
def repeated_for_tokens(h: T, y: T, s: T, t: T, e: T, w: T) -> tuple[T, T]:
    """A row of each frame, repeated for its tokens before the table is added: read before it was."""
    frames = e.repeat_interleave(h.shape[1] // e.shape[1], dim=1)
    h = h + (frames + s) * y
    return h, modulated(h, frames + s, frames + t) @ w


@spelling("norm_modulate", "x:BLD s:D t:D e:BLD w:DD")
@apart("scale", "shift")
def written_by_nobody(x: T, s: T, t: T, e: T, w: T) -> T:
    """Beside pointwise readers of the sums, for whom Inductor adds once more."""
    scale, shift = s + e, t + e
    return modulated(x, scale, shift) @ w + torch.sin(scale).sum(-1, keepdim=True)


@spelling("norm_modulate", "x:BLD table:6D e:BP w:DD")
@apart("scale", "shift")
def one_row_for_each_sample(x: T, table: T, e: T, w: T) -> T:
    """Nothing of each token (PixArt, Sana): the sums would take a launch each."""
    shift, scale, *_ = (table + e.unflatten(1, (6, -1))).chunk(6, dim=1)
    return modulated(x, scale, shift) @ w


@spelling(WIDE, "h:BLD table:16D:f e:BP y:BLD w:DD")
@apart("gate", "scale", "shift")
def wan_by_samples(h: T, table: T, e: T, y: T, w: T) -> tuple[T, T]:
    """Wan2.1: a fp32 table and rows of each sample in bf16."""
    shift, scale, gate, *_ = (table + e.unflatten(1, (6, -1)).float()).chunk(6, dim=1)
    return in_fp32(h, y, shift, scale, gate, w)


@spelling("norm_modulate", "x:BLD s:D t:D e:D w:DD")
@apart("scale", "shift")
def rows_of_all(x: T, s: T, t: T, e: T, w: T) -> T:
    """Both addends are the same for all tokens and samples."""
    return modulated(x, s + e, t + e) @ w


# -- not taken apart ---------------------------------------------------------------------------------------------------


@spelling("norm_modulate", "x:BLD table:L6D e:BLP w:DD")
@apart()
def table_of_tokens(x: T, table: T, e: T, w: T) -> T:
    """The table has a row for each token after all."""
    shift, scale, *_ = (table + e.unflatten(2, (6, -1))).split(1, dim=2)
    return modulated(x, scale.squeeze(2), shift.squeeze(2)) @ w


@spelling("norm_modulate", "x:BLD table:6D e:BLP v:PD w:DD")
@apart()
def sum_read_elsewhere(x: T, table: T, e: T, v: T, w: T) -> tuple[T, T]:
    """A matmul reads all of it: the sum is in memory."""
    mod = table + e.unflatten(2, (6, -1))
    shift, scale, *_ = mod.unbind(2)
    return modulated(x, scale, shift) @ w, mod.flatten(2) @ v


@spelling("norm_modulate", "x:BLD table:6D e:BLP w:DD")
@apart()
def sum_returned(x: T, table: T, e: T, w: T) -> tuple[T, T]:
    mod = table + e.unflatten(2, (6, -1))
    shift, scale, *_ = mod.unbind(2)
    return modulated(x, scale, shift) @ w, mod


@spelling("norm_modulate", "x:BLD table:6D:d e:BLP w:DD", FP32)
@apart()
def sum_in_fp64(x: T, table: T, e: T, w: T) -> T:
    shift, scale, *_ = (table + e.unflatten(2, (6, -1))).float().split(1, dim=2)
    return modulated(x, scale.squeeze(2), shift.squeeze(2)) @ w


@spelling("norm_modulate", "x:BLD table:6D e:BLP w:DD")
@apart()
def difference(x: T, table: T, e: T, w: T) -> T:
    """The negated addend is no tensor of the graph."""
    shift, scale, *_ = (table - e.unflatten(2, (6, -1))).split(1, dim=2)
    return modulated(x, scale.squeeze(2), shift.squeeze(2)) @ w


@spelling("left:pointwise_producer", "x:BLD s:D t:B1D e:BLD w:DD")
def tokens_computed_in_the_site(x: T, s: T, t: T, e: T, w: T) -> T:
    """The tokens' own values exist for this site only, and would have to be written."""
    return modulated(x, s + torch.sin(e), t) @ w
