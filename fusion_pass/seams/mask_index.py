"""What a mask compares: the index of a key with a number of keys, which differs at most from sample to sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..matching.terms import same_size
from ..rewriting.calls import bound_arguments
from .mask_views import Axes, viewed

aten, prims = torch.ops.aten, torch.ops.prims
NARROW, INDICES = (torch.int8, torch.uint8, torch.int16), (torch.int32, torch.int64)
INTEGERS = (*NARROW, *INDICES)
KEY, BATCH = "key", "batch"
CASTS = (prims.convert_element_type.default, aten._to_copy.default)
_ARANGES = (prims.iota.default, aten.arange.default, aten.arange.start, aten.arange.start_step)


class Unproved(Exception):
    """Why a mask is not known to be about numbers of keys; `code` aggregates in reports."""

    def __init__(self, message: str, code: str = "mask"):
        super().__init__(message)
        self.message, self.code = message, code


@dataclass(frozen=True)
class KeyLengths:
    """n = max(node, low) + add; `node` is an integer tensor of one element, or of one per sample in order."""

    node: fx.Node
    low: int = 0
    add: int = 0


def varying(node: fx.Node) -> list[int]:
    """The dims of more than one place."""
    return [d for d, size in enumerate(node.meta["val"].shape) if not same_size(size, 1)]


def key_number(node: Any) -> tuple[KeyLengths, Axes]:
    """An integer tensor that differs at most from sample to sample, and where."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        raise Unproved(f"the number of keys is {node}, the same for every sample and no tensor")
    base, axes = viewed(node)
    value = base.meta["val"]
    if value.dtype not in INTEGERS:
        raise Unproved(f"the number of keys is a tensor of {value.dtype}, integers are needed")
    dims = varying(base)
    if len(dims) > 1:
        raise Unproved(f"the number of keys is a tensor {list(value.shape)}: it differs in more than the sample")
    return KeyLengths(base), tuple(BATCH if a is not None and a in dims else None for a in axes)


def key_index(node: Any) -> Axes | None:
    """The dims of an arange from 0 in steps of 1, or None for another tensor. Raises Unproved for other aranges."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    base, axes = viewed(node)
    if base.op != "call_function":
        return None
    given = bound_arguments(base) if isinstance(base.target, torch._ops.OpOverload) else {}
    if base.target in CASTS or (
        base.target is aten.slice.Tensor and given.get("start") in (None, 0) and given.get("step", 1) == 1
    ):
        inner = key_index(given.get("a", given.get("self")))
    elif base.target in _ARANGES:
        if given.get("start", 0) != 0 or given.get("step", 1) != 1:
            raise Unproved(f"{base.name} counts from {given.get('start', 0)} in steps of {given.get('step', 1)}")
        inner = (KEY,)
    else:
        return None
    if inner is not None and base.meta["val"].dtype not in INDICES:
        raise Unproved(f"{base.name} counts keys in {base.meta['val'].dtype}, int32 or int64 is needed")
    return None if inner is None else through(inner, axes)


def through(inner: Axes, axes: tuple[int | None, ...]) -> Axes:
    """Axes of a view of what has the axes `inner`; axes: the dim of it that each dim of the view is."""
    return tuple(inner[a] if a is not None else None for a in axes)


def broadcast(node: fx.Node, parts: list[Axes]) -> Axes:
    """Axes of an elementwise result."""
    rank = node.meta["val"].dim()
    found: list[str | None] = [None] * rank
    for axes in parts:
        for dim, axis in enumerate(axes, rank - len(axes)):
            if axis is not None and found[dim] not in (None, axis):
                raise Unproved(f"{node.name} has a dim that counts keys and samples at once")
            found[dim] = axis or found[dim]
    if found.count(KEY) > 1 or found.count(BATCH) > 1:
        raise Unproved(f"{node.name} differs from key to key or from sample to sample in more than one dim")
    return tuple(found)
