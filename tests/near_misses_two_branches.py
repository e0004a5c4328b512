"""Near misses, part 3: sums of three of which two are one op with the norm behind them, or none is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import Spelling
from .near_misses import near_miss_table
from .spellings_streams import modulated

ROWS: list[Spelling] = []
near_miss = near_miss_table(ROWS)

STREAM = "h:BLD y:BLD c:BLD g:B1D s:B1D t:B1D w:DD"
APART = "gated_residual norm_modulate"


@near_miss(APART, STREAM)
def second_is_subtracted(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * (y @ w) - c
    return h, modulated(h, s, t) @ w


@near_miss(APART, STREAM)
def second_is_pointwise(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """Right, but it would have to be written to memory for the kernel."""
    h = h + g * (y @ w) + F.gelu(c @ w)
    return h, modulated(h, s, t) @ w


@near_miss(APART, "h:BLD y:BLD c:B1D g:B1D s:B1D t:B1D w:DD")
def second_is_a_row(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * (y @ w) + c
    return h, modulated(h, s, t) @ w


@near_miss(APART, "h:1LD y:1LD c:BLD g:11D s:11D t:11D w:DD")
def second_enlarges_the_stream(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * (y @ w) + c
    return h, modulated(h, s, t) @ w


@near_miss("residual_two_norm_modulate absorbed gated_residual", STREAM)
def three_branches(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """One more than the op has: it reads the sum of the first two, which is in memory for another reader."""
    first = h + g * (y @ w)
    h = first + t * (c @ w) + first @ w
    return h, modulated(h, s, t) @ w


@near_miss("norm_modulate gated_residual=2", STREAM)
def scale_from_the_first_sum(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """The first sum is needed before the op that computes it; so is the whole one."""
    first = h + g * (y @ w)
    h = first + g * (c @ w)
    return h, modulated(h, (first.mean(1, keepdim=True) * h.mean(1, keepdim=True)).tanh(), t) @ w


@near_miss("residual_gate_norm_modulate residual_norm_modulate absorbed", STREAM)
def both_sums_have_a_norm(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T, T]:
    """Two streams: what is added second reads the norm of the first."""
    first = h + g * y
    h = first + torch.addmm(c[0, 0], modulated(first, s, t).flatten(0, 1), w).view_as(h)
    return first, h, modulated(h, s, t) @ w


@near_miss("residual_two_norm_modulate absorbed", STREAM)
def second_written_afterwards(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """Read by the kernel, before the write."""
    h = h + g * (y @ w) + c
    out = modulated(h, s, t) @ w
    c.mul_(2)
    return h, out


@near_miss("residual_two_norm_modulate absorbed", STREAM)
def second_is_the_branch(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """Harmless: one tensor in two places."""
    y = y @ w
    h = h + g * y + y
    return h, modulated(h, s, t) @ w


@near_miss("residual_two_norm_modulate absorbed", STREAM)
def second_is_the_stream(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * (y @ w) + h
    return h, modulated(h, s, t) @ w


# -- sums of what was stacked ------------------------------------------------------------------------------------------


@near_miss("residual_norm_modulate", "h:BLD y:BLD z:2BLD s:B1D t:B1D w:DD")
def sum_of_a_joined_tensor(h: T, y: T, z: T, s: T, t: T, w: T) -> tuple[T, T]:
    """The parts are no summands; the sum is in memory."""
    h = h + torch.cat([z @ w, y[None]]).sum(0)
    return h, modulated(h, s, t) @ w


@near_miss("residual_norm_modulate", "h:BLD y:BLD c:BLD s:B1D t:B1D w:DD")
def mean_of_two(h: T, y: T, c: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + torch.stack([y @ w, c @ w]).mean(0)
    return h, modulated(h, s, t) @ w


@near_miss("norm_modulate", "h:BLD y:BLD c:BLD s:B1D t:B1D w:DD")
def sum_over_the_tokens_of_two(h: T, y: T, c: T, s: T, t: T, w: T) -> T:
    """What is summed was joined along another dim."""
    n = torch.cat([y @ w, c @ w], 1).sum(1, keepdim=True)
    return modulated(h, s * n, t) @ w
