"""Rows picked per token: gate, scale and shift may hold two rows, and `pick` says which one a token takes.

    operand  [2, ...], one dim more than x; each part broadcasts to x
    pick     bool, [..., 1], broadcasts to x
    value    torch.where(pick, operand[0], operand[1])

As Qwen-Image-Edit modulates the tokens of its reference images: the picked values, one row for every token, need not be
written to memory. The kernels add ``pick ? 0 : stride of the first dim`` to an operand's address.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .unsupported import Unsupported

PICKED = ("gate", "scale", "shift", "scale2", "shift2")


def is_pair(name: str, arguments: Mapping[str, Any]) -> bool:
    """True where the operand holds two rows to pick from."""
    operand = arguments.get(name) if name in PICKED and arguments.get("pick") is not None else None
    return operand is not None and operand.dim() == arguments["x"].dim() + 1


def first_rows(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments with the first part of every pair: what all checks of shapes and strides are about."""
    pairs = [name for name in PICKED if is_pair(name, arguments)]
    return {**arguments, **{name: arguments[name][0] for name in pairs}} if pairs else arguments


def pick_problem(arguments: Mapping[str, Any], known: bool = True) -> Unsupported | None:
    """What is wrong with `pick` and the pairs; also the ops' own error, which lets pass what is not `known`."""

    def is_not(size: Any, wanted: int) -> bool:
        return not statically_known_true(size == wanted) if known else statically_known_true(size != wanted)

    pick = arguments.get("pick")
    if pick is None:
        return None
    if pick.dtype != torch.bool:
        return Unsupported("pick", f"pick has dtype {pick.dtype}; use bool, true where a token takes the first row.")
    if pick.dim() > 0 and is_not(pick.shape[-1], 1):
        return Unsupported(
            "pick", f"pick has shape {tuple(pick.shape)}; its last dim must be 1, a row is picked whole."
        )
    for name in PICKED:
        if is_pair(name, arguments) and is_not(arguments[name].shape[0], 2):
            shape = tuple(arguments[name].shape)
            return Unsupported("pick", f"{name} has shape {shape}; pick chooses between two rows, in a first dim of 2.")
    return None


def picked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with every pair resolved, in plain torch."""
    values = {
        name: torch.where(arguments["pick"], arguments[name][0], arguments[name][1])
        for name in PICKED
        if is_pair(name, arguments)
    }
    return {**arguments, **values}
