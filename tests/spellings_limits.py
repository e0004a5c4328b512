"""The table of spellings, part 10: streams in fp16 that are clamped to what fp16 holds before the norm reads them.

``if h.dtype == torch.float16: h = h.clip(-65504, 65504)``: FLUX, FLUX.2, Qwen-Image, Chroma, CogView3+, BRIA, others.
"""

from __future__ import annotations

from torch import Tensor as T

from .harness import FP16, FP32, Spelling, table
from .spellings import ln
from .spellings_norms import rms0
from .spellings_streams import STREAM, WIDE, modulated

ROWS: list[Spelling] = []
spelling = table(ROWS)


@spelling(WIDE, STREAM, FP16)
def limit_clip(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h + g * (y @ w)
    h = h.clip(-65504, 65504)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, STREAM, FP16)
def limit_that_acts(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = (h + g * (y @ w)).clamp(min=-1.5, max=1.5)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, STREAM)
def limit_that_acts_in_bf16(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = (h + g * (y @ w)).clamp(-1.5, 1.5)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, STREAM, FP32)
def limit_in_fp32(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = (h + g * (y @ w)).clamp(-1.5, 1.5)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, "h:BLD y:BLD g:B1D:f s:B1D t:B1D w:DD", FP16)
def limit_before_the_rounding(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = (h.float() + (y @ w) * g).clamp(-1.5, 1.5).type_as(h)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, STREAM, FP16)
def limit_in_place(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = h @ w + g * y
    h.clamp_(-1.5, 1.5)
    return h, modulated(h, s, t) @ w


@spelling("residual_norm", "h:BLD y:BLD a:D b:D w:DD", FP16)
def limit_of_an_ungated_stream(h: T, y: T, a: T, b: T, w: T) -> tuple[T, T]:
    h = (h + y @ w).clamp(-1.5, 1.5)
    return h, ln(h, a, b) @ w


@spelling(WIDE, "h:BSD y:BSD g:B1D s:B1D t:B1D w:DD", FP16)
def limit_and_the_text_is_dropped(h: T, y: T, g: T, s: T, t: T, w: T) -> T:
    h = (h + g * (y @ w)).clip(-1.5, 1.5)
    return modulated(h[:, 4:], s, t) @ w


@spelling("residual_two_norm_modulate absorbed", "h:BLD y:BLD c:BLD g:B1D s:B1D t:B1D w:DD", FP16)
def limit_of_two_branches(h: T, y: T, c: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = (h + g * (y @ w) + c).clip(-1.5, 1.5)
    return h, modulated(h, s, t) @ w


@spelling("residual_gate_norm_modulate_dual absorbed", "h:BLD y:BLD g:B1D s:B1D t:B1D u:B1D v:B1D w:DD", FP16)
def limit_before_two_modulations(h: T, y: T, g: T, s: T, t: T, u: T, v: T, w: T) -> tuple[T, T, T]:
    h = (h + g * y).clip(-1.5, 1.5)
    n = ln(h)
    return h, (n * (1 + s) + t) @ w, (n * (1 + u) + v) @ w


@spelling("sandwich_gate_norm_modulate absorbed=2", "h:BLD y:BLD g:B1D a:D b:D s:B1D w:DD", FP16)
def limit_behind_a_sandwich(h: T, y: T, g: T, a: T, b: T, s: T, w: T) -> tuple[T, T]:
    h = (h + g.tanh() * rms0(y @ w, a)).clip(-1.5, 1.5)
    return h, (rms0(h, b) * (1 + s)) @ w


@spelling("residual_gate_norm_modulate=2 absorbed=2", STREAM, FP16)
def limit_in_every_block(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = (h + g * y).clip(-65504, 65504)
    h = (h + g * (modulated(h, s, t) @ w)).clip(-65504, 65504)
    return h, modulated(h, s, t) @ w


# -- the sum is clamped for one reader only, or not as the op clamps it: apart -----------------------------------------


@spelling("left:pointwise_producer gated_residual", STREAM, FP16)
def limit_for_the_norm_only(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    """The kernel would store one of the two; Inductor clamps as it reads."""
    h = h + g * (y @ w)
    return h, modulated(h.clip(-1.5, 1.5), s, t) @ w


@spelling("norm_modulate gated_residual", STREAM, FP16)
def limits_that_differ(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = (h + g * (y @ w)).clip(-1.5, 2.5)
    return h, modulated(h, s, t) @ w


@spelling("norm_modulate gated_residual", STREAM, FP16)
def limit_from_below(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = (h + g * (y @ w)).clamp(min=-1.5)
    return h, modulated(h, s, t) @ w


@spelling("norm_modulate gated_residual", STREAM)
def limit_between_two_numbers_of_the_dtype(h: T, y: T, g: T, s: T, t: T, w: T) -> tuple[T, T]:
    h = (h + g * (y @ w)).clamp(-1.501, 1.501)
    return h, modulated(h, s, t) @ w
