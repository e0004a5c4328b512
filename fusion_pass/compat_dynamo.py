"""What Dynamo does with the floats of a module, by parts of torch that have no promise."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from .compat import is_fake


def is_float_of_a_module(node: fx.Node) -> bool:
    """Whether a placeholder of Dynamo's graph is a float, an attribute of a module, that Dynamo made a tensor."""
    value, given = node.meta.get("example_value"), node.meta.get("grapharg")
    if not is_fake(value) or getattr(value, "item_memo", None) is None or given is None:
        return False
    of_a_module = getattr(given.source.guard_source, "is_unspecialized_nn_module", lambda: False)
    return hasattr(value.item_memo.node._expr, "name") and of_a_module()


def value_of(node: fx.Node) -> float | None:
    """What such a float was in the example inputs."""
    return getattr(node.meta["example_value"].item_memo.node, "hint", None)


def restart_with_constants(nodes: Iterable[fx.Node]) -> None:
    """Have Dynamo trace anew with the values of such floats, which it guards. Nothing where torch has no such way."""
    try:
        from torch._dynamo.exc import TensorifyScalarRestartAnalysis
        from torch._dynamo.symbolic_convert import TensorifyState
    except ImportError:
        return
    names = [node.meta["example_value"].item_memo.node._expr.name for node in nodes]
    if all(map(TensorifyState.should_specialize, names)):
        return  # it was asked to already
    for name in names:
        TensorifyState.specialize(name)
    raise TensorifyScalarRestartAnalysis
