"""Masks read as functions of the key's index: what `key_lengths` proves its masks by."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..calls import bound_arguments
from ..compat import real_tensors
from ..terms import same_size
from .mask_views import Axes, viewed

aten, prims = torch.ops.aten, torch.ops.prims
NARROW, INDICES = (torch.int8, torch.uint8, torch.int16), (torch.int32, torch.int64)
INTEGERS = (*NARROW, *INDICES)
KEY, BATCH = "key", "batch"


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


@dataclass(frozen=True)
class Mask:
    """A tensor that is `inside` where j < n and `outside` elsewhere; `lengths` None: `inside` everywhere.

    axes: for each dim KEY or BATCH where the value depends on the place in that dim, else None.
    """

    inside: Any
    outside: Any
    lengths: KeyLengths | None
    axes: Axes


class Reader:
    """Reads the nodes of one mask, each once."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, Mask] = {}

    def read(self, node: Any) -> Mask:
        if not isinstance(node, fx.Node):
            return Mask(node, node, None, ())
        if node not in self.known:
            base, axes = viewed(node)
            found = self._computed(base)
            self.known[node] = _whole(node, replace(found, axes=_through(found.axes, axes)))
        return self.known[node]

    def _computed(self, node: fx.Node) -> Mask:
        if node.op in ("placeholder", "get_attr"):
            message = f"the mask is made of {node.name}, an input: which keys take part is not known when compiling"
            raise Unproved(message, "mask_input")
        read = _READERS.get(node.target) if node.op == "call_function" else None
        if read is None:
            raise Unproved(f"the mask is computed by {node.target}, which says nothing of a number of keys")
        return read(self, node, bound_arguments(node))

    # -- ops -----------------------------------------------------------------------------------------------------------

    def constant(self, node: fx.Node, given: dict[str, Any]) -> Mask:
        value = node.meta["val"]
        number = given.get("fill_value", given.get("s", given.get("value", _ONES.get(node.target))))
        if not isinstance(number, (bool, int, float)):
            raise Unproved(f"{node.name} is filled with {number}, which is no known number")
        number = cast(number, value.dtype)
        return Mask(number, number, None, (None,) * value.dim())

    def where(self, node: fx.Node, given: dict[str, Any]) -> Mask:
        parts = [self.read(given[n]) for n in ("condition", "self", "other")]
        return self._combined(node, parts, lambda condition, a, b: a if condition else b)

    def masked_fill(self, node: fx.Node, given: dict[str, Any]) -> Mask:
        parts = [self.read(given[n]) for n in ("mask", "value", "self")]
        return self._combined(node, parts, lambda condition, a, b: a if condition else b)

    def negated(self, node: fx.Node, given: dict[str, Any]) -> Mask:
        return self._combined(node, [self._boolean(given["self"])], operator.not_)

    def joined(self, node: fx.Node, given: dict[str, Any]) -> Mask:
        both = "and" in str(node.target)
        parts = [self._boolean(given[n]) for n in ("self", "other")]
        return self._combined(node, parts, (lambda a, b: a and b) if both else (lambda a, b: a or b))

    def converted(self, node: fx.Node, given: dict[str, Any]) -> Mask:
        return self._combined(node, [self.read(given.get("a", given.get("self")))], lambda a: a)

    def cut(self, node: fx.Node, given: dict[str, Any]) -> Mask:
        """The first so many keys: the same function of j, of fewer of them."""
        if given.get("start") not in (None, 0) or given.get("step", 1) != 1:
            raise Unproved(f"{node.name} takes a part of the mask that does not start at the first key")
        source = given["self"]
        dim = given.get("dim", 0) % node.meta["val"].dim()
        padded: dict[str, Any] = {"pad": [1]}
        if source.target is aten.constant_pad_nd.default:
            padded = bound_arguments(source)
        last = dim == node.meta["val"].dim() - 1 and padded["pad"][0] == 0 and len(padded["pad"]) == 2
        if last and same_size(node.meta["val"].shape[-1], padded["self"].meta["val"].shape[-1]):
            source = padded["self"]  # padded for its alignment, and cut back
        found = self.read(source)
        if found.axes[dim] == BATCH and not same_size(node.meta["val"].shape[dim], source.meta["val"].shape[dim]):
            raise Unproved(f"{node.name} takes a part of the samples")
        return found

    def concatenated(self, node: fx.Node, given: dict[str, Any]) -> Mask:
        """Keys that all take part, then keys of which the first n do."""
        *before, last = (self.read(t) for t in given["tensors"])
        dim = given.get("dim", 0) % node.meta["val"].dim()
        sizes = [t.meta["val"].shape[dim] for t in given["tensors"][:-1]]
        return self._shifted(node, before, last, dim, sum(sizes))

    def padded(self, node: fx.Node, given: dict[str, Any]) -> Mask:
        before, *others = given["pad"] or (0,)
        if any(not same_size(p, 0) for p in others):
            raise Unproved(f"{node.name} pads the mask by {list(given['pad'])}: only keys before it may be added")
        number = cast(given.get("value", 0), node.meta["val"].dtype)
        front = Mask(number, number, None, (None,) * node.meta["val"].dim())
        return self._shifted(node, [front], self.read(given["self"]), node.meta["val"].dim() - 1, before)

    def compared(self, node: fx.Node, given: dict[str, Any]) -> Mask:
        """`arange < n` and what means the same; j <= n is j < n + 1."""
        name = str(node.target).split(".")[1]
        left, right = given["self"], given["other"]
        index = _index(left)
        if index is None:
            index, right, name = _index(right), left, {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}[name]
        if index is None or KEY not in index:
            raise Unproved(f"{node.name} compares {left} with {right}, neither is an arange of the keys")
        add = 1 if name in ("le", "gt") else 0
        inside = name in ("lt", "le")
        lengths, axes = _number(right)
        common = torch.result_type(given["self"].meta["val"], given["other"].meta["val"])
        if common.itemsize < right.meta["val"].dtype.itemsize:
            raise Unproved(f"{node.name} compares in {common}, which need not hold {right}")
        return Mask(inside, not inside, replace(lengths, low=-add, add=add), _broadcast(node, [index, axes]))

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _boolean(self, node: Any) -> Mask:
        found = self.read(node)
        if not isinstance(found.inside, bool) or not isinstance(found.outside, bool):
            raise Unproved(f"{node} is no boolean mask")
        return found

    def _combined(self, node: fx.Node, parts: list[Mask], function: Callable[..., Any]) -> Mask:
        """An elementwise function of masks, all of the same numbers of keys."""
        counts = {p.lengths for p in parts if p.lengths is not None}
        if len(counts) > 1:
            raise Unproved(f"{node.name} puts masks of different numbers of keys together")
        dtype = node.meta["val"].dtype
        inside, outside = (cast(function(*(getattr(p, s) for p in parts)), dtype) for s in ("inside", "outside"))
        return Mask(inside, outside, next(iter(counts), None), _broadcast(node, [p.axes for p in parts]))

    def _shifted(self, node: fx.Node, before: list[Mask], last: Mask, dim: int, by: Any) -> Mask:
        if any(p.lengths is not None for p in before) or last.lengths is None or last.axes[dim] != KEY:
            raise Unproved(f"{node.name} is no join of keys that all take part and then counted ones")
        if any(p.inside is not last.inside and p.inside != last.inside for p in before):
            raise Unproved(f"{node.name} joins keys that do not take part before the counted ones")
        if not isinstance(by, int):
            raise Unproved(f"{node.name} puts {by} keys before the counted ones, which is no known number")
        if by < 0:
            raise Unproved(f"{node.name} drops the first keys of a mask")
        # at least no key of `last` takes part: its number counts from 0, whatever it is
        dtype, lengths = node.meta["val"].dtype, replace(last.lengths, add=last.lengths.add + by)
        return replace(last, inside=cast(last.inside, dtype), outside=cast(last.outside, dtype), lengths=lengths)


def _whole(node: fx.Node, mask: Mask) -> Mask:
    """`mask`, if it still tells all keys and all samples apart: the answer for one of them is another function."""
    if mask.lengths is not None:
        samples = BATCH if varying(mask.lengths.node) else None
        if KEY not in mask.axes or (samples is not None and samples not in mask.axes):
            raise Unproved(f"{node.name} holds the mask of one key or of one sample")
    return mask


def varying(node: fx.Node) -> list[int]:
    return [d for d, size in enumerate(node.meta["val"].shape) if not same_size(size, 1)]


def _number(node: Any) -> tuple[KeyLengths, Axes]:
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


def _index(node: Any) -> Axes | None:
    """The dims of an arange from 0 in steps of 1, or None for another tensor. Raises Unproved for other aranges."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    base, axes = viewed(node)
    if base.op != "call_function":
        return None
    given = bound_arguments(base) if isinstance(base.target, torch._ops.OpOverload) else {}
    if base.target in _CASTS or (
        base.target is aten.slice.Tensor and given.get("start") in (None, 0) and given.get("step", 1) == 1
    ):
        inner = _index(given.get("a", given.get("self")))
    elif base.target in _ARANGES:
        if given.get("start", 0) != 0 or given.get("step", 1) != 1:
            raise Unproved(f"{base.name} counts from {given.get('start', 0)} in steps of {given.get('step', 1)}")
        inner = (KEY,)
    else:
        return None
    if inner is not None and base.meta["val"].dtype not in INDICES:
        raise Unproved(f"{base.name} counts keys in {base.meta['val'].dtype}, int32 or int64 is needed")
    return None if inner is None else _through(inner, axes)


def _through(inner: Axes, axes: tuple[int | None, ...]) -> Axes:
    """Axes of a view of what has the axes `inner`; axes: the dim of it that each dim of the view is."""
    return tuple(inner[a] if a is not None else None for a in axes)


def _broadcast(node: fx.Node, parts: list[Axes]) -> Axes:
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


def cast(number: Any, dtype: torch.dtype) -> Any:
    """`number` as a tensor of this dtype holds it: the least fp32 number is -inf in bf16."""
    with real_tensors():
        exact = torch.float64 if isinstance(number, float) else None
        return torch.tensor(number, dtype=exact).to(dtype).item()


_ONES = {aten.ones.default: 1, aten.zeros.default: 0, aten.ones_like.default: 1, aten.zeros_like.default: 0}
_CASTS = (prims.convert_element_type.default, aten._to_copy.default)
_ARANGES = (prims.iota.default, aten.arange.default, aten.arange.start, aten.arange.start_step)
_READERS: dict[Any, Callable[[Reader, fx.Node, dict[str, Any]], Mask]] = {
    **dict.fromkeys(_ONES, Reader.constant),
    **dict.fromkeys((aten.full.default, aten.full_like.default, aten.scalar_tensor.default), Reader.constant),
    aten.where.self: Reader.where,
    aten.where.ScalarOther: Reader.where,
    aten.where.ScalarSelf: Reader.where,
    aten.where.Scalar: Reader.where,
    aten.masked_fill.Scalar: Reader.masked_fill,
    aten.masked_fill.Tensor: Reader.masked_fill,
    aten.logical_not.default: Reader.negated,
    aten.bitwise_not.default: Reader.negated,
    aten.logical_and.default: Reader.joined,
    aten.logical_or.default: Reader.joined,
    aten.bitwise_and.Tensor: Reader.joined,
    aten.bitwise_or.Tensor: Reader.joined,
    **dict.fromkeys(_CASTS, Reader.converted),
    aten.slice.Tensor: Reader.cut,
    aten.cat.default: Reader.concatenated,
    aten.constant_pad_nd.default: Reader.padded,
    **{getattr(getattr(aten, n), o): Reader.compared for n in ("lt", "le", "gt", "ge") for o in ("Tensor", "Scalar")},
}
