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

aten = torch.ops.aten


@dataclass
class Join:
    """One cat and the buffer that its parts are written into, as far as it has been written."""

    cat: fx.Node
    dim: int
    buffer: fx.Node | None = None
    missing: int = 0

    def part(self, start: Any, length: Any) -> torch.Tensor:
        """The fake value of the rows that one kernel writes."""
        return self.cat.meta["val"].narrow(self.dim, start, length)

    def offset(self, start: Any) -> Any:
        """Their distance from the start of the buffer, in elements."""
        return start * self.cat.meta["val"].stride(self.dim)


@dataclass
class Part:
    """The place of one kernel's result in a joint tensor."""

    join: Join
    start: Any
    length: Any


def find(graph: fx.Graph, calls: list[fx.Node]) -> dict[tuple[fx.Node, str], Part]:
    """``{(call, result name): its place}`` for every cat that consists of results of `calls` alone."""
    results = {}
    for call in calls:
        names = [r.name or "out" for r in call.target._schema.returns]  # type: ignore[union-attr]
        if len(names) == 1:
            results[call] = (call, "out")
        else:
            results.update({u: (call, names[u.args[1]]) for u in call.users if u.target is operator.getitem})
    found: dict[tuple[fx.Node, str], Part] = {}
    for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
        parts = cat.args[0]
        if not _joinable(cat, parts, results):
            continue
        value = cat.meta["val"]
        dim = (cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)) % value.dim()
        join = Join(cat, dim, missing=len(parts))
        start: Any = 0
        for part in parts:
            length = part.meta["val"].shape[dim]
            found[results[part]] = Part(join, start, length)
            start = start + length
    return found


def _joinable(cat: fx.Node, parts: Any, results: dict[fx.Node, tuple[fx.Node, str]]) -> bool:
    value = cat.meta["val"]
    dim = (cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)) % value.dim()
    dense = all(a is b or a == b for a, b in zip(value.stride(), torch.empty_like(value).stride(), strict=True))
    return (
        (dim != value.dim() - 1 or all(str(p.target) == "dkfuse.norm_rope.default" for p in parts))
        and dense
        and len(set(parts)) == len(parts)
        and all(p in results and set(p.users) == {cat} and p.meta["val"].dtype == value.dtype for p in parts)
    )
