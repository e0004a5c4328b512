"""Segments of tokens that are computed alike, with rows of their own, as one value with rows that are picked.

    cat([f(h[:, :i], a), f(h[:, i:], b)], 1)   ->   f(h, where(token < i, a, b))       a, b one row for all tokens

As ComfyUI modulates the tokens of Qwen-Image-Edit's reference images: a norm of all tokens is modulated in two parts,
and so is what a gate multiplies. Kernels read the rows as `matching.picks` has it. That is kept if sites are gained
(`picked.undo`). No value changes by a bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..matching.gain import is_elementwise
from ..matching.terms import same_shape, same_size
from .calls import cat_dim
from .picked import Picks, undo
from .replace import copy_origin, emit, emit_like, emit_numbers

aten = torch.ops.aten
DEPTH = 8  # ops from the cat to the slices: casts, factors and sums of a modulation


def as_picks(graph: fx.Graph) -> Picks:
    """Rewrite every such cat of two segments; the cats, which stay, unread, and what took their places."""
    found: Picks = []
    masks: dict[tuple[Any, ...], fx.Node] = {}
    for cat in list(graph.find_nodes(op="call_function", target=aten.cat.default)):
        parts, dim = cat.args[0], cat_dim(cat)
        if not (isinstance(parts, (list, tuple)) and len(parts) == 2 and cat.users and parts[0] is not parts[1]):
            continue
        if not 0 < dim < cat.meta["val"].dim() - 1 or not all(is_elementwise(part) for part in parts):
            continue
        merge = _Merge(graph, cat, dim, masks)
        if merge.possible(*parts) and merge.rows and merge.slices:
            with graph.inserting_before(cat):
                whole = merge.emitted(*parts)
            if same_shape(whole.meta["val"].shape, cat.meta["val"].shape) and _same_dtype(whole, cat):
                cat.replace_all_uses_with(whole)
                found.append((cat, whole))
            else:
                undo(graph, [(cat, whole)])
                for key in [key for key, mask in masks.items() if not mask.users]:  # which went too
                    del masks[key]
    return found


def _same_dtype(a: fx.Node, b: fx.Node) -> bool:
    return a.meta["val"].dtype == b.meta["val"].dtype


class _Merge:
    """The two parts of one cat along `dim`: what they have in common, and what differs."""

    def __init__(self, graph: fx.Graph, cat: fx.Node, dim: int, masks: dict[tuple[Any, ...], fx.Node]):
        self.graph, self.cat, self.dim = graph, cat, dim
        self.masks = masks  # of all cats, by their segments: sites of one mask only can be one
        self.first = cat.args[0][0].meta["val"].shape[dim]  # type: ignore[union-attr, index]
        self.whole = cat.meta["val"].shape[dim]
        self.rows = self.slices = 0  # how many pairs of each there are
        self.made: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.picked: set[tuple[fx.Node, fx.Node]] = set()  # rows that are not the same function of other rows

    def possible(self, a: Any, b: Any, depth: int = DEPTH) -> bool:
        """Whether `a` and `b` are the two parts of one value."""
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return type(a) is type(b) and a == b
        if self._sliced(a, b) is not None:
            self.slices += 1
            return True
        if a is b and self._is_row(a):
            return True
        if (
            self._alike(a, b)
            and depth
            and all(self.possible(c, d, depth - 1) for c, d in zip(a.args, b.args, strict=True))
        ):
            return True
        if not (self._is_row(a) and self._is_row(b) and _same_dtype(a, b)):
            return False
        shapes = [node.meta["val"].shape for node in (a, b)]
        if not shapes[0] or not same_shape(*shapes):  # a number among tensors would not count for the dtype, a row does
            return False
        self.picked.add((a, b))
        self.rows += 1
        return True

    def _alike(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether both are the same function of single values; what is no row is not read by anybody else."""
        same = a.target is b.target and is_elementwise(a) and a.kwargs == b.kwargs and len(a.args) == len(b.args)
        return same and (self._is_row(a) or len(a.users) == len(b.users) == 1)

    def emitted(self, a: Any, b: Any) -> Any:
        """The one value that `a` and `b` are parts of."""
        if not isinstance(a, fx.Node) or (a is b and self._is_row(a)):
            return a
        if (base := self._sliced(a, b)) is not None:
            return base
        if (a, b) not in self.made:
            if (a, b) in self.picked:
                self.made[a, b] = emit(self.graph, aten.where.self, self._first_tokens(), a, b)
                copy_origin(a, self.made[a, b])
            else:
                args = [self.emitted(c, d) for c, d in zip(a.args, b.args, strict=True)]
                self.made[a, b] = emit_like(self.graph, a, *args)
        return self.made[a, b]

    def _is_row(self, node: fx.Node) -> bool:
        """Whether there is one row for all tokens of a segment."""
        value, behind = node.meta.get("val"), self.cat.meta["val"].dim() - self.dim
        if not isinstance(value, torch.Tensor):
            return False
        return value.dim() < behind or same_size(value.shape[-behind], 1)

    def _sliced(self, a: fx.Node, b: fx.Node) -> fx.Node | None:
        """What both are cut from, the first at the beginning and the second behind it, to the end."""
        if not a.target is b.target is aten.slice.Tensor or a.args[0] is not b.args[0]:
            return None
        base = a.args[0]
        value = base.meta["val"]  # type: ignore[union-attr]
        if value.dim() != self.cat.meta["val"].dim() or not same_size(value.shape[self.dim], self.whole):
            return None
        cuts = [(*node.args[1:], *(0, 0, None, 1)[len(node.args) - 1 :]) for node in (a, b)]
        (dim, start, middle, step), (other, begin, end, stride) = cuts
        if not dim % value.dim() == other % value.dim() == self.dim or (start, step, stride) != (0, 1, 1):
            return None
        known = all(isinstance(n, int) for n in (middle, begin, end, self.whole))
        return base if known and middle == begin == self.first and end >= self.whole else None  # type: ignore

    def _first_tokens(self) -> fx.Node:
        """True for the tokens of the first segment, along `dim`, for all columns."""
        like = self.cat.meta["val"]
        key = (self.first, self.whole, like.dim() - self.dim, like.device)
        if key not in self.masks:
            mask = emit(self.graph, aten.lt.Scalar, emit_numbers(self.graph, self.whole, like), self.first)
            for _ in range(like.dim() - self.dim - 1):
                mask = emit(self.graph, aten.unsqueeze.default, mask, -1)
            self.masks[key] = mask
        return self.masks[key]
