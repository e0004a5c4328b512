"""The dkfuse ops: `torch.ops.dkfuse.*`, functional, inference only.

    b   = x + branch_bias                         branch_bias None: x; only in ops with a residual
    y   = norm_b(b)*(branch_weight_offset + branch_weight)      branch_weight optional; branch_norm="none": y = b
    z   = residual + gate*y + gate2*factor2*x2    without gates: residual + y + factor2*x2; x2 optional; ops without a
                                                  residual: z = x
        clamped to [-limit, limit]                limit 0: not; NaN stays; only in ops with a residual and a norm
    n   = (z - mean(z)) * rsqrt(var(z) + eps)     norm="layer", biased variance
        = z * rsqrt(mean(z^2) + eps)              norm="rms"; both over the last dim, eps may be 0
    norm_b: as n, by branch_norm and branch_eps   only in the residual_norm_modulate ops (sandwich norms)
    a   = n*(weight_offset + weight) + bias       weight, bias optional
    out = a*(scale_offset + scale) + shift        scale, shift optional; scale None: factor 1
    out2 = a*(scale_offset + scale2) + shift2     likewise
    sum = z

    norm_modulate                 out            gated_residual   out = z
    residual_norm_modulate        sum, out       scale_shift      out = x*(scale_offset + scale) + shift
    norm_modulate_dual            out, out2
    residual_norm_modulate_dual   sum, out, out2
    norm_rope                     see `rope_support`; what follows is about the others

Shapes: x and residual `[..., D]`, equal; gate, branch_bias, branch_weight, x2, gate2, weight, bias, scale, shift,
scale2, shift2 right-broadcast to it (last dim D or 1, or 0-D) with any strides and are read in place; x2 is meant to be
as big as x, and its rows are dense. Results are contiguous, of x's shape; `sum` is an empty `[0]` tensor where
sum_dtype is None. With `pick`, `[..., 1]`, gates, scales and shifts may hold several rows, of which each token takes
one (`picks`); gate2 may not. `gate_table` is added to gate, and so for scale, shift, scale2 and shift2 (`tables`).
Dtypes: fp16, bf16 or fp32, mixed freely; arithmetic is fp32; outputs are rounded once to out_dtype and sum_dtype.
`roundings` (kernels.rounding.Rounding) adds eager's roundings of intermediates to x.dtype; the norm reads the rounded
sum only under SUM.
Errors: ValueError for fp64 or integer tensors, shapes that do not fit, an unknown norm, a branch_weight without a
branch_norm, a gate2 without x2, a table without its operand, another result dtype.

Implementations: `CompositeExplicitAutograd` is plain torch (`reference.py`), `CUDA` launches Triton and falls back to
plain torch where `supports` says no, triton is missing, or the kernel failed before.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import failures, reference, rope_reference, rope_support
from .axes import Int
from .bounded import kept
from .launch import Launch, plan, run, supports
from .picks import first_rows, pick_problem, picked
from .rounding import ALL_ROUNDINGS
from .support import ACTIVATIONS, NORMS, OPERANDS, branch_problem
from .tables import TABLES, table_of, table_problem, tabled

_NORM_TAIL = (
    "*, str norm, float eps, float weight_offset=0., float scale_offset=1., {more}ScalarType out_dtype, int roundings=0"
)
_RESIDUAL_TAIL = _NORM_TAIL.format(
    more='str branch_norm="none", float branch_eps=0., float branch_weight_offset=0., '
    "float factor2=1., float limit=0., ScalarType? sum_dtype, "
)
_RESIDUAL = "Tensor x, Tensor residual, Tensor? gate, Tensor? branch_weight"
_MODULATION = "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift"
_SECOND = "Tensor? scale2, Tensor? shift2"
_BIAS = "Tensor? branch_bias=None"
_PICK = "Tensor? pick=None"
_SECOND_BRANCH = "Tensor? x2=None, Tensor? gate2=None"


def _tables(*names: str) -> str:
    return ", ".join(f"Tensor? {table_of(name)}=None" for name in names)


_TABLES = _tables("scale", "shift")
_SECOND_TABLES = _tables("scale2", "shift2")
_GATE_TABLE = _tables("gate")

SCHEMAS: dict[str, str] = {
    "norm_modulate": f"(Tensor x, {_MODULATION}, {_PICK}, {_TABLES}, {_NORM_TAIL.format(more='')}) -> Tensor",
    "residual_norm_modulate": (
        f"({_RESIDUAL}, {_MODULATION}, {_BIAS}, {_PICK}, {_GATE_TABLE}, {_TABLES}, {_SECOND_BRANCH}, "
        f"{_RESIDUAL_TAIL}) -> (Tensor sum, Tensor out)"
    ),
    "norm_modulate_dual": (
        f"(Tensor x, {_MODULATION}, {_SECOND}, {_PICK}, {_TABLES}, {_SECOND_TABLES}, {_NORM_TAIL.format(more='')})"
        " -> (Tensor out, Tensor out2)"
    ),
    "residual_norm_modulate_dual": (
        f"({_RESIDUAL}, {_MODULATION}, {_SECOND}, {_BIAS}, {_PICK}, {_GATE_TABLE}, {_TABLES}, {_SECOND_TABLES}, "
        f"{_SECOND_BRANCH}, {_RESIDUAL_TAIL}) -> (Tensor sum, Tensor out, Tensor out2)"
    ),
    "gated_residual": (
        f"(Tensor x, Tensor residual, Tensor? gate, {_BIAS}, {_PICK}, {_GATE_TABLE}, *, ScalarType out_dtype, "
        "int roundings=0) -> Tensor"
    ),
    "scale_shift": (
        f"(Tensor x, Tensor? scale, Tensor? shift, {_PICK}, {_TABLES}, *, float scale_offset=1., ScalarType out_dtype, "
        "int roundings=0) -> Tensor"
    ),
}
OPS = tuple(SCHEMAS)  # the adaLN family


def check(op: str, arguments: dict[str, Any]) -> None:
    """Raise ValueError, in one sentence, for a call that no implementation can serve."""
    if op == "norm_rope":
        rope_support.check(arguments)
        return
    reason = branch_problem(arguments) or pick_problem(arguments, known=False) or table_problem(arguments)
    if reason is not None:
        raise ValueError(f"dkfuse::{op}: {reason.message}")
    arguments = dict(first_rows(arguments))
    full, broadcast, _ = OPERANDS[op]
    x = arguments["x"]
    for name in (*full, *broadcast, *TABLES):
        tensor = arguments.get(name)
        if tensor is not None and tensor.dtype not in ACTIVATIONS:
            raise ValueError(
                f"dkfuse::{op}: {name} has dtype {tensor.dtype}; use float16, bfloat16 or float32, cast it first."
            )
    for key in ("out_dtype", "sum_dtype"):
        if arguments.get(key) is not None and arguments[key] not in ACTIVATIONS:
            raise ValueError(f"dkfuse::{op}: {key} is {arguments[key]}; use float16, bfloat16 or float32.")
    if x.dim() == 0:
        raise ValueError(f"dkfuse::{op}: x has no dims; it needs at least one.")
    if "norm" in arguments and arguments["norm"] not in NORMS:
        raise ValueError(f"dkfuse::{op}: norm is {arguments['norm']!r}; use one of {', '.join(NORMS)}.")
    if not 0 <= arguments["roundings"] <= ALL_ROUNDINGS:
        raise ValueError(
            f"dkfuse::{op}: roundings is {arguments['roundings']}; Rounding flags are 0 to {ALL_ROUNDINGS}."
        )
    for name in full[1:]:
        shape = tuple(arguments[name].shape)
        if len(shape) != x.dim() or any(_differ(a, b) for a, b in zip(shape, x.shape, strict=True)):
            raise ValueError(f"dkfuse::{op}: {name} has shape {shape} but x {tuple(x.shape)}; they must be equal.")
    for name in (*broadcast, "pick", *TABLES):
        if arguments.get(name) is None:
            continue
        shape = tuple(arguments[name].shape)
        pairs = zip(reversed(shape), reversed(x.shape), strict=False)
        if len(shape) > x.dim() or any(_differ(a, b) and _differ(a, 1) for a, b in pairs):
            raise ValueError(
                f"dkfuse::{op}: {name} of shape {shape} does not broadcast to x of shape {tuple(x.shape)}."
            )


def _differ(a: Int, b: Int) -> bool:
    """True if two sizes are known to differ; symbols are not guarded on."""
    return statically_known_true(a != b)


def _empty_outputs(op: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Contiguous outputs of x's shape; a sum that is not stored is a `[0]` tensor of x's dtype."""
    if op == "norm_rope":
        return {"out": rope_support.empty_output(arguments)}
    x = arguments["x"]
    outputs = {}
    for name in OPERANDS[op][2]:
        dtype = arguments["sum_dtype"] if name == "sum" else arguments["out_dtype"]
        shape = x.shape if dtype is not None else (0,)
        outputs[name] = torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
    return outputs


def _returned(outputs: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
    results = tuple(outputs.values())
    return results[0] if len(results) == 1 else results


def reference_outputs(op: str, arguments: dict[str, Any], compute: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The outputs of `op` in plain torch, still in `compute`."""
    if op == "norm_rope":
        return {"out": rope_reference.norm_rope(arguments, compute)}
    arguments = tabled(picked(arguments), compute)
    x, roundings = arguments["x"], arguments["roundings"]
    if op == "gated_residual":
        y = reference.biased(x.to(compute), arguments.get("branch_bias"), roundings, x.dtype)
        return {"out": reference.gate_and_add(y, arguments["residual"], arguments["gate"], roundings, x.dtype)}
    if op == "scale_shift":
        scale, shift, offset = (arguments[name] for name in ("scale", "shift", "scale_offset"))
        return {"out": reference.modulate(x.to(compute), scale, shift, offset, roundings, x.dtype)}
    operands = ("residual", "gate", "weight", "bias", "scale", "shift", "scale2", "shift2")
    values = ("norm", "eps", "weight_offset", "scale_offset", "roundings")
    branch = ("branch_bias", "branch_weight", "branch_norm", "branch_eps", "branch_weight_offset")
    keywords: dict[str, Any] = {name: arguments[name] for name in values}
    keywords.update(
        (name, arguments[name]) for name in (*branch, "x2", "gate2", "factor2", "limit") if name in arguments
    )
    results = reference.residual_norm_modulate_dual(
        x, *(arguments.get(name) for name in operands), **keywords, compute=compute
    )
    return {name: value for name, value in zip(("sum", "out", "out2"), results, strict=True) if name in OPERANDS[op][2]}


def _fake(op: str, arguments: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
    check(op, arguments)
    return _returned(_empty_outputs(op, arguments))


def _plain(op: str, arguments: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
    check(op, arguments)
    outputs = _empty_outputs(op, arguments)
    for name, value in reference_outputs(op, arguments).items():
        if name != "sum" or arguments["sum_dtype"] is not None:
            outputs[name].copy_(value)
    return _returned(outputs)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _sm_count(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_plans: dict[tuple[Any, ...], Launch | None] = {}


def _signature(op: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What a plan depends on: layouts and dtypes of the tensors, and every value."""
    values = (tuple(v) if isinstance(v, list) else v for v in arguments.values())
    layouts = ((v.shape, v.stride(), v.dtype, v.device) if isinstance(v, Tensor) else v for v in values)
    return (op, *layouts)


def _planned(op: str, arguments: dict[str, Any], outputs: dict[str, Tensor]) -> Launch | None:
    """The launch of this call; None where plain torch must serve it. Made once per signature."""
    return kept(_plans, _signature(op, arguments), lambda: _plan(op, arguments, outputs))


def _plan(op: str, arguments: dict[str, Any], outputs: dict[str, Tensor]) -> Launch | None:
    check(op, arguments)
    if not _has_triton() or arguments["x"].numel() == 0 or supports(op, arguments) is not None:
        return None
    written = {k: t for k, t in outputs.items() if k != "sum" or arguments["sum_dtype"] is not None}
    return plan(op, arguments, written, sm_count=_sm_count(arguments["x"].device.index))


def _triton(op: str, arguments: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
    outputs = _empty_outputs(op, arguments)
    launch = _planned(op, arguments, outputs)
    if launch is None:
        return _plain(op, arguments)
    try:
        with torch.cuda.device(arguments["x"].device):
            run(launch, {**arguments, **outputs})
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _plans[_signature(op, arguments)] = None
        result = _plain(op, arguments)  # where that fails too, the error was not the kernel's
        failures.launch_failed("triton", op, arguments, error)
        return result
    return _returned(outputs)


def _bound(op: str, function: Callable[[str, dict[str, Any]], Any]) -> Callable[..., Any]:
    """`function(op, arguments)` as an implementation of `op`, with arguments bound by name and defaults filled in."""
    schema = getattr(torch.ops.dkfuse, op).default._schema
    parameters = []
    for argument in schema.arguments:
        kind = inspect.Parameter.KEYWORD_ONLY if argument.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        parameters.append(inspect.Parameter(argument.name, kind, default=default))
    signature = inspect.Signature(parameters)

    def implementation(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return function(op, dict(bound.arguments))

    implementation.__name__ = implementation.__qualname__ = op
    return implementation


_library = torch.library.Library("dkfuse", "FRAGMENT")


def _register() -> None:
    for op, schema in {**SCHEMAS, "norm_rope": rope_support.SCHEMA}.items():
        _library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"dkfuse::{op}", _bound(op, _fake), lib=_library)
        _library.impl(op, _bound(op, _plain), "CompositeExplicitAutograd")
        _library.impl(op, _bound(op, _triton), "CUDA")


_register()
