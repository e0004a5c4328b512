"""CuTe DSL kernels and what they ask of a call; imports no GPU library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

from .cute_key import known_misaligned
from .cute_norm_key import INPUTS
from .cute_rope_key import NAMES, row_axes
from .registry import Constraint, Implementation
from .rope_support import supports_rope, with_defaults
from .support import ACTIVATIONS, supports
from .tables import TABLES
from .unsupported import Unsupported

Arguments = Mapping[str, Any]
STEP, WIDEST = 8, 16384  # columns of a norm row
NARROWEST_TOKEN, WIDEST_TOKEN = 256, 8192  # columns of a norm across heads


def _absent(*names: str) -> Callable[[Arguments], str | None]:
    def problem(arguments: Arguments) -> str | None:
        for name in names:
            if arguments.get(name) is not None:
                return f"{name} is given, which the CuTe kernel does not take; the Triton kernel does."
        return None

    return problem


def _is(name: str, default: Any, *allowed: Any) -> Callable[[Arguments], str | None]:
    def problem(arguments: Arguments) -> str | None:
        value = arguments.get(name, default)
        if value in allowed:
            return None
        return f"{name} is {value!r} but the CuTe kernel takes {' or '.join(map(repr, allowed))}; the Triton one does."

    return problem


def _general(op: str) -> Callable[[Arguments], str | None]:
    """What no kernel of ours takes: dtypes, devices, shapes that do not broadcast, symbolic rows, no rows at all."""

    def problem(arguments: Arguments) -> str | None:
        reason = supports_rope(arguments) if op == "norm_rope" else supports(op, arguments)
        return None if reason is None else reason.message

    return problem


def _width(arguments: Arguments) -> str | None:
    width = arguments["x"].shape[-1]
    if not isinstance(width, int):
        return f"the last dim of x is the symbol {width}; the CuTe kernel is compiled per width, mark it static."
    if width % STEP or width > WIDEST:
        return f"rows have {width} elements; the CuTe kernel takes multiples of {STEP} up to {WIDEST}."
    return None


def _dense_operands(arguments: Arguments) -> str | None:
    width = arguments["x"].shape[-1]
    for name in INPUTS:
        tensor = arguments.get(name)
        if tensor is None:
            continue
        if tensor.dim() == 0 or not statically_known_true(tensor.shape[-1] == width):
            return f"{name} has shape {tuple(tensor.shape)}; the CuTe kernel takes operands with {width} columns."
        if not statically_known_true(tensor.stride(-1) == 1):
            return f"{name} has inner stride {tensor.stride(-1)}; the CuTe kernel reads dense columns (inner stride 1)."
    return None


def _aligned(*names: str) -> Callable[[Arguments], str | None]:
    """Pointers are not known here: a launch looks at them, and takes narrower loads where it must."""

    def problem(arguments: Arguments) -> str | None:
        for name in names:
            tensor = arguments.get(name)
            if tensor is None:
                continue
            steps = [
                tensor.stride(i) for i in range(tensor.dim() - 1) if not statically_known_true(tensor.shape[i] == 1)
            ]
            if (step := known_misaligned(tensor, steps)) is not None:
                return f"{name} has a stride of {step} elements of {tensor.dtype}; the CuTe kernel needs 16-byte ones."
        return None

    return problem


_CALL = "fp16, bf16 or fp32, one device, rows with inner stride 1, at most three row dims after merging"
_PLAIN = Constraint("roundings", "roundings == 0", _is("roundings", 0, 0))
_NORM = (
    Constraint("pick", "no pick", _absent("pick")),
    Constraint("table", "no table", _absent(*TABLES)),
    _PLAIN,
    Constraint("norm", 'norm "layer" or "rms"', _is("norm", None, "layer", "rms")),
    Constraint("width", f"D % {STEP} == 0, D <= {WIDEST}, D static", _width),
)
_LAYOUT = (
    Constraint("operands", "operands [D], [1|B,1,D] or [B,S,D], inner stride 1", _dense_operands),
    Constraint("alignment", "strides in multiples of 16 bytes", _aligned(*INPUTS)),
)


def _norm(op: str) -> tuple[Constraint, ...]:
    general = Constraint("call", _CALL, _general(op))
    return (*_NORM, general, *_LAYOUT)


_BRANCH = (
    Constraint("branch_bias", "no branch_bias", _absent("branch_bias")),
    Constraint("second_branch", "no x2, no gate2", _absent("x2", "gate2")),
    Constraint("limit", "no limit", _is("limit", 0.0, 0.0)),
    Constraint("branch_norm", 'branch_norm "none", no branch_weight', _is("branch_norm", "none", "none")),
    Constraint("branch_weight", "no branch_weight", _absent("branch_weight")),
)


def _token_width(arguments: Arguments) -> str | None:
    x, across = arguments["x"], arguments.get("across")
    d, heads = x.shape[-1], 1 if across is None else x.shape[across]
    if not isinstance(d, int) or not isinstance(heads, int):
        return f"a token has {heads} heads of {d} columns; the CuTe kernel is compiled per width, mark both static."
    if d % STEP:
        return f"heads have {d} columns; the CuTe kernel takes multiples of {STEP}."
    if not NARROWEST_TOKEN <= d * heads <= WIDEST_TOKEN:
        return f"the norm is over {d * heads} columns; the CuTe kernel takes {NARROWEST_TOKEN} to {WIDEST_TOKEN}."
    return None


def _whole_heads(arguments: Arguments) -> str | None:
    d, columns = arguments["x"].shape[-1], arguments["cos"].shape[-1]
    rotated = columns * (2 if arguments["tables"] == "half" else 1)
    if statically_known_true(rotated == d):
        return None
    return f"the tables rotate {rotated} of {d} columns; the CuTe kernel rotates whole heads."


def _table_dtypes(arguments: Arguments) -> str | None:
    for name in ("cos", "sin"):
        if arguments[name].dtype not in ACTIVATIONS:
            return (
                f"{name} has dtype {arguments[name].dtype}; the CuTe kernel reads float16, bfloat16 or float32 tables."
            )
    return None


def _rope_operands(arguments: Arguments) -> str | None:
    d = arguments["x"].shape[-1]
    for name in ("weight", "bias"):
        tensor = arguments.get(name)
        if tensor is None:
            continue
        if tensor.dim() == 0 or not statically_known_true(tensor.shape[-1] == d):
            return f"{name} has shape {tuple(tensor.shape)}; the CuTe kernel takes operands with {d} columns."
        if not statically_known_true(tensor.stride(-1) == 1):
            return f"{name} has inner stride {tensor.stride(-1)}; the CuTe kernel reads dense columns (inner stride 1)."
    for name in ("cos", "sin"):
        step = arguments[name].stride(-1)
        if not isinstance(step, int) or step == 0:
            return f"{name} has inner stride {step}; the CuTe kernel takes a fixed one that is not 0."
    return None


def _rope_axes(arguments: Arguments) -> str | None:
    try:
        row_axes({name: arguments.get(name) for name in (*NAMES, "across", "order")})
    except Unsupported as reason:
        return reason.message
    return None


def _defaulted(problem: Callable[[Arguments], str | None]) -> Callable[[Arguments], str | None]:
    return lambda arguments: problem(with_defaults(arguments))


_ROPE = (
    _PLAIN,
    Constraint("norm", 'norm "layer" or "rms"', _is("norm", "none", "layer", "rms")),
    Constraint("norm_last", "the norm before the rotation", _is("norm_last", False, False)),
    Constraint("rotation", 'rotation "interleaved"', _is("rotation", "none", "interleaved")),
    Constraint("tables", 'tables "half" or "full"', _is("tables", "half", "half", "full")),
    Constraint(
        "width",
        f"head_dim % {STEP} == 0, {NARROWEST_TOKEN} <= heads * head_dim <= {WIDEST_TOKEN}, the norm over all of it",
        _token_width,
    ),
    Constraint("call", _CALL, _general("norm_rope")),
    Constraint("table_dtype", "tables in fp16, bf16 or fp32", _defaulted(_table_dtypes)),
    Constraint("table_width", "tables for whole heads", _defaulted(_whole_heads)),
    Constraint("operands", "weight and bias [d] or [heads, d], inner stride 1", _defaulted(_rope_operands)),
    Constraint("alignment", "strides in multiples of 16 bytes", _aligned("x", "weight", "bias")),
    Constraint("outer_dims", "at most three row dims beside the heads", _defaulted(_rope_axes)),
)

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("norm_modulate", "cute", _norm("norm_modulate"), "dkfuse.kernels.cute_norm:run"),
    Implementation(
        "residual_norm_modulate", "cute", (*_BRANCH, *_norm("residual_norm_modulate")), "dkfuse.kernels.cute_norm:run"
    ),
    Implementation("norm_rope", "cute", _ROPE, "dkfuse.kernels.cute_rope:run"),
)
