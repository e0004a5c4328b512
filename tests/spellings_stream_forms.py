"""The table of spellings, part 11: copies between a sum and its norm; gate, scale and shift of each token in one op.

Models behind graph breaks copy the rounded stream (SkyReels-V2); video models whose tokens have timesteps of their
own (Wan2.2-5B, LingBot-Video) write ``addcmul`` where others write products and sums.
"""

from __future__ import annotations

import torch
from torch import Tensor as T

from .harness import Spelling, table
from .spellings import ln
from .spellings_streams import WIDE, modulated

ROWS: list[Spelling] = []
spelling = table(ROWS)

SPLIT = "r:BLD y:BLD g:B1D:f s:B1D t:B1D w:DD"

# -- copies ------------------------------------------------------------------------------------------------------------


@spelling(f"{WIDE} gated_residual", SPLIT)
def rounded_and_cloned(r: T, y: T, g: T, s: T, t: T, w: T) -> T:
    h = r.float() + (y @ w).float() * g
    z = modulated(h.to(r.dtype).clone(), s, t) @ w
    return (h + z.float() * g).to(r.dtype)


@spelling(f"{WIDE} gated_residual", SPLIT)
def rounded_and_contiguous(r: T, y: T, g: T, s: T, t: T, w: T) -> T:
    h = r.float() + (y @ w).float() * g
    z = modulated(h.to(r.dtype).contiguous(), s, t) @ w
    return (h + z.float() * g).to(r.dtype)


@spelling(f"{WIDE} gated_residual", SPLIT)
def rounded_by_a_copy(r: T, y: T, g: T, s: T, t: T, w: T) -> T:
    h = r.float() + (y @ w).float() * g
    z = modulated(h.to(r.dtype, copy=True), s, t) @ w
    return (h + z.float() * g).to(r.dtype)


@spelling(WIDE, "h:BLD y:BLD g:B1D s:B1D t:B1D w:DD")
def summed_and_cloned(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = (h + g * (y @ w)).clone()
    return h, modulated(h.contiguous(), s, t) @ w


@spelling(WIDE, "h:BLD y:BLD g:B1D s:B1D t:B1D w:DD")
def copied_into_a_new_tensor(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    out = torch.empty_like(h)
    out.copy_(h + g * (y @ w))
    return out, modulated(out, s, t) @ w


# -- of each token -----------------------------------------------------------------------------------------------------

TWICE = "norm_modulate residual_gate_norm_modulate absorbed gated_residual"


@spelling(TWICE, "h:BLD e:BLP w:DD")
def addcmul_of_each_token(h: T, e: T, w: T) -> T:
    shift1, scale1, gate1, shift2, scale2, gate2 = e.chunk(6, dim=-1)
    h = torch.addcmul(h, gate1, torch.addcmul(shift1, ln(h), 1 + scale1) @ w)
    return torch.addcmul(h, gate2, torch.addcmul(shift2, ln(h), 1 + scale2) @ w) @ w


@spelling(TWICE, "h:BLD e:BL6D:f w:DD")
def addcmul_of_each_token_in_fp32(h: T, e: T, w: T) -> T:
    shift1, scale1, gate1, shift2, scale2, gate2 = e.unbind(2)
    y = torch.addcmul(shift1, ln(h.float()), 1 + scale1).to(h.dtype) @ w
    h = torch.addcmul(h.float(), y.float(), gate1).to(h.dtype)
    y = torch.addcmul(shift2, ln(h.float()), 1 + scale2).to(h.dtype) @ w
    return torch.addcmul(h.float(), y.float(), gate2).to(h.dtype) @ w


@spelling(TWICE, "h:BLD e:BL6D:f table:116D:f w:DD")
def addcmul_of_each_token_and_a_table(h: T, e: T, table: T, w: T) -> T:
    shift1, scale1, gate1, shift2, scale2, gate2 = (table + e).unbind(2)
    y = torch.addcmul(shift1, ln(h.float()), 1 + scale1).to(h.dtype) @ w
    h = torch.addcmul(h.float(), y.float(), gate1).to(h.dtype)
    y = torch.addcmul(shift2, ln(h.float()), 1 + scale2).to(h.dtype) @ w
    return torch.addcmul(h.float(), y.float(), gate2).to(h.dtype) @ w
