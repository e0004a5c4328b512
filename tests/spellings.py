"""The table of spellings, part 1: A1, ``norm(x)*(1+s)+t``. Each row says which rules must take it, and how often.

``@spelling(expected, inputs)``: see `harness.parse` and `harness.spell`. Functions end in a matmul as models do: a
result that only pointwise ops read is left to Inductor, which has rows of its own in part 2.
Layouts of s and t: b2 [B,D], b3 [B,1,D], l [B,L,D], f [B,F,1,D]. Parts 2, 3: `spellings_norms`, `spellings_streams`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import FP16, FP32, Spelling, table

ROWS: list[Spelling] = []
spelling = table(ROWS)


def ln(x: T, weight: T | None = None, bias: T | None = None, eps: float = 1e-6) -> T:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


# -- A1: layouts of scale and shift ------------------------------------------------------------------------------------


@spelling("norm_modulate", "x:BLD s:BD t:BD w:DD")
def a1_b2(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s[:, None]) + t[:, None]) @ w


@spelling("norm_modulate", "x:BLD s:BD t:BD w:DD")
def a1_b2_unsqueezed_after_the_add(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s)[:, None, :] + t[:, None, :]) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def a1_b3(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD e:BLP w:DD")
def a1_l_per_token(x: T, e: T, w: T) -> T:
    shift, scale, *_ = e.chunk(6, dim=-1)
    return (ln(x) * (1 + scale) + shift) @ w


@spelling("norm_modulate", "x:BLD s:BF1D t:BF1D w:DD")
def a1_f_per_frame(x: T, s: T, t: T, w: T) -> T:
    n = ln(x).unflatten(1, (s.shape[1], -1))
    return (n * (1 + s) + t).flatten(1, 2) @ w


@spelling("norm_modulate", "x:BLD s: t: w:DD")
def a1_0d(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD s:1 t:1 w:DD")
def a1_one_element(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:BLD s:D t:D w:DD")
def a1_d(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:1LD s:1D t:1D w:DD")
def a1_batch_1(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s[:, None]) + t[:, None]) @ w


@spelling("norm_modulate", "x:LBD s:1BD t:1BD w:DD")
def a1_sequence_first(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s) + t) @ w


@spelling("norm_modulate", "x:LD s:D t:1D w:DD")
def a1_two_dims(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s) + t) @ w


# -- A1: order, addcmul, dtypes ----------------------------------------------------------------------------------------


@spelling("norm_modulate", "x:BLE s:B1E t:B1E w:EE")
def a1_scale_first(x: T, s: T, t: T, w: T) -> T:
    return ((1 + s) * ln(x) + t) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def a1_shift_first(x: T, s: T, t: T, w: T) -> T:
    return (t + (s + 1.0) * ln(x)) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def a1_addcmul(x: T, s: T, t: T, w: T) -> T:
    return torch.addcmul(t, ln(x), 1 + s) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def a1_distributed(x: T, s: T, t: T, w: T) -> T:
    n = ln(x)
    return (n + n * s + t) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def a1_distributed_addcmul(x: T, s: T, t: T, w: T) -> T:
    n = ln(x)
    return (torch.addcmul(n, n, s) + t) @ w


@spelling("norm_modulate", "x:BLD s:BD t:BD w:DD", FP16)
def a1_fp16(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s[:, None]) + t[:, None]) @ w


@spelling("norm_modulate", "x:BLD s:BD t:BD w:DD", FP32)
def a1_fp32(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s[:, None]) + t[:, None]) @ w


@spelling("norm_modulate", "x:BLD s:BD:f t:BD:f w:DD:f")
def a1_fp32_parameters(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + s[:, None]) + t[:, None]) @ w


@spelling("norm_modulate", "x:BLD:f s:BD:f t:BD:f w:DD:f")
def a1_autocast(x: T, s: T, t: T, w: T) -> T:
    with torch.autocast("cpu", torch.bfloat16):
        return (ln(x) * (1 + s[:, None]) + t[:, None]) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def a1_eps_1e_2(x: T, s: T, t: T, w: T) -> T:
    return (ln(x, eps=1e-2) * (1 + s) + t) @ w


# -- A1: other factors -------------------------------------------------------------------------------------------------


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def factor_2_plus_scale(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (2 + s) + t) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def factor_scale_minus_1(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (s - 1) + t) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def factor_1_minus_scale(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 - s) + t) @ w


@spelling("norm_modulate", "x:BLD s:BD t:BD w:DD", FP32)
def factor_1_minus_scale_unsqueezed(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 - s)[:, None] + t[:, None]) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD", FP32)
def factor_minus_1_minus_scale(x: T, s: T, t: T, w: T) -> T:
    return ((-1 - s) * ln(x) + t) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def factor_1_plus_doubled_scale(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * (1 + 2 * s) + t) @ w


@spelling("norm_modulate", "x:BLD s:B1D t:B1D w:DD")
def factor_exp_of_scale(x: T, s: T, t: T, w: T) -> T:
    return (ln(x) * s.exp() + t) @ w


@spelling("left:pointwise_producer", "x:BLD s:BLD t:BLD w:DD")
def factor_1_minus_scale_per_token(x: T, s: T, t: T, w: T) -> T:
    """As many rows as tokens: what is subtracted from 1 would have to be written to memory."""
    return (ln(x) * (1 - s) + t) @ w


# -- where scale and shift come from -----------------------------------------------------------------------------------


@spelling("norm_modulate", "x:BLD c:BD v:DP w:DD")
def from_silu_linear_chunk(x: T, c: T, v: T, w: T) -> T:
    shift, scale, *_ = (F.silu(c) @ v).chunk(6, dim=1)
    return (ln(x) * (1 + scale[:, None]) + shift[:, None]) @ w


@spelling("norm_modulate", "x:BLD e:BP a:6D w:DD")
def from_table_chunk(x: T, e: T, a: T, w: T) -> T:
    """PixArt, Sana."""
    shift, scale, *_ = (a[None] + e.reshape(x.shape[0], 6, -1)).chunk(6, dim=1)
    return (ln(x) * (1 + scale) + shift) @ w


@spelling("norm_modulate", "x:BLD e:BLP a:6D w:DD")
def from_table_unbind(x: T, e: T, a: T, w: T) -> T:
    """LTX."""
    values = a[None, None] + e.reshape(x.shape[0], e.shape[1], 6, -1)
    shift, scale, *_ = values.unbind(dim=2)
    return (ln(x) * (1 + scale) + shift) @ w


@spelling("norm_modulate", "x:BLD e:BL6D:f a:16D:f w:DD")
def from_table_chunk_squeeze(x: T, e: T, a: T, w: T) -> T:
    """Wan 2.2, per token."""
    shift, scale, *_ = (a.unsqueeze(0) + e.float()).chunk(6, dim=2)
    return (ln(x.float()) * (1 + scale.squeeze(2)) + shift.squeeze(2)).type_as(x) @ w


@spelling("norm_modulate", "x:BLD e:BP w:DD")
def from_split(x: T, e: T, w: T) -> T:
    shift, scale, _ = e.split([36, 36, 144], dim=-1)
    return (ln(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)) @ w


@spelling("norm_modulate", "x:BLD e:BP w:DD")
def from_slices(x: T, e: T, w: T) -> T:
    return (ln(x) * (1 + e[:, None, 36:72]) + e[:, None, :36]) @ w


@spelling("norm_modulate", "x:BLD e:B6D w:DD")
def from_select(x: T, e: T, w: T) -> T:
    return (ln(x) * (1 + e[:, -1].unsqueeze(1)) + e.select(1, 0)[:, None]) @ w


@spelling("norm_modulate", "x:BLD e:BP w:DD")
def from_tensor_split(x: T, e: T, w: T) -> T:
    parts = e.tensor_split(6, dim=1)
    return (ln(x) * (1 + parts[1][:, None]) + parts[0][:, None]) @ w
