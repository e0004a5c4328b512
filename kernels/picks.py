"""Rows picked per token: gate, scale and shift may hold several rows, and `pick` says which one a token takes.

    operand  [rows, ...], one dim more than x; each part broadcasts to x
    pick     [..., 1], broadcasts to x: bool, or the number of a row, int32 or int64, from 0 to rows - 1
    value    torch.where(pick, operand[0], operand[1])      of two rows, by a bool
             operand[pick]                                  for each token, of any number of them

As Qwen-Image-Edit modulates the tokens of its reference images (bool), and MiniMax-H3 those of text, video and audio at
two timesteps (numbers): the picked values, one row for every token, need not be written to memory. The kernels add the
number of the row times the stride of the first dim to an operand's address, and do not look whether there is one: that
is for who makes `pick`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .unsupported import Unsupported

PICKED = ("gate", "scale", "shift", "scale2", "shift2")
NUMBERS = (torch.int32, torch.int64)


def has_rows(name: str, arguments: Mapping[str, Any]) -> bool:
    """True where the operand holds rows to pick from."""
    operand = arguments.get(name) if name in PICKED and arguments.get("pick") is not None else None
    return operand is not None and operand.dim() == arguments["x"].dim() + 1


def first_rows(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments with the first of all rows: what all checks of shapes and strides are about."""
    names = [name for name in PICKED if has_rows(name, arguments)]
    return {**arguments, **{name: arguments[name][0] for name in names}} if names else arguments


def pick_problem(arguments: Mapping[str, Any], known: bool = True) -> Unsupported | None:
    """What is wrong with `pick` and the rows; also the ops' own error, which lets pass what is not `known`."""

    def is_not(size: Any, wanted: int) -> bool:
        return not statically_known_true(size == wanted) if known else statically_known_true(size != wanted)

    pick = arguments.get("pick")
    if pick is None:
        return None
    if pick.dtype not in (torch.bool, *NUMBERS):
        text = "use bool, true where a token takes the first of two rows, or the number of its row, int32 or int64"
        return Unsupported("pick", f"pick has dtype {pick.dtype}; {text}.")
    if pick.dim() > 0 and is_not(pick.shape[-1], 1):
        return Unsupported(
            "pick", f"pick has shape {tuple(pick.shape)}; its last dim must be 1, a row is picked whole."
        )
    names = [name for name in PICKED if has_rows(name, arguments)]
    for name in names:
        shape, first = tuple(arguments[name].shape), tuple(arguments[names[0]].shape)
        if pick.dtype == torch.bool and is_not(shape[0], 2):
            return Unsupported("pick", f"{name} has shape {shape}; pick chooses between two rows, in a first dim of 2.")
        if is_not(shape[0], first[0]) or is_not(shape[0] > 0, True):
            text = f"{name} has {shape[0]} rows, {names[0]} {first[0]}; pick chooses one of equally many, at least one"
            return Unsupported("pick", f"{text}.")
    return None


def picked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with all rows resolved, in plain torch."""
    names = [name for name in PICKED if has_rows(name, arguments)]
    return {**arguments, **{name: _taken(arguments[name], arguments["pick"], arguments["x"]) for name in names}}


def _taken(rows: torch.Tensor, pick: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if pick.dtype == torch.bool:
        return torch.where(pick, rows[0], rows[1])
    numbers = pick.long().expand(1, *x.shape[:-1], rows.shape[-1])
    return rows.expand(rows.shape[0], *x.shape[:-1], rows.shape[-1]).gather(0, numbers)[0]
