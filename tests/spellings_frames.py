"""The table of spellings, part 9: gates, scales and shifts of a frame, for its tokens.

Video models that generate frame after frame have a timestep for each: gates [B,F,D] for tokens [B,F*S,D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import FP32, Spelling, table
from .spellings import ln

ROWS: list[Spelling] = []
spelling = table(ROWS)

GATED = "h:BLD y:BLD g:BFD w:DD"
STREAM = "h:BLD y:BLD g:BFD s:BFD t:BFD w:DD"
WIDE = "residual_gate_norm_modulate absorbed"


def framed(x: T, like: T) -> T:
    return x.unflatten(1, (like.shape[1], -1))


def gated(y: T, g: T) -> T:
    return (framed(y, g) * g[:, :, None]).flatten(1, 2)


# -- unflattened -------------------------------------------------------------------------------------------------------


@spelling(WIDE, STREAM)
def frames(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """CausVid, Self-Forcing."""
    h = h + gated(y, g)
    return h, (framed(ln(h), s) * (1 + s[:, :, None]) + t[:, :, None]).flatten(1, 2) @ w


@spelling("residual_gate_norm absorbed", GATED + " a:D b:D")
def frames_before_an_affine_norm(h: T, y: T, g: T, w: T, a: T, b: T) -> tuple[T, T]:
    h = h + gated(y, g)
    return h, F.layer_norm(h, h.shape[-1:], a, b) @ w


@spelling("residual_gate_norm absorbed", GATED)
def frames_before_a_norm_only(h: T, y: T, g: T, w: T) -> T:
    return ln(h + gated(y, g)) @ w


@spelling(WIDE, "h:BLD y:BLD g:BFD s:B1D t:B1D w:DD")
def frames_then_one_modulation(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = gated(y, g) + h
    return h, (ln(h) * (1 + s) + t) @ w


@spelling(WIDE, "h:BLD y:BLD g:BFD s:BLD t:BLD w:DD")
def frames_then_a_modulation_per_token(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = gated(y, g) + h
    return h, (ln(h) * (1 + s) + t) @ w


@spelling(WIDE, "h:BLD y:BLD g:BFD:f s:BFD:f t:BFD:f w:DD")
def frames_in_fp32(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """LongCat-Video: the stream is looked at in frames only where it is modulated."""
    h = (h + gated(y, g)).to(h.dtype)
    n = ln(framed(h, s).float()) * (s[:, :, None] + 1) + t[:, :, None]
    return h, n.to(h.dtype).flatten(1, 2) @ w


@spelling(WIDE, STREAM, FP32)
def frames_of_the_stream_too(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = framed(h, g) + framed(y, g) * g[:, :, None]
    return h.flatten(1, 2), (ln(h) * (1 + s[:, :, None]) + t[:, :, None]).flatten(1, 2) @ w


@spelling("residual_gate_norm_modulate residual_gate_norm absorbed=2", STREAM + " a:D b:D", FP32)
def frames_twice(h: T, y: T, g: T, s: T, t: T, w: T, a: T, b: T) -> tuple[T, T]:
    """A stream that one site leaves is what the next one reads."""
    h = h + gated(y, g)
    y = F.layer_norm(h, h.shape[-1:], a, b) @ w
    h = h + gated(y, t)
    return h, (framed(ln(h), s) * (1 + s[:, :, None]) + t[:, :, None]).flatten(1, 2) @ w


@spelling("residual_gate_norm absorbed", "h:BLD y:BLD g:BLD w:DD", FP32)
def frames_by_position(h: T, y: T, g: T, w: T) -> tuple[T, T]:
    """A gate for each place in a frame, the same in all frames."""
    h = h + (y.unflatten(1, (3, -1)) * g[:, None, :2]).flatten(1, 2)
    return h, ln(h) @ w


@spelling("gated_residual", GATED)
def frames_alone(h: T, y: T, g: T, w: T) -> T:
    return (h + gated(y, g)) @ w


@spelling("gated_residual left:feeds_pointwise", GATED, FP32)
def frames_exchanged_with_places(h: T, y: T, g: T, w: T) -> T:
    """The tokens of a frame do not follow one another: what is added is in another order than the gated branch."""
    product = y.unflatten(1, (-1, g.shape[1])).transpose(1, 2) * g[:, :, None]
    return F.silu(ln(h + product.flatten(1, 2))) @ w


@spelling("residual_gate_norm absorbed", GATED)
def frames_repeated_before_a_norm_only(h: T, y: T, g: T, w: T) -> T:
    return ln(torch.addcmul(h, y, g.repeat_interleave(2, dim=1))) @ w


@spelling("residual_norm_modulate", "h:BLD y:BLD s:BFD t:BFD w:DD")
def frames_of_an_ungated_stream(h: T, y: T, s: T, t: T, w: T) -> tuple[T, T]:
    """ComfyUI's Wan: ``1 + scale`` of the repeated rows."""
    s, t = (v.repeat_interleave(2, dim=1) for v in (s, t))
    h = h + y
    return h, torch.addcmul(t, ln(h), 1 + s) @ w


# -- repeated, or picked by number -------------------------------------------------------------------------------------


@spelling(WIDE, STREAM)
def frames_repeated(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    g, s, t = (v.repeat_interleave(h.shape[1] // v.shape[1], dim=1) for v in (g, s, t))
    h = h + y * g
    return h, (ln(h) * (1 + s) + t) @ w


@spelling(WIDE, "h:LD y:LD g:HD s:HD t:HD i:L:i w:DD")
def rows_picked_by_number(h: T, y: T, g: T, s: T, t: T, i: T, w: T) -> tuple[T, T]:
    """MiniMax-H3: a row for each modality and timestep."""
    h = h + g.index_select(0, i) * y
    return h, (ln(h) * (1 + s.index_select(0, i)) + t.index_select(0, i)) @ w


@spelling("gated_residual", "h:LD y:LD g:HD i:L:i w:DD")
def rows_picked_by_number_alone(h: T, y: T, g: T, i: T, w: T) -> T:
    return torch.addmm(h + g[i] * y, h, w)
