"""New strides of a value, carried to what is computed from it, so that later passes read them as facts.

A copy that only made its input contiguous is dropped where the input now is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compat import statically_known_true

aten = torch.ops.aten


def spread(node: fx.Node) -> None:
    """Recompute the fake values behind `node`, as far as their strides change, and drop copies that became no-ops."""
    waiting = list(node.users)
    while waiting:
        user = waiting.pop(0)
        if user.op != "call_function" or not isinstance(user.meta.get("val"), torch.Tensor):
            continue
        if user.target is aten.clone.default and _needless(user):
            source = user.args[0]
            waiting = [*user.users, *(w for w in waiting if w is not user)]
            user.replace_all_uses_with(source)  # type: ignore[arg-type]
            user.graph.erase_node(user)
            continue
        if user.target is aten.view.default:  # need not be possible any more
            user.target = aten.reshape.default
        before = user.meta["val"]
        if not isinstance(user.target, torch._ops.OpOverload):
            continue
        with before.fake_mode:
            after = user.target(*_values(user.args), **_values(user.kwargs))
        if not _same(before.stride(), after.stride()):
            user.meta["val"] = after
            waiting += [u for u in user.users if u not in waiting]


def _needless(clone: fx.Node) -> bool:
    """Whether a copy to contiguous memory reads contiguous memory, and nobody could tell the two apart."""
    source = clone.args[0]
    return (
        clone.kwargs.get("memory_format") is torch.contiguous_format
        and isinstance(source, fx.Node)
        and source.op == "call_function"
        and all(user.op == "call_function" for user in clone.users)
        and _same(source.meta["val"].stride(), clone.meta["val"].stride())
    )


def _same(ours: Any, theirs: Any) -> bool:
    return len(ours) == len(theirs) and all(statically_known_true(a == b) for a, b in zip(ours, theirs, strict=True))


def _values(arguments: Any) -> Any:
    return fx.map_arg(arguments, lambda n: n.meta["val"])
