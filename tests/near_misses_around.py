"""Near misses, part 2: right formulas with something in between, with other readers, cycles, or inputs written to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import Spelling
from .near_misses import near_miss_table
from .spellings import ln

ROWS: list[Spelling] = []
near_miss = near_miss_table(ROWS)


# -- what happens in between -------------------------------------------------------------------------------------------


@near_miss("left:feeds_pointwise scale_shift")
def rounded_to_integers(x: T, s: T, t: T, w: T) -> T:
    return (ln(x).round() * (1 + s) + t) @ w


@near_miss("left:feeds_pointwise")
def cast_to_integers(x: T, s: T, t: T, w: T) -> T:
    return ((ln(x) * 8).int() * (1 + s) + t) @ w


@near_miss("left:feeds_pointwise scale_shift")
def cast_to_fp8(x: T, s: T, t: T, w: T) -> T:
    return (ln(x).to(torch.float8_e4m3fn).float() * (1 + s) + t) @ w


@near_miss("left:feeds_pointwise scale_shift")
def clamped(x: T, s: T, t: T, w: T) -> T:
    return (ln(x).clamp(-1, 1) * (1 + s) + t) @ w


@near_miss("left:feeds_pointwise", "x:BLD s:B1D t:B1D m:BL1 w:DD")
def masked_afterwards(x: T, s: T, t: T, m: T, w: T) -> T:
    return ((ln(x) * (1 + s) + t) * (m > 0)) @ w


@near_miss("norm_modulate", "x:BLD s:D t:D m:BL1 w:DD")
def affine_and_masked(x: T, s: T, t: T, m: T, w: T) -> T:
    """Harmless: the mask is the scale of an affine norm, and survives."""
    return ((ln(x, s, t)) * m) @ w


@near_miss("rejected:dtype", "x:BLD:f s:B1D:f t:B1D:f w:DD:f")
def in_fp64(x: T, s: T, t: T, w: T) -> T:
    return (ln(x.double()) * (1 + s.double()) + t.double()) @ w.double()


# -- results that are read by their strides ----------------------------------------------------------------------------


@near_miss("rejected:layout")
def read_by_strides(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s) + t).as_strided((4, 8), (8, 2))


@near_miss("rejected:layout")
def read_by_strides_behind_a_view(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s) + t)[:, 1:].as_strided((4, 8), (8, 2)) @ w[:8]


@near_miss("rejected:layout")
def read_by_strides_behind_another_op(x: T, s: T, t: T, w: T) -> tuple[T, T]:
    out = ln(x) * (1 + s) + t
    return out.relu().as_strided((4, 8), (8, 2)), out @ w


@near_miss("norm_modulate")
def read_by_strides_behind_a_matmul(x: T, s: T, t: T, w: T) -> T:
    """Harmless: a matmul's result has the strides that it always has."""
    return ((ln(x) * (1 + s) + t) @ w).as_strided((4, 8), (8, 2))


# -- values that are used elsewhere ------------------------------------------------------------------------------------


@near_miss("norm")
def norm_is_read_elsewhere(x: T, s: T, t: T, w: T) -> tuple[T, T]:
    """Harmless: the norm alone."""
    n = ln(x)
    return (n * (1 + s) + t) @ w, n @ w


@near_miss("norm_modulate")
def product_is_read_elsewhere(x: T, s: T, t: T, w: T) -> tuple[T, T]:
    """Harmless: the modulation without its shift."""
    product = ln(x) * (1 + s)
    return (product + t) @ w, product @ w


@near_miss("rejected:escapes")
def statistic_is_read_elsewhere(x: T, s: T, t: T, w: T) -> tuple[T, T]:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    rstd = torch.rsqrt(variance + 1e-6)
    return ((x - mean) * rstd * (1 + s) + t) @ w, rstd


@near_miss("norm")
def shift_from_the_norm(x: T, s: T, t: T, w: T) -> T:
    """Harmless: the norm alone."""
    n = ln(x)
    return (n * (1 + s) + n.mean(1, keepdim=True)) @ w


@near_miss("norm_modulate gated_residual", "h:BLD y:BLD g:B1D w:DD")
def scale_from_the_sum(h: T, y: T, g: T, w: T) -> tuple[T, T]:
    """A cycle for the op that returns the sum and its norm; harmless apart."""
    h = h + g * y
    return h, (ln(h) * (1 + h.mean(1, keepdim=True).tanh())) @ w


@near_miss("residual_norm_modulate norm_modulate", "h:BLD y:BLD z:BLD w:DD")
def two_streams_modulate_each_other(h: T, y: T, z: T, w: T) -> tuple[T, T, T, T]:
    """Either sum may be fused with its norm, both would be a cycle."""
    a, b = h + y, h + z
    return a, b, (ln(a) * (1 + b.mean(1, keepdim=True))) @ w, (ln(b) * (1 + a.mean(1, keepdim=True))) @ w


@near_miss("norm_modulate_dual left:feeds_pointwise", "x:BLD y:BLD s:B1D w:DD")
def two_duals_modulate_each_other(x: T, y: T, s: T, w: T) -> tuple[T, ...]:
    """Either pair may be one op, both would be a cycle."""
    n, m = ln(x), ln(y)
    first, second = n * (1 + s), m * (1 + s)
    third = n * (1 + second.mean(1, keepdim=True))
    fourth = m * (1 + first.mean(1, keepdim=True))
    return first @ w, second @ w, third @ w, fourth @ w


@near_miss("norm=2 gated_residual", "h:BLD y:BLD g:B1D w:DD")
def branch_norm_is_read_elsewhere(h: T, y: T, g: T, w: T) -> tuple[T, T]:
    """A sandwich whose inner norm is a result of its own; harmless: each part alone."""
    n = ln(y)
    h = h + g * n
    return ln(h) @ w, n @ w


# -- inputs that the function writes to --------------------------------------------------------------------------------


@near_miss("norm_modulate")
def input_written_afterwards(x: T, s: T, t: T, w: T) -> T:
    """Harmless: the graph writes at its end."""
    out = (ln(x) * (1 + s) + t) @ w
    x.add_(1)
    return out


@near_miss("norm_modulate")
def scale_written_afterwards(x: T, s: T, t: T, w: T) -> T:
    """Harmless too."""
    out = (ln(x) * (1 + s) + t) @ w
    s.mul_(2)
    return out


@near_miss("norm_modulate", "x:BSD s:B1D t:B1D w:DD")
def part_of_the_input_written_afterwards(x: T, s: T, t: T, w: T) -> T:
    out = (ln(x[:, 4:]) * (1 + s) + t) @ w
    x[:, :5].zero_()
    return out


@near_miss("norm_modulate")
def input_written_before(x: T, s: T, t: T, w: T) -> T:
    """Harmless: the site reads the new value, which is a node of its own."""
    x.add_(1)
    return (ln(x) * (1 + s) + t) @ w


@near_miss("residual_gate_norm_modulate absorbed", "h:BLD y:BLD g:B1D s:B1D t:B1D w:DD")
def stream_updated_in_place(h: T, y: T, g: T, s: T, t: T, w: T) -> T:
    """Harmless: the sum of the kernel is the new value, which the graph writes at its end."""
    h += g * y
    return (ln(h) * (1 + s) + t) @ w


# -- what is added to a branch -----------------------------------------------------------------------------------------


@near_miss("gated_residual norm_modulate", "h:BLD y:BLD b:B1D g:B1D s:B1D t:B1D w:DD")
def bias_per_sample(h: T, y: T, b: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """Right, but no projection's bias: left to Inductor with the gate."""
    h = h + g * (y @ w + b)
    return h, (ln(h) * (1 + s) + t) @ w


@near_miss("gated_residual norm_modulate", "h:BLD y:BLD b:L1 g:B1D s:B1D t:B1D w:DD")
def bias_per_token(h: T, y: T, b: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * (y @ w + b)
    return h, (ln(h) * (1 + s) + t) @ w


@near_miss("norm_modulate", "h:BLD y:BLD b:D g:B1D s:B1D t:B1D w:DD")
def bias_behind_the_gate(h: T, y: T, b: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + (g * (y @ w) + b)
    return h, (ln(h) * (1 + s) + t) @ w


@near_miss("gated_residual norm_modulate", "h:BLD y:BLD b:D g:B1D s:B1D t:B1D w:DD")
def bias_that_is_subtracted(h: T, y: T, b: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * (y @ w - b)
    return h, (ln(h) * (1 + s) + t) @ w


@near_miss("norm_modulate", "h:1LD y:1LD b:BLD g:11D s:11D t:11D w:DD")
def bias_enlarges_the_branch(h: T, y: T, b: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * (y @ w + b)
    return h, (ln(h) * (1 + s) + t) @ w


@near_miss("gated_residual residual_gate_norm_modulate absorbed", "h:BLD y:BLD g:B1D w:DD")
def bias_from_the_stream(h: T, y: T, g: T, w: T) -> tuple[T, T, T]:
    """Harmless: the second site's bias depends on the first one's sum, not on its own."""
    h = h + g * (y @ w)
    k = h + g * (y @ w + h.mean((0, 1)))
    return h, k, (ln(k) * (1 + g)) @ w


@near_miss("residual_gate_norm_modulate absorbed", "h:BLD y:BLD b:D g:B1D s:B1D t:B1D w:DD")
def bias_written_afterwards(h: T, y: T, b: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """Read by the kernel, before the write."""
    h = h + g * (y @ w + b)
    out = (ln(h) * (1 + s) + t) @ w
    b.mul_(2)
    return h, out


@near_miss("norm_modulate", "x:BLD table:6D e:BLP w:DD")
def table_written_afterwards(x: T, table: T, e: T, w: T) -> T:
    """The sum with a row of it is computed before the write."""
    shift, scale, *_ = (table + e.unflatten(2, (6, -1))).split(1, dim=2)
    out = (ln(x) * (1 + scale.squeeze(2)) + shift.squeeze(2)) @ w
    table.mul_(2)
    return out


@near_miss("gated_residual left:pointwise_producer", "h:BLD y:BLD g:B1D s:B1D t:B1D w:DD")
def stream_made_for_the_sum(h: T, y: T, g: T, s: T, t: T, w: T) -> T:
    """The stream is pointwise and only the site reads it; so is the sum, which only the norm reads."""
    h = F.gelu(h @ w) + g * y
    return (ln(h) * (1 + s) + t) @ w
