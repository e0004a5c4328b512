"""Near misses of norms behind a rotation: another reader in between, another dim, something else in between.

See `near_misses_rope` for what `expected` counts. A rotation that only pointwise ops read is left to Inductor.
"""

from __future__ import annotations

import torch
from torch import Tensor as T

from .harness import FP32, Spelling, table
from .near_misses_rope import FULL
from .spellings_rope import attend, heads, rms, rotate_half, turned

ROWS: list[Spelling] = []
near_miss = table(ROWS)
QKV = "q:BLI k:BTI v:BTI"


def rope(x: T, c: T, s: T) -> T:
    return x * c + turned(x) * s


@near_miss("rope", f"{QKV} {FULL} a:C", FP32)
def last_rotated_is_read_elsewhere(q: T, k: T, v: T, c: T, s: T, a: T) -> tuple[T, T]:
    y = rope(heads(q), c, s)
    return attend(rms(y, a), heads(k), heads(v)), y @ y.mT


@near_miss("", f"{QKV} {FULL}", FP32)
def last_norm_over_the_heads(q: T, k: T, v: T, c: T, s: T) -> T:
    y = rope(heads(q), c, s)
    return attend(y * torch.rsqrt(y.square().mean(2, keepdim=True) + 1e-6), heads(k), heads(v))


@near_miss("either", f"{QKV} {FULL}", FP32)
def last_norm_over_the_tokens(q: T, k: T, v: T, c: T, s: T) -> T:
    y = rope(heads(q), c, s).transpose(1, -1)
    return attend(rms(y).transpose(1, -1), heads(k), heads(v))


@near_miss("either", f"{QKV} {FULL}", FP32)
def last_norm_over_half_of_the_columns(q: T, k: T, v: T, c: T, s: T) -> T:
    y = rope(heads(q), c, s).unflatten(-1, (2, -1))
    return attend(rms(y).flatten(-2), heads(k), heads(v))


@near_miss("either", f"{QKV} {FULL} a:C", FP32)
def last_statistics_of_the_query(q: T, k: T, v: T, c: T, s: T, a: T) -> T:
    """The rotated query over the length of the one that is not rotated."""
    x = heads(q)
    return attend(rope(x, c, s) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * a, heads(k), heads(v))


@near_miss("either", f"{QKV} {FULL} a:C", FP32)
def last_scaled_in_between(q: T, k: T, v: T, c: T, s: T, a: T) -> T:
    return attend(rms(rope(heads(q), c, s) * a, a), heads(k), heads(v))


@near_miss("either", f"{QKV} {FULL} a:C b:C", FP32)
def last_and_first(q: T, k: T, v: T, c: T, s: T, a: T, b: T) -> T:
    """A norm on either side: one of them is the rotation's."""
    return attend(rms(rope(rms(heads(q), a), c, s), b), heads(k), heads(v))


@near_miss("", f"{QKV} {FULL} a:C", FP32)
def last_statistics_are_read_elsewhere(q: T, k: T, v: T, c: T, s: T, a: T) -> tuple[T, T]:
    y = rope(heads(q), c, s)
    root = torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
    return attend(y * root * a, heads(k), heads(v)), root


@near_miss("", f"{QKV} {FULL} a:C", FP32)
def last_of_a_reflection(q: T, k: T, v: T, c: T, s: T, a: T) -> T:
    """No rotation, but a norm."""
    x = heads(q)
    return attend(rms(x * c - rotate_half(x) * s.abs() + x * s, a), heads(k), heads(v))


@near_miss("either", "q:BLI y:BTI v:BSI c:LC s:LC a:BSHC", FP32)
def last_of_a_joint_tensor_with_a_weight_per_token(q: T, y: T, v: T, c: T, s: T, a: T) -> T:
    joint = torch.cat([heads(y), rope(heads(q), c[:, None], s[:, None])], dim=1)
    return attend(rms(joint) * a, heads(v), heads(v))


@near_miss("either", "q:BLI y:BTI v:BSI c:L1C s:L1C a:SC", FP32)
def last_of_a_joint_tensor_before_tokens(q: T, y: T, v: T, c: T, s: T, a: T) -> T:
    """[B,H,S,C] with a weight for each token, which looks like one for each head."""
    joint = torch.cat([heads(y), rope(heads(q), c, s)], dim=1).transpose(1, 2)
    return attend((rms(joint) * a).transpose(1, 2), heads(v), heads(v))


@near_miss("either", "q:BLI y:BTI v:BSI c:L1C s:L1C", FP32)
def last_of_each_column_of_a_joint_tensor(q: T, y: T, v: T, c: T, s: T) -> T:
    """Over the tokens of both streams."""
    joint = torch.cat([heads(y), rope(heads(q), c, s)], dim=1).transpose(1, 3)
    return attend(rms(joint).transpose(1, 3), heads(v), heads(v))


@near_miss("either", "q:BLI y:BTI v:BSI c:L1C s:L1C", FP32)
def last_of_a_joint_tensor_over_tokens(q: T, y: T, v: T, c: T, s: T) -> T:
    """One norm of all tokens: no part can be normed alone."""
    joint = torch.cat([heads(y), rope(heads(q), c, s)], dim=1).permute(0, 2, 1, 3)
    normed = rms(joint.flatten(2)).unflatten(2, (-1, 16))
    return attend(normed.transpose(1, 2), heads(v), heads(v))
