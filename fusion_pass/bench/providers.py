"""The implementations of an op, each as a call that the kernel bench can time.

Triton is launched as a compiled program launches it: planned once, queries and keys of all streams in one launch. Every
other provider's kernel is called with the op's arguments once per call of the op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dkfuse.kernels import registry

Call = Callable[[], Any]
TRITON = "triton"


class Refused(Exception):
    """A provider does not take this call; the message says why."""


def implementations(op: str) -> list[registry.Implementation]:
    """The implementations of `op` for NVIDIA GPUs beside Triton's and the definition."""
    return [i for i in registry.of(op) if "cuda" in i.devices and i.provider not in (TRITON, "native")]


def names(op: str) -> list[str]:
    """The providers of `op`, Triton first."""
    return [TRITON, *dict.fromkeys(i.provider for i in implementations(op))]


def filled(op: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The op's arguments by name, with the defaults of its schema."""
    import dkfuse.kernels.ops  # noqa: F401  (registers torch.ops.dkfuse)

    schema = getattr(torch.ops.dkfuse, op).default._schema
    defaults = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
    return {**defaults, **arguments}


def launcher(case: Any, provider: str, operands: Any, capability: int) -> Call:
    """`case` on `operands` by `provider`, returning the results. Raises Refused; `capability`: 90 for sm90."""
    if provider == TRITON:
        return case.launcher(operands)
    calls, results = case.calls(operands)
    bound: list[tuple[Callable[[Any, Any], None], dict[str, Any], Any]] = []
    for arguments, outputs in calls:
        complete = filled(case.op, arguments)
        chosen = _chosen(case.op, provider, complete, capability)
        try:
            bound.append((chosen.load(), complete, outputs))
        except ImportError as error:
            raise Refused(f"not installed: {error}") from error

    def call() -> Any:
        for run, arguments, outputs in bound:
            run(arguments, outputs)
        return results

    return call


def _chosen(op: str, provider: str, arguments: Mapping[str, Any], capability: int) -> registry.Implementation:
    reasons = []
    for implementation in implementations(op):
        if implementation.provider != provider:
            continue
        if not implementation.serves(f"sm{capability}"):
            reasons.append(f"not for sm{capability}")
        elif (problem := implementation.problem(arguments)) is not None:
            reasons.append(problem.message)
        else:
            return implementation
    raise Refused("; ".join(reasons) or f"no kernel for {op}")
