"""Views of small tensors such as masks: which dim of the tensor underneath each dim of a view is."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..matching.terms import same_size
from ..rewriting.calls import bound_arguments
from ..rewriting.strides import RESHAPES

aten = torch.ops.aten
Axes = tuple[str | None, ...]
Dims = tuple["int | None", ...]

_SAME = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)


def viewed(node: fx.Node) -> tuple[fx.Node, Dims]:
    """(the tensor underneath the views that end in `node`, for each dim of `node` the dim of it that it is).

    None stands for a dim along which nothing changes: one of size 1, or an expanded one. A node that is no view, or
    one that cannot be followed, is its own tensor.
    """
    value = node.meta["val"]
    source = node.args[0] if node.op == "call_function" and node.args else None
    step = None
    if isinstance(source, fx.Node) and isinstance(source.meta.get("val"), torch.Tensor):
        step = _step(node, source.meta["val"])
    if step is None or not isinstance(source, fx.Node):
        return node, tuple(None if same_size(s, 1) else d for d, s in enumerate(value.shape))
    base, dims = viewed(source)
    return base, tuple(dims[s] if s is not None else None for s in step)


def _step(node: fx.Node, source: torch.Tensor) -> Dims | None:
    """The dim of `source` that each dim of its view `node` is; None where `node` is no view that can be followed."""
    shape, rank = node.meta["val"].shape, source.dim()
    if node.target in _SAME:
        return tuple(range(rank))
    if node.target in RESHAPES:
        return _reshaped(source.shape, shape)
    given = bound_arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    if node.target is aten.unsqueeze.default:
        dim = given["dim"] % (rank + 1)
        return (*range(dim), None, *range(dim, rank))
    if node.target in (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default):
        return _reshaped(source.shape, shape)
    if node.target is aten.permute.default:
        return tuple(d % rank for d in given["dims"])
    if node.target is aten.transpose.int:
        order = list(range(rank))
        a, b = given["dim0"] % rank, given["dim1"] % rank
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    new = len(shape) - rank
    if node.target is aten.expand.default:
        return (*[None] * new, *(None if same_size(s, 1) else d for d, s in enumerate(source.shape)))
    if node.target is aten.repeat.default:
        times = given["repeats"]
        if any(not same_size(t, 1) and not same_size(s, 1) for t, s in zip(times[new:], source.shape, strict=True)):
            return None
        return (*[None] * new, *(None if same_size(s, 1) else d for d, s in enumerate(source.shape)))
    return None


def _reshaped(before: Any, after: Any) -> Dims | None:
    """A reshape that only adds and drops dims of size 1."""
    kept = [d for d, s in enumerate(before) if not same_size(s, 1)]
    sizes = [s for s in after if not same_size(s, 1)]
    if len(kept) != len(sizes) or not all(same_size(before[d], s) for d, s in zip(kept, sizes, strict=True)):
        return None
    dims = iter(kept)
    return tuple(None if same_size(s, 1) else next(dims) for s in after)
