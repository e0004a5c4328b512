"""The strides of a result that another kernel computes now, carried on; copies that they make needless go."""

from __future__ import annotations

import torch
from torch import fx

from ..rewriting.strides import propagate, same_layout

aten = torch.ops.aten


def spread(node: fx.Node) -> None:
    """`propagate` from `node` on, and drop each copy that only made its input contiguous where the input now is."""
    propagate(node, instead=_source_of_needless_copy)


def _source_of_needless_copy(clone: fx.Node) -> fx.Node | None:
    """What a copy to contiguous memory reads, if that is contiguous memory and nobody could tell the two apart."""
    if clone.target is not aten.clone.default or clone.kwargs.get("memory_format") is not torch.contiguous_format:
        return None
    source = clone.args[0]
    needless = (
        isinstance(source, fx.Node)
        and source.op == "call_function"
        and all(user.op == "call_function" for user in clone.users)
        and same_layout(source.meta["val"], clone.meta["val"])
    )
    return source if needless else None  # type: ignore[return-value]
