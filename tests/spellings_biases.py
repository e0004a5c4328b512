"""The table of spellings, part 4: branches that end in a bias of their own.

``nn.Linear`` on a slice of a batch, as of the joint attention's output, is a `bmm` and then ``+ bias``: a pointwise op
that only the residual reads. The kernel adds the bias; otherwise the branch would be written to memory once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import FP16, FP32, Spelling, table
from .spellings import ln
from .spellings_norms import rms0
from .spellings_streams import WIDE, modulated

ROWS: list[Spelling] = []
spelling = table(ROWS)

JOINT = "h:BLD y:BSD g:B1D s:B1D t:B1D v:DD b:D w:DD"


@spelling(WIDE, JOINT)
def bias_of_the_image_rows(h: T, y: T, g: T, s: T, t: T, v: T, b: T, w: T) -> tuple[T, T]:
    """SD3, HunyuanVideo, HiDream."""
    h = h + g * F.linear(y[:, 4:], v, b)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, "h:BTD y:BSD g:B1D s:B1D t:B1D v:DD b:D w:DD")
def bias_of_the_text_rows(h: T, y: T, g: T, s: T, t: T, v: T, b: T, w: T) -> tuple[T, T]:
    h = F.linear(y[:, :4], v, b) * g + h
    return h, modulated(h, s, t) @ w


@spelling("residual_gate_norm_modulate=2 absorbed=2", "h:BLD c:BTD y:BSD g:B1D s:B1D t:B1D v:DD b:D w:DD")
def bias_of_both_streams(h: T, c: T, y: T, g: T, s: T, t: T, v: T, b: T, w: T) -> tuple[T, ...]:
    """One bias for two sites."""
    image, text = (F.linear(part, v, b) for part in y.split([6, 4], dim=1))
    h, c = h + g * image, c + g * text
    return h, modulated(h, s, t) @ w, c, modulated(c, s, t) @ w


@spelling(WIDE, JOINT, FP16)
def bias_fp16(h: T, y: T, g: T, s: T, t: T, v: T, b: T, w: T) -> tuple[T, T]:
    h = h + g * F.linear(y[:, 4:], v, b)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, JOINT, FP32)
def bias_fp32(h: T, y: T, g: T, s: T, t: T, v: T, b: T, w: T) -> tuple[T, T]:
    h = h + g * F.linear(y[:, 4:], v, b)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, "h:BLD y:BSD g:B1D:f s:B1D:f t:B1D:f v:DD b:D w:DD")
def bias_before_an_fp32_gate(h: T, y: T, g: T, s: T, t: T, v: T, b: T, w: T) -> tuple[T, T]:
    h = (h.float() + F.linear(y[:, 4:], v, b) * g).type_as(h)
    return h, (ln(h.float()) * (1 + s) + t).type_as(h) @ w


@spelling(WIDE, "h:BLD y:BLD g:B1D s:B1D t:B1D b:D:f w:DD")
def bias_in_fp32(h: T, y: T, g: T, s: T, t: T, b: T, w: T) -> tuple[T, T]:
    h = h + g * (y @ w + b).to(h.dtype)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, "h:LBD y:SBD g:1BD s:1BD t:1BD b:11D w:DD")
def bias_sequence_first(h: T, y: T, g: T, s: T, t: T, b: T, w: T) -> tuple[T, T]:
    h = h + g * (y[4:] @ w + b)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, "h:BLD y:BFTD g:BF1D s:B1D t:B1D b:D w:DD")
def bias_then_a_reshape(h: T, y: T, g: T, s: T, t: T, b: T, w: T) -> tuple[T, T]:
    """Seen through views of the branch."""
    h = h + g[:, 0] * (y[:, :, :2] @ w + b).flatten(1, 2)
    return h, modulated(h, s, t) @ w


@spelling("residual_norm_modulate", "h:BLD y:BSD s:B1D t:B1D v:DD b:D w:DD")
def bias_without_a_gate(h: T, y: T, s: T, t: T, v: T, b: T, w: T) -> tuple[T, T]:
    h = h + F.linear(y[:, 4:], v, b)
    return h, modulated(h, s, t) @ w


@spelling("residual_norm_modulate", "h:BLD y:BSD s:B1D t:B1D v:DD b:D w:DD")
def bias_first(h: T, y: T, s: T, t: T, v: T, b: T, w: T) -> tuple[T, T]:
    h = (b + y[:, 4:] @ v) + h
    return h, modulated(h, s, t) @ w


@spelling("residual_norm", "h:BLD y:BSD c:D d:D v:DD b:D w:DD")
def bias_then_affine_norm(h: T, y: T, c: T, d: T, v: T, b: T, w: T) -> tuple[T, T]:
    h = h + F.linear(y[:, 4:], v, b)
    return h, ln(h, c, d) @ w


@spelling("residual_gate_norm_modulate_dual absorbed", "h:BLD y:BSD g:B1D e:BP v:DD b:D w:DD")
def bias_dual(h: T, y: T, g: T, e: T, v: T, b: T, w: T) -> tuple[T, T, T]:
    """SD3.5 medium."""
    s, t, s2, t2, *_ = e[:, None].chunk(6, dim=-1)
    h = h + g * F.linear(y[:, 4:], v, b)
    n = ln(h)
    return h, (n * (1 + s) + t) @ w, (n * (1 + s2) + t2) @ w


@spelling("residual_gate_norm_modulate_dual absorbed", "h:BLD y:BSD g:B1D e:BP v:DD b:D w:DD")
def bias_dual_read_elsewhere(h: T, y: T, g: T, e: T, v: T, b: T, w: T) -> tuple[T, T, T, T]:
    s, t, s2, t2, *_ = e[:, None].chunk(6, dim=-1)
    y = F.linear(y[:, 4:], v, b)
    h = h + g * y
    n = ln(h)
    return h, (n * (1 + s) + t) @ w, (n * (1 + s2) + t2) @ w, y @ w


@spelling("sandwich_gate_norm_modulate absorbed=2", "h:BLD y:BSD g:B1D a:D c:D s:B1D v:DD b:D w:DD")
def bias_before_a_sandwich_norm(h: T, y: T, g: T, a: T, c: T, s: T, v: T, b: T, w: T) -> tuple[T, T]:
    """The bias is the projection's: the branch norm reads it."""
    h = h + g.tanh() * rms0(F.linear(y[:, 4:], v, b), a)
    return h, (rms0(h, c) * s) @ w


@spelling("sandwich_norm absorbed", "h:BLD y:BSD c:D d:D v:DD b:D w:DD")
def bias_before_an_ungated_sandwich(h: T, y: T, c: T, d: T, v: T, b: T, w: T) -> tuple[T, T]:
    h = h + ln(F.linear(y[:, 4:], v, b))
    return h, ln(h, c, d) @ w


@spelling("gated_residual", "h:BLD y:BSD g:B1D v:DD b:D w:DD")
def bias_of_a_gated_residual_alone(h: T, y: T, g: T, v: T, b: T, w: T) -> T:
    return (h + g * F.linear(y[:, 4:], v, b)) @ w


@spelling(WIDE, JOINT)
def bias_of_a_branch_that_is_read_elsewhere(h: T, y: T, g: T, s: T, t: T, v: T, b: T, w: T) -> tuple[T, T, T]:
    """The biased branch is in memory anyway: the kernel reads it as it is."""
    y = F.linear(y[:, 4:], v, b)
    h = h + g * y
    return h, modulated(h, s, t) @ w, torch.cat([y, h], dim=1)


# -- two branches side by side -----------------------------------------------------------------------------------------

PARALLEL = "h:BLD y:BLD z:BLD g:B1D s:B1D t:B1D v:DD w:DD"


@spelling(WIDE, PARALLEL)
def two_branches(h: T, y: T, z: T, g: T, s: T, t: T, v: T, w: T) -> tuple[T, T]:
    """FLUX.3: attention and MLP of one norm; the second takes the place of a bias."""
    h = h + g * (y @ v + z @ w)
    return h, modulated(h, s, t) @ w


@spelling(WIDE, PARALLEL, FP16)
def two_branches_fp16(h: T, y: T, z: T, g: T, s: T, t: T, v: T, w: T) -> tuple[T, T]:
    h = h + (z @ w + y @ v) * g
    return h, modulated(h, s, t) @ w


@spelling(WIDE, PARALLEL)
def two_branches_read_elsewhere(h: T, y: T, z: T, g: T, s: T, t: T, v: T, w: T) -> tuple[T, T, T]:
    """Their sum is in memory anyway: it is the branch."""
    both = y @ v + z @ w
    h = h + g * both
    return h, modulated(h, s, t) @ w, both @ w


@spelling("residual_gate_norm_modulate absorbed", "h:BLD y:BLD z:BLD e:BLP v:DD w:DD")
def two_branches_of_conditioned_tokens(h: T, y: T, z: T, e: T, v: T, w: T) -> tuple[T, T]:
    """FLUX.3 with a row of conditioning for each token: the gate is as large as what it is multiplied with."""
    shift, scale, gate = e.chunk(6, dim=-1)[:3]
    h = h + gate * (y @ v + z @ w)
    return h, modulated(h, scale, shift) @ w


@spelling("residual_norm", "h:BLD y:BLD z:BLD r:D v:DD w:DD")
def two_branches_without_a_gate(h: T, y: T, z: T, r: T, v: T, w: T) -> tuple[T, T]:
    """Parallel blocks of language models."""
    h = h + (y @ v + z @ w)
    return h, rms0(h) * r @ w
