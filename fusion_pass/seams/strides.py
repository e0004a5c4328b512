"""The strides of a result that another kernel computes now: who would mind, and the same carried on."""

from __future__ import annotations

import torch
from torch import fx

from ..rewriting.strides import RESHAPES, propagate, same_layout

aten = torch.ops.aten

VIEWS = {
    aten.permute.default, aten.t.default, aten.transpose.int, aten.slice.Tensor, aten.select.int,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
    aten.alias.default, aten.detach.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
}  # fmt: skip


def copying_reader(pending: list[tuple[fx.Node, torch.Tensor]], readers: set[fx.Node]) -> fx.Node | None:
    """A reader that could not read the new values of nodes in place; the others' first ops go to `readers`.

    pending: nodes with the values, of other strides, that they would have.
    """
    pending = list(pending)
    while pending:
        node, value = pending.pop()
        for user in node.users:
            if user.op != "call_function":
                continue
            if user.target in RESHAPES:
                try:
                    pending.append((user, value.view(user.meta["val"].shape)))
                except (RuntimeError, ValueError):  # fake tensors raise the latter
                    return user
            elif user.target in VIEWS:
                args = [value if a is node else fx.map_arg(a, lambda n: n.meta["val"]) for a in user.args]
                result = user.target(*args, **user.kwargs)  # type: ignore[operator]
                parts = result if isinstance(result, (tuple, list)) else None
                if parts is None:
                    pending.append((user, result))
                else:
                    pending += [(item, parts[item.args[1]]) for item in user.users]  # type: ignore[misc,index]
            elif not isinstance(user.target, torch._ops.OpOverload) or user.target is aten.as_strided.default:
                return user
            elif user.target.namespace not in ("aten", "prims", "dkfuse"):
                return user  # it may insist on the strides that it had
            else:
                readers.add(user)
    return None


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
