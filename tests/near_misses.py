"""Functions that look like a family and are not one. Each row's `expected` is everything that may happen to its sites.

Most rows fuse nothing. Where a rule may take a part of the function it is named, with the reason in the docstring;
`scale_shift` takes the modulation of a value that is no norm. Inputs are fp32, so that a wrong fusion shows.
Part 1: the formula itself. Part 2: `near_misses_around`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import FP16, FP32, Spelling, table
from .spellings import ln

ROWS: list[Spelling] = []
USUAL = "x:BLD s:B1D t:B1D w:DD"


def near_miss_table(rows: list[Spelling]) -> Callable[..., Callable]:
    """A decorator ``@near_miss(expected)`` for fp32 functions of the usual inputs."""
    add = table(rows)

    def near_miss(expected: str, inputs: str = USUAL, dtype: torch.dtype = FP32) -> Callable:
        return add(expected, inputs, dtype)

    return near_miss


near_miss = near_miss_table(ROWS)


# -- the factor --------------------------------------------------------------------------------------------------------


@near_miss("left:feeds_pointwise")
def addcmul_with_a_value(x: T, s: T, t: T, w: T) -> T:
    return torch.addcmul(t, ln(x), 1 + s, value=2) @ w


@near_miss("left:feeds_pointwise")
def shift_subtracted(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s) - t) @ w


@near_miss("left:feeds_pointwise")
def product_doubled(x: T, s: T, t: T, w: T) -> T:
    return torch.add(t, ln(x) * (1 + s), alpha=2) @ w


@near_miss("left:feeds_pointwise")
def quantized_with_a_scale_for_each_row(x: T, s: T, t: T, w: T) -> T:
    """torchao's int8: Inductor computes the norm, the largest value and the quotient in one kernel."""
    h = ln(x) * (1 + s) + t
    largest = torch.maximum(-h.amin(-1, keepdim=True), h.amax(-1, keepdim=True))
    return (h / (largest / 127.5)).round().to(torch.int8).float() @ w


@near_miss("left:feeds_pointwise", "x:BLD w:DD")
def normed_value_squared(x: T, w: T) -> T:
    n = ln(x)
    return (n * n) @ w


@near_miss("left:feeds_pointwise")
def integer_scale(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s.int()) + t) @ w


@near_miss("left:feeds_pointwise")
def complex_scale(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * torch.complex(1 + s, t)).real @ w


# -- broadcasting and dims ---------------------------------------------------------------------------------------------


@near_miss("left:feeds_pointwise", "x:1LD s:B1D t:B1D w:DD")
def scale_enlarges_the_norm(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s) + t) @ w


@near_miss("left:feeds_pointwise", "x:LD s:B1D t:B1D w:DD")
def scale_adds_a_dim(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s) + t) @ w


@near_miss("rejected:broadcast", "x:BL1 s:D t:D w:DD")
def rows_of_one_element(x: T, s: T, t: T, w: T) -> T:
    return (ln(x, eps=1e-2) * (1 + s) + t) @ w


@near_miss("norm_modulate", "x:1LD s:11D t:11D w:DD")
def zeros_enlarge_the_result(x: T, s: T, t: T, w: T) -> T:
    """The modulation is one; adding zeros of a bigger shape to it is not."""
    h = ln(x) * (1 + s) + t
    return (h + torch.zeros(2, 1, 1)) @ w + h @ w


@near_miss("norm_modulate", "x:1LD s:11D t:11D w:DD")
def ones_enlarge_the_result(x: T, s: T, t: T, w: T) -> T:
    h = ln(x) * (1 + s) + t
    return (h * torch.ones(2, 1, 1)) @ w + h @ w


@near_miss("unmatched:norm_dim scale_shift", "x:BLD s:B1D t:B1D w:DD")
def over_the_token_dim(x: T, s: T, t: T, w: T) -> T:
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    return ((x - mean) * torch.rsqrt(variance + 1e-6) * (1 + s) + t) @ w


@near_miss("unmatched:norm_dim scale_shift")
def over_two_dims(x: T, s: T, t: T, w: T) -> T:
    return (F.layer_norm(x, x.shape[-2:]) * (1 + s) + t) @ w


@near_miss("unmatched:norm_dim", "x:BDL s:BD1 t:BD1 w:LL")
def group_norm(x: T, s: T, t: T, w: T) -> T:
    return (F.group_norm(x, 4) * (1 + s) + t) @ w


@near_miss("left:feeds_pointwise", "x:BDD s:B1D t:B1D w:DD")
def modulated_after_a_transpose(x: T, s: T, t: T, w: T) -> T:
    """D tokens of D channels: shapes fit, dims do not."""
    return (ln(x).transpose(1, 2) * (1 + s) + t) @ w


@near_miss("left:feeds_pointwise", "x:BLD s:H1 t:H1 w:KK")
def scale_per_head(x: T, s: T, t: T, w: T) -> T:
    n = ln(x).unflatten(-1, (4, 9))
    return (n * (1 + s) + t) @ w


@near_miss("norm_modulate", "x:BLD s:BL1 t:BL1 w:DD")
def scale_per_token(x: T, s: T, t: T, w: T) -> T:
    """Harmless: the op takes operands whose last dim is 1."""
    return (ln(x) * (1 + s) + t) @ w


@near_miss("norm_modulate", "x:B0D s:B1D t:B1D w:DD")
def no_rows(x: T, s: T, t: T, w: T) -> T:
    """Harmless: nothing to compute, and the shape is right."""
    return (ln(x) * (1 + s) + t) @ w


# -- the statistics ----------------------------------------------------------------------------------------------------


@near_miss("rejected:variance")
def unbiased_variance(x: T, s: T, t: T, w: T) -> T:
    n = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6)
    return (n * (1 + s) + t) @ w


@near_miss("unmatched:no_rule scale_shift", "x:BLD y:BLD s:B1D t:B1D w:DD")
def statistics_of_another_tensor(x: T, y: T, s: T, t: T, w: T) -> T:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return ((y - mean) * torch.rsqrt(variance + 1e-6) * (1 + s) + t) @ w


@near_miss("unmatched:no_rule scale_shift", "x:BLD y:BLD s:B1D t:B1D w:DD")
def mean_of_one_variance_of_another(x: T, y: T, s: T, t: T, w: T) -> T:
    variance = y.var(-1, keepdim=True, unbiased=False)
    return ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-6) * (1 + s) + t) @ w


@near_miss("unmatched:no_rule scale_shift", "x:BLD y:BLD s:B1D t:B1D w:DD")
def rms_of_another_tensor(x: T, y: T, s: T, t: T, w: T) -> T:
    return (y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + s) + t) @ w


@near_miss("unmatched:no_rule scale_shift")
def centred_value_over_the_rms(x: T, s: T, t: T, w: T) -> T:
    n = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (n * (1 + s) + t) @ w


@near_miss("unmatched:no_rule scale_shift")
def eps_after_the_root(x: T, s: T, t: T, w: T) -> T:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return ((x - mean) * (torch.rsqrt(variance) + 1e-2) * (1 + s) + t) @ w


@near_miss("unmatched:no_rule scale_shift")
def eps_added_to_the_deviation(x: T, s: T, t: T, w: T) -> T:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return ((x - mean) / (variance.sqrt() + 1e-2) * (1 + s) + t) @ w


@near_miss("unmatched:no_rule scale_shift", "x:BLD e: s:B1D t:B1D w:DD")
def eps_is_a_tensor(x: T, e: T, s: T, t: T, w: T) -> T:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return ((x - mean) * torch.rsqrt(variance + e.abs()) * (1 + s) + t) @ w


@near_miss("unmatched:no_rule scale_shift")
def sum_over_another_count(x: T, s: T, t: T, w: T) -> T:
    n = x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1) + 1e-6)
    return (n * (1 + s) + t) @ w


@near_miss("unmatched:no_rule scale_shift")
def mean_of_cubes(x: T, s: T, t: T, w: T) -> T:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return ((x - mean) * torch.rsqrt(variance + 1e-6) ** 3 * (1 + s) + t) @ w


@near_miss("rejected:eps", dtype=FP16)
def eps_below_fp16(x: T, s: T, t: T, w: T) -> T:
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)
    return (n * (1 + s) + t) @ w


@near_miss("rejected:eps", "x:BLD s:BF1D t:BF1D w:DD", FP16)
def eps_below_fp16_behind_a_view(x: T, s: T, t: T, w: T) -> T:
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)
    return (n.unflatten(1, (3, -1)) * (1 + s) + t) @ w


@near_miss("rejected:eps")
def negative_eps(x: T, s: T, t: T, w: T) -> T:
    return (ln(x, eps=-1e-3) * (1 + s) + t) @ w
