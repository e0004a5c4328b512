"""Concatenation without a copy: kernels that write their part of a joint tensor.

``cat([norm1(text), norm1(image)], dim=1)`` of two fused results would be a copy of both. When every part of a cat is
the result of a kernel that nobody else reads, the joint buffer is allocated once and each kernel writes its rows into
it. CogVideoX and its relatives do this before attention and before the feed-forward of every block.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .calls import cat_dim, op_name

aten = torch.ops.aten


@dataclass
class Join:
    """One cat and the buffer that its parts are written into, as far as it has been written."""

    cat: fx.Node
    dim: int
    buffer: fx.Node | None = None
    missing: int = 0


@dataclass
class Part:
    """The place of one kernel's result in a joint tensor."""

    join: Join
    start: Any
    length: Any
    dims: list[int] | None = None  # the cat's, of the result's: a permute lies between the two

    @property
    def value(self) -> torch.Tensor:
        """The fake value of the rows that the kernel writes, as its result."""
        rows = self.join.cat.meta["val"].narrow(self.join.dim, self.start, self.length)
        return rows if self.dims is None else rows.permute([self.dims.index(d) for d in range(len(self.dims))])

    @property
    def offset(self) -> Any:
        """Their distance from the start of the buffer, in elements."""
        return self.start * self.join.cat.meta["val"].stride(self.join.dim)


def find(graph: fx.Graph, calls: list[fx.Node]) -> dict[tuple[fx.Node, str], Part]:
    """``{(call, result name): its place}`` for every cat that consists of results of `calls` alone."""
    results = {}
    for call in calls:
        names = [r.name or "out" for r in call.target._schema.returns]  # type: ignore[union-attr]
        if len(names) == 1:
            results[call] = (call, "out")
        else:
            results.update({u: (call, names[u.args[1]]) for u in call.users if u.target is operator.getitem})
    dims = {}
    for node, place in list(results.items()):
        permuted = next(iter(node.users), None)
        if len(node.users) == 1 and permuted.target is aten.permute.default:  # type: ignore[union-attr]
            results[permuted] = place  # type: ignore[index]
            dims[permuted] = [d % node.meta["val"].dim() for d in permuted.args[1]]  # type: ignore[union-attr]
    found: dict[tuple[fx.Node, str], Part] = {}
    for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
        parts = cat.args[0]
        if not _joinable(cat, parts, results):
            continue
        dim = cat_dim(cat)
        join = Join(cat, dim, missing=len(parts))
        start: Any = 0
        for part in parts:
            length = part.meta["val"].shape[dim]
            found[results[part]] = Part(join, start, length, dims.get(part))
            start = start + length
    return found


def _joinable(cat: fx.Node, parts: Any, results: dict[fx.Node, tuple[fx.Node, str]]) -> bool:
    value = cat.meta["val"]
    dim = cat_dim(cat)
    dense = all(a is b or a == b for a, b in zip(value.stride(), torch.empty_like(value).stride(), strict=True))
    return (
        (dim != value.dim() - 1 or all(p in results and op_name(results[p][0]) == "norm_rope" for p in parts))
        and dense
        and len(set(parts)) == len(parts)
        and all(p in results and set(p.users) == {cat} and p.meta["val"].dtype == value.dtype for p in parts)
    )
