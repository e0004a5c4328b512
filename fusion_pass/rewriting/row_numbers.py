"""Numbers of rows that kernels pick by (`matching.picks`), checked.

    table[numbers]       checked = iota(rows)[numbers]
                         kernel(..., rows=table, pick=checked)

A kernel does not look whether there is a row of a number. Inductor does where it reads a tensor by numbers: with a
device assert for one that is out of range, and counting negative ones from the end. So the numbers are read from the
list of all numbers, once for all sites, which is one small kernel, and what was an error stays one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from dkfuse.kernels.picks import NUMBERS, PICKED

from .replace import emit_like, emit_numbers

aten = torch.ops.aten
ROWS = "dkfuse_rows"  # in the meta of what was checked


def checked(graph: fx.Graph, operands: Mapping[str, fx.Node]) -> fx.Node:
    """The operand `pick` of an op, as it is where it is a mask, checked where it holds numbers of rows."""
    pick, rank = operands["pick"], operands["x"].meta["val"].dim()
    if pick.meta["val"].dtype not in NUMBERS:
        return pick
    rows = next(n.meta["val"].shape[0] for name in PICKED if (n := operands.get(name)) and n.meta["val"].dim() > rank)
    return _seen_as(graph, pick, rows)


def _seen_as(graph: fx.Graph, pick: fx.Node, rows: int) -> fx.Node:
    if pick.target is aten.unsqueeze.default:
        inner = _seen_as(graph, pick.args[0], rows)  # type: ignore[arg-type]
        return emit_like(graph, pick, inner, *pick.args[1:])
    known = [user for user in pick.users if user.meta.get(ROWS) == rows]
    return known[0] if known else _checked(graph, pick, rows)


def _checked(graph: fx.Graph, numbers: fx.Node, rows: int) -> fx.Node:
    value = numbers.meta["val"]
    with graph.inserting_after(numbers):
        found = graph.call_function(aten.index.Tensor, ())
    with graph.inserting_before(found):
        every = emit_numbers(graph, rows, value)
    found.args = (every, [numbers])
    found.meta.update({"val": value.new_empty(value.shape, dtype=torch.int64), ROWS: rows})
    return found
