"""Every op as its definition in plain torch: fp32, rounded once. Compiled programs inline it for Inductor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .registry import DEVICES, Implementation
from .support import OPERANDS


def run(op: str, arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Compute the definition and copy it into `outputs`."""
    from .ops import reference_outputs

    for name, value in reference_outputs(op, dict(arguments)).items():
        if name in outputs:
            outputs[name].copy_(value)


IMPLEMENTATIONS: tuple[Implementation, ...] = tuple(
    Implementation(op, "native", (), f"dkfuse.kernels.provider_native:{op}", oldest=0, devices=DEVICES)
    for op in OPERANDS
)


def __getattr__(name: str) -> Any:
    """The function that `run` entries name: of each op, with its arguments and outputs."""
    if name not in OPERANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lambda arguments, outputs: run(name, arguments, outputs)
