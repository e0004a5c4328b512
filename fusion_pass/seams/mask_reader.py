"""Masks read as functions of the key's index: what `key_lengths` proves its masks by."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..compat import real_tensors
from ..matching.terms import same_size
from ..rewriting.calls import bound_arguments
from .mask_index import BATCH, CASTS, KEY, KeyLengths, Unproved, broadcast, key_index, key_number, through, varying
from .mask_views import Axes, viewed

aten, prims = torch.ops.aten, torch.ops.prims


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
            self.known[node] = _whole(node, replace(found, axes=through(found.axes, axes)))
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
        index = key_index(left)
        if index is None:
            index, right, name = key_index(right), left, {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}[name]
        if index is None or KEY not in index:
            raise Unproved(f"{node.name} compares {left} with {right}, neither is an arange of the keys")
        add = 1 if name in ("le", "gt") else 0
        inside = name in ("lt", "le")
        lengths, axes = key_number(right)
        common = torch.result_type(given["self"].meta["val"], given["other"].meta["val"])
        if common.itemsize < right.meta["val"].dtype.itemsize:
            raise Unproved(f"{node.name} compares in {common}, which need not hold {right}")
        return Mask(inside, not inside, replace(lengths, low=-add, add=add), broadcast(node, [index, axes]))

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
        return Mask(inside, outside, next(iter(counts), None), broadcast(node, [p.axes for p in parts]))

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


def cast(number: Any, dtype: torch.dtype) -> Any:
    """`number` as a tensor of this dtype holds it: the least fp32 number is -inf in bf16."""
    with real_tensors():
        exact = torch.float64 if isinstance(number, float) else None
        return torch.tensor(number, dtype=exact).to(dtype).item()


_ONES = {aten.ones.default: 1, aten.zeros.default: 0, aten.ones_like.default: 1, aten.zeros_like.default: 0}
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
    **dict.fromkeys(CASTS, Reader.converted),
    aten.slice.Tensor: Reader.cut,
    aten.cat.default: Reader.concatenated,
    aten.constant_pad_nd.default: Reader.padded,
    **{getattr(getattr(aten, n), o): Reader.compared for n in ("lt", "le", "gt", "ge") for o in ("Tensor", "Scalar")},
}
