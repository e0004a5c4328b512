"""The table of spellings, part 9: two branches added to the stream, one after the other, before the norm that reads it.

``h + g*y + c`` with a residual of a ControlNet (all families), a hint (VACE) or another attention's result
(IP-adapters), ``h + g*y + g2*y2`` with two attentions in one block (SD3.5 medium).
"""

from __future__ import annotations

import torch
from torch import Tensor as T

from .harness import FP16, FP32, Spelling, table
from .spellings import ln
from .spellings_norms import rms0
from .spellings_streams import modulated

ROWS: list[Spelling] = []
spelling = table(ROWS)

TWO = "residual_two_norm_modulate absorbed"
BOTH = "residual_two_norm_modulate absorbed=2"
STREAM = "h:BLD y:BLD c:BLD g:B1D s:B1D t:B1D w:DD"
GATES = "h:BLD y:BLD c:BLD g:B1D k:B1D s:B1D t:B1D w:DD"


@spelling(TWO, STREAM)
def two_control(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """FLUX, SD3, Qwen-Image: the end of a block, then what a ControlNet adds, then the next block's norm."""
    h = h + g * (y @ w)
    h = h + c
    return h, modulated(h, s, t) @ w


@spelling(TWO, STREAM)
def two_control_first(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = c + (y * g + h)
    return h, modulated(h, s, t) @ w


@spelling(TWO, STREAM)
def two_control_before_the_branch(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + c
    h = h + g * (y @ w)
    return h, modulated(h, s, t) @ w


@spelling(TWO, STREAM)
def two_in_place(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """ComfyUI: ``img[:, :add.shape[1]] += add``, for all tokens."""
    h = h @ w + g * y
    h[:, : c.shape[1]] += c
    return h, modulated(h, s, t) @ w


@spelling(TWO, STREAM, FP16)
def two_fp16(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * y + c @ w
    return h, modulated(h, s, t) @ w


@spelling(TWO, STREAM, FP32)
def two_fp32(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * y + c @ w
    return h, modulated(h, s, t) @ w


@spelling(TWO, STREAM)
def two_only_the_norm_is_read(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> T:
    return modulated(h + g * y + c @ w, s, t) @ w


@spelling(TWO, "h:BLD y:BLD c:BLD g:B1D:f k: s:B1D:f t:B1D:f w:DD")
def two_hint_with_a_strength(h: T, y: T, c: T, g: T, k: T, s: T, t: T, w: T) -> tuple[T, T]:
    """VACE: a block of Wan, then a hint times a number of its layer."""
    h = (h.float() + (y @ w) * g).type_as(h)
    h = h + (c @ w) * k
    return h, (ln(h.float()) * (1 + s) + t).type_as(h) @ w


@spelling(TWO, STREAM)
def two_hint_times_a_number(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """ComfyUI's VACE, PuLID and IP-adapters of FLUX: a strength that is no tensor."""
    h = h + g * (y @ w)
    h = h + 0.7 * (c @ w)
    return h, modulated(h, s, t) @ w


@spelling(TWO, STREAM)
def two_hint_with_alpha(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = torch.add(h + g * (y @ w), c @ w, alpha=0.7)
    return h, modulated(h, s, t) @ w


@spelling(BOTH, GATES)
def two_gates(h: T, y: T, c: T, g: T, k: T, s: T, t: T, w: T) -> tuple[T, T]:
    """SD3.5 medium: two attentions in one block."""
    h = h + g * (y @ w)
    h = h + k * (c @ w)
    return h, modulated(h, s, t) @ w


@spelling(TWO, GATES)
def two_gate_of_the_second_only(h: T, y: T, c: T, g: T, k: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + y @ w
    h = h + k * (c @ w)
    return h, modulated(h, s, t) @ w


@spelling(BOTH, "h:BLD y:BLD c:BLD e:BL6D w:DD")
def two_gates_per_token(h: T, y: T, c: T, e: T, w: T) -> tuple[T, T]:
    g, k, s, t = (e[:, :, i] for i in range(4))
    h = h + g * (y @ w)
    h = h + k * (c @ w)
    return h, modulated(h, s, t) @ w


@spelling(TWO, "h:BSD y:BSD c:BLD g:B1D s:B1D t:B1D w:DD")
def two_behind_the_text(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """FLUX of diffusers: a block's result is split into text and image, and a ControlNet adds to the image."""
    h = (h + g * (y @ w))[:, 4:]
    h = h + c
    return h, modulated(h, s, t) @ w


@spelling("residual_two_norm absorbed", "h:BLD y:BLD c:BLD g:B1D a:D b:D w:DD")
def two_before_an_affine_norm(h: T, y: T, c: T, g: T, a: T, b: T, w: T) -> tuple[T, T]:
    h = h + g * (y @ w) + c
    return h, ln(h, a, b) @ w


@spelling("residual_two_norm_modulate_dual absorbed", "h:BLD y:BLD c:BLD g:B1D s:B1D t:B1D u:B1D v:B1D w:DD")
def two_before_two_modulations(h: T, y: T, c: T, g: T, s: T, t: T, u: T, v: T, w: T) -> tuple[T, T, T]:
    """SD3.5 medium with a ControlNet."""
    h = h + g * (y @ w) + c
    n = ln(h)
    return h, (n * (1 + s) + t) @ w, (n * (1 + u) + v) @ w


@spelling("sandwich_two_norm_modulate absorbed=2", "h:BLD y:BLD c:BLD g:B1D a:D b:D s:B1D w:DD")
def two_behind_a_sandwich(h: T, y: T, c: T, g: T, a: T, b: T, s: T, w: T) -> tuple[T, T]:
    """Z-Image with a ControlNet."""
    h = h + g.tanh() * rms0(y @ w, a)
    h = h + c
    return h, (rms0(h, b) * (1 + s)) @ w


@spelling("residual_two_norm_modulate residual_gate_norm_modulate absorbed=2", STREAM)
def two_in_every_block(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * (y @ w) + c
    h = h + g * (modulated(h, s, t) @ w)
    return h, modulated(h, s, t) @ w


# -- added to each other first -----------------------------------------------------------------------------------------


@spelling("residual_pair_norm_modulate", GATES)
def two_added_first(h: T, y: T, c: T, g: T, k: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + (g * (y @ w) + k * (c @ w))
    return h, modulated(h, s, t) @ w


@spelling(TWO, STREAM)
def two_added_first_one_gated(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + (c + g * (y @ w))
    return h, modulated(h, s, t) @ w


@spelling("residual_pair_norm_modulate", GATES)
def two_stacked(h: T, y: T, c: T, g: T, k: T, s: T, t: T, w: T) -> tuple[T, T]:
    """SD3.5 medium, ComfyUI's."""
    h = h + torch.stack([g * (y @ w), k * (c @ w)], dim=0).sum(dim=0)
    return h, modulated(h, s, t) @ w


@spelling("residual_norm_modulate", "h:BLD y:BLD c:BLD s:B1D t:B1D w:DD")
def two_stacked_without_gates(h: T, y: T, c: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + torch.stack([y @ w, c @ w], dim=1).sum(dim=1)
    return h, modulated(h, s, t) @ w


@spelling("residual_norm_modulate", "h:BLD y:BLD c:BLD s:B1D t:B1D w:DD")
def two_stacked_last(h: T, y: T, c: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + torch.stack([y @ w, c @ w], dim=-2).sum(dim=-2, keepdim=True).squeeze(-2)
    return h, modulated(h, s, t) @ w


@spelling("residual_two_norm_modulate", STREAM)
def stream_and_two_stacked(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = torch.stack([h, g * (y @ w), c @ w]).sum(0)
    return h, modulated(h, s, t) @ w


@spelling(BOTH, GATES)
def two_in_a_list(h: T, y: T, c: T, g: T, k: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = sum([h, g * (y @ w), k * (c @ w)])
    return h, modulated(h, s, t) @ w


# -- one of the two sums is a stream of its own ------------------------------------------------------------------------


@spelling("residual_norm_modulate gated_residual", STREAM)
def first_of_two_is_read_elsewhere(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T, T]:
    """A skip connection: the first sum is in memory anyway."""
    first = h + g * (y @ w)
    h = first + c
    return h, modulated(h, s, t) @ w, first @ w
