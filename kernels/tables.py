"""Rows added to gates, scales and shifts: models that modulate per token add a learned scale-shift table to each token.

    operand  [..., D], as without a table: of each token, say
    table    broadcasts to x like any parameter: a row of the model's ``scale_shift_table``
    value    operand + table, in fp32, not rounded

``{name}_table`` belongs to the operand `name`. The sums, one row for every token, need not be written to memory, and
the operand is read in its own dtype. With `pick` a table is added to the row that was picked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .unsupported import Unsupported

TABLED = ("gate", "scale", "shift", "scale2", "shift2")


def table_of(name: str) -> str:
    """The argument that is added to the operand `name`."""
    return f"{name}_table"


TABLES = tuple(map(table_of, TABLED))


def table_problem(arguments: Mapping[str, Any]) -> Unsupported | None:
    """A table without what it is added to; also the ops' own error."""
    for name in TABLED:
        if arguments.get(table_of(name)) is not None and arguments.get(name) is None:
            return Unsupported("table", f"{table_of(name)} is given but {name} is not; pass the row as {name} itself.")
    return None


def tabled(arguments: dict[str, Any], compute: torch.dtype) -> dict[str, Any]:
    """The arguments with every table added to its operand, in plain torch."""
    values = {
        name: arguments[name].to(compute) + arguments[table_of(name)].to(compute)
        for name in TABLED
        if arguments.get(table_of(name)) is not None
    }
    return {**arguments, **values}
