"""Who can run an op, and what each of them takes.

An `Implementation` is one provider's kernel for one op: its constraints as data, which the command line prints, and the
name of the function that runs it, which is imported when it is first needed. The function writes into tensors it is
given:

    run(arguments, outputs)     arguments: the op's arguments by name, tensors or values, defaults filled in
                                outputs: result name -> tensor of the result's shape, inner stride 1, any outer strides;
                                a result that nobody reads is absent

on the current stream, without synchronising, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .unsupported import Unsupported


@dataclass(frozen=True)
class Constraint:
    """One thing that a kernel asks of a call. `text` is what the command line prints: "D % 256 == 0, D <= 8192".

    problem: what is wrong with a call, in one sentence that names the value, or None. It sees tensor-likes (also fake
    ones, with symbolic sizes) and must not guard on a symbol.
    """

    code: str
    text: str
    problem: Callable[[Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class Implementation:
    """`provider`'s kernel for `op`, for compute capabilities from `oldest` on (80, 90, ...)."""

    op: str
    provider: str
    constraints: tuple[Constraint, ...]
    run: str  # "dkfuse.kernels.cute_norm:run"
    oldest: int = 80
    newest: int | None = None

    def problem(self, arguments: Mapping[str, Any]) -> Unsupported | None:
        """The first constraint that the call breaks."""
        for constraint in self.constraints:
            if (message := constraint.problem(arguments)) is not None:
                return Unsupported(constraint.code, message)
        return None

    def load(self) -> Callable[[Mapping[str, Any], Mapping[str, Any]], None]:
        """The function that runs it; ImportError where the provider's package is missing or broken."""
        module, name = self.run.split(":")
        return getattr(importlib.import_module(module), name)
