"""What the Triton kernels take of each op. They serve every op; `support` says what they ask of a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .registry import Constraint, Implementation
from .support import MAX_ROW, OPERANDS, supports
from .unsupported import Unsupported

DEVICES = ("cuda", "rocm", "xpu")  # the last two untested

# in the order in which they are looked at
_COMMON = {
    "dtype": "fp16, bf16 or fp32",
    "device": "all tensors on one device",
    "rank": "at least one dim",
    "symbolic_row": "the last dim is a known number",
    "row_too_long": f"D <= {MAX_ROW}",
    "empty": "no empty tensor",
    "shape": "operands of x's shape",
    "broadcast": "parameters broadcast to x",
    "inner_stride": "dense rows: inner stride 1",
    "outer_dims": "row dims that collapse to three",
}
_ADALN = {
    "pick": "pick [..., 1] is bool and chooses between two rows, or int32 or int64 and their number",
    "branch_norm": "a branch norm by its name, with its weight",
    "table": "a table only with what it is added to",
}
_ROPE = {
    "norm": "norm none, rms or layer",
    "rotation": "rotation none, interleaved or half",
    "tables": "cos and sin as `tables` says: half, full, complex or matrix",
    "across": "a norm across one more dim",
    "order": "a memory order that ends with the last dim",
    "roundings": "known rounding flags",
    "table_width": "tables no wider than the rows, of whole pairs",
    "odd_head_dim": "an even head_dim where it is rotated",
}


def _constraints(op: str) -> tuple[Constraint, ...]:
    def constraint(code: str, text: str) -> Constraint:
        def problem(arguments: Mapping[str, Any]) -> str | None:
            reason = supports(op, arguments)
            return reason.message if reason is not None and reason.code == code else None

        return Constraint(code, text, problem)

    texts = {**_COMMON, **(_ROPE if op == "norm_rope" else _ADALN)}
    return tuple(constraint(code, text) for code, text in texts.items())


@dataclass(frozen=True, eq=False)
class TritonImplementation(Implementation):
    """`supports` answers for all constraints at once: each of them is the first thing it may find wrong."""

    def problem(self, arguments: Mapping[str, Any]) -> Unsupported | None:
        return supports(self.op, arguments)


def run(op: str, arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Launch the op's kernel with Triton's own launcher; compiled programs launch it as one of Inductor's."""
    from . import launch
    from .ops import _sm_count

    planned = launch.plan(op, arguments, outputs, sm_count=_sm_count(arguments["x"].device.index))
    launch.run(planned, {**arguments, **outputs})


IMPLEMENTATIONS: tuple[Implementation, ...] = tuple(
    TritonImplementation(op, "triton", _constraints(op), f"dkfuse.kernels.provider_triton:{op}", devices=DEVICES)
    for op in OPERANDS
)


def __getattr__(name: str) -> Any:
    """The function that `run` entries name: of each op, with its arguments and outputs."""
    if name not in OPERANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lambda arguments, outputs: run(name, arguments, outputs)
