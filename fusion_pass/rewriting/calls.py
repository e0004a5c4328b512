"""What an op call in a graph says: its arguments and results by name."""

from __future__ import annotations

from typing import Any

from torch import fx


def bound_arguments(call: fx.Node) -> dict[str, Any]:
    """The arguments of an op call by name."""
    names = [a.name for a in call.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def result_names(call: fx.Node) -> list[str]:
    """The names of an op's results; a single result is called "out"."""
    return [r.name or "out" for r in call.target._schema.returns]  # type: ignore[union-attr]


def cat_dim(cat: fx.Node) -> int:
    """The dim that an `aten.cat` joins along, counted from the first."""
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    return dim % cat.meta["val"].dim()  # type: ignore[operator]


def op_name(call: fx.Node) -> str:
    """The op's name without its namespace."""
    return call.target._schema.name.split("::")[1]  # type: ignore[union-attr]


def replace_results(graph: fx.Graph, call: fx.Node, names: list[str], items: dict[str, fx.Node]) -> None:
    """Put `items`, by result name, in the place of the call's results, and remove the call."""
    if len(names) == 1:
        call.replace_all_uses_with(items[names[0]])
    else:
        for user in list(call.users):
            user.replace_all_uses_with(items[names[user.args[1]]])  # type: ignore[index]
            graph.erase_node(user)
    graph.erase_node(call)
