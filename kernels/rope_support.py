"""dkfuse::norm_rope: schema, what a call must satisfy, and which calls the Triton kernel takes.

    n   = norm(x)                       norm "none" | "rms" | "layer", fp32 statistics over the last dim, or over the
                                        dims `across` and -1 jointly (a norm across heads)
    a   = n*(weight_offset + weight) + bias
    out = rotate(a) on the first r columns, a on the others

or with norm_last the other way round, also where the norm is across heads:

    out = norm(rotate(x))*(weight_offset + weight) + bias

rotation "interleaved" takes the pairs (a[2i], a[2i+1]), "half" the pairs (a[i], a[i+r/2]), i in [0, r/2):

    out0 = c0*a0 - s0*a1
    out1 = c1*a1 + s1*a0

tables "half":    cos, sin [..., r/2]     c0 = c1 = cos, s0 = s1 = sin
       "full":    cos, sin [..., r]       a value per column, c0 and s0 at a0's, c1 and s1 at a1's
       "complex": cos [..., r]            (c, s) side by side, view_as_real(freqs).flatten(-2); sin is None
       "matrix":  cos [..., 2r]           2x2 matrices, rows first: out0 = m00*a0 + m01*a1, out1 = m10*a0 + m11*a1

Shapes: x `[..., d]`, inner stride 1; weight and bias right-broadcast to x, a table to x with the last dim of the table.
Any strides, read in place.
Result: shape of x, out_dtype, inner dim dense; `order` lists the dims from outermost in memory to innermost (the last
dim last), None is contiguous.
Dtypes: fp16, bf16 or fp32, tables also fp64; arithmetic in fp32, the rotation in fp64 where a table is fp64; rounded
once to out_dtype. `roundings` adds eager's of NORM, WEIGHTED, AFFINE and ROTATION to x.dtype, and with norm_last
ROTATED, the row that the norm reads.
Errors: ValueError for other dtypes, shapes that do not fit, unknown names, tables without a rotation, r > d, r odd.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .axes import Int
from .rounding import ALL_ROUNDINGS
from .support import ACTIVATIONS, BRANCH_NORMS, MAX_ROW, broadcasts
from .unsupported import Unsupported

SCHEMA = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin, *, str norm='none', float eps=0., "
    "float weight_offset=0., int? across=None, str rotation='none', str tables='half', int[]? order=None, "
    "bool norm_last=False, ScalarType out_dtype, int roundings=0) -> Tensor"
)
NAMES = ("x", "weight", "bias", "cos", "sin")
NORMS = BRANCH_NORMS
ROTATIONS = ("none", "interleaved", "half")
TABLES = {"half": (1, 2), "full": (1, 1), "complex": (1, 1), "matrix": (2, 1)}  # width = r * first / second
TABLE_DTYPES = (*ACTIVATIONS, torch.float64)
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("weight", "bias", "cos", "sin", "across", "order")),
    **dict.fromkeys(("eps", "weight_offset"), 0.0),
    **dict.fromkeys(("norm", "rotation"), "none"),
    "tables": "half",
    "norm_last": False,
    "roundings": 0,
}


def with_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The call with every argument; a compiler pass may hand over only what a site has."""
    return {**DEFAULTS, **arguments}


def rotated_columns(arguments: Mapping[str, Any]) -> Int:
    """r, from the width of the tables; 0 without a rotation."""
    if arguments["rotation"] == "none":
        return 0
    times, per = TABLES[arguments["tables"]]
    return arguments["cos"].shape[-1] * per // times


def check(arguments: dict[str, Any]) -> None:
    """Raise ValueError, in one sentence, for a call that no implementation can serve."""
    reason = problem(arguments)
    if reason is not None:
        raise ValueError(f"dkfuse::norm_rope: {reason.message}")


def problem(arguments: Mapping[str, Any]) -> Unsupported | None:
    """The first thing that is wrong with a call, with its code; sizes that are not known do not count as wrong."""
    return (
        _dtypes(arguments) or _values(arguments) or _table_names(arguments) or _widths(arguments) or _shapes(arguments)
    )


def _dtypes(arguments: Mapping[str, Any]) -> Unsupported | None:
    for name in NAMES:
        allowed = TABLE_DTYPES if name in ("cos", "sin") else ACTIVATIONS
        if arguments[name] is not None and arguments[name].dtype not in allowed:
            more = "float16, bfloat16, float32" + (" or float64" if len(allowed) == 4 else ", cast it first")
            return Unsupported("dtype", f"{name} has dtype {arguments[name].dtype}; use {more}.")
    if arguments["out_dtype"] not in ACTIVATIONS:
        return Unsupported("dtype", f"out_dtype is {arguments['out_dtype']}; use float16, bfloat16 or float32.")
    return None


def _values(arguments: Mapping[str, Any]) -> Unsupported | None:
    rank = arguments["x"].dim()
    if rank == 0:
        return Unsupported("rank", "x has no dims; it needs at least one.")
    for name, known in (("norm", NORMS), ("rotation", ROTATIONS), ("tables", tuple(TABLES))):
        if arguments[name] not in known:
            return Unsupported(name, f"{name} is {arguments[name]!r}; use one of {', '.join(known)}.")
    across, order = arguments["across"], arguments["order"]
    if across is not None and not (-rank <= across < rank and across % rank != rank - 1):
        return Unsupported("across", f"across is {across}; it names a dim of x, of {rank}, that is not the last.")
    if across is not None and arguments["norm"] == "none":
        return Unsupported("across", f"across is {across} but norm is 'none'; name the norm, 'layer' or 'rms'.")
    if order is not None and (sorted(order) != list(range(rank)) or order[-1] != rank - 1):
        return Unsupported("order", f"order is {list(order)}; it permutes 0 to {rank - 1} and ends with the last dim.")
    if not 0 <= arguments["roundings"] <= ALL_ROUNDINGS:
        return Unsupported("roundings", f"roundings is {arguments['roundings']}; flags are 0 to {ALL_ROUNDINGS}.")
    return None


def _table_names(arguments: Mapping[str, Any]) -> Unsupported | None:
    rotation, tables = arguments["rotation"], arguments["tables"]
    needed = () if rotation == "none" else ("cos", "sin") if tables in ("half", "full") else ("cos",)
    for name in ("cos", "sin"):
        given = arguments[name] is not None
        if given == (name in needed):
            continue
        kind = "rotation 'none'" if rotation == "none" else f"{tables!r} tables"
        return Unsupported("tables", f"{name} is {'given' if given else 'missing'}; {kind} take {needed or 'none'}.")
    return None


def _widths(arguments: Mapping[str, Any]) -> Unsupported | None:
    if arguments["rotation"] == "none":
        return None
    d, cos, sin = arguments["x"].shape[-1], arguments["cos"], arguments["sin"]
    if cos.dim() == 0 or (sin is not None and sin.dim() == 0):
        return Unsupported("broadcast", "a table has no dims; its last one holds the values of a row.")
    if sin is not None and _differ(sin.shape[-1], cos.shape[-1]):
        return Unsupported("broadcast", f"cos has {cos.shape[-1]} columns but sin {sin.shape[-1]}; they must be equal.")
    times = 2 * TABLES[arguments["tables"]][0] // TABLES[arguments["tables"]][1]
    if statically_known_true(cos.shape[-1] % times != 0) or statically_known_true(cos.shape[-1] == 0):
        kind = f"{arguments['tables']!r} tables"
        return Unsupported("table_width", f"cos has {cos.shape[-1]} columns; {kind} have a multiple of {times}.")
    r = rotated_columns(arguments)
    if statically_known_true(r > d):
        return Unsupported("table_width", f"the tables rotate {r} columns but x has {d}; slice the tables.")
    return None


def _shapes(arguments: Mapping[str, Any]) -> Unsupported | None:
    x = tuple(arguments["x"].shape)
    for name in NAMES[1:]:
        if arguments[name] is None:
            continue
        shape = tuple(arguments[name].shape)
        to = (*x[:-1], shape[-1]) if name in ("cos", "sin") else x
        pairs = zip(reversed(shape), reversed(to), strict=False)
        if len(shape) > len(to) or any(_differ(a, b) and _differ(a, 1) for a, b in pairs):
            return Unsupported("broadcast", f"{name} of shape {shape} does not broadcast to x of shape {x}.")
    return None


def _differ(a: Int, b: Int) -> bool:
    return statically_known_true(a != b)


def empty_output(arguments: Mapping[str, Any]) -> Tensor:
    """The result's memory: x's shape, laid out by `order`."""
    x, order = arguments["x"], arguments["order"]
    if order is None:
        return torch.empty(x.shape, dtype=arguments["out_dtype"], device=x.device)
    out = torch.empty([x.shape[dim] for dim in order], dtype=arguments["out_dtype"], device=x.device)
    return out.permute([list(order).index(dim) for dim in range(x.dim())])


def supports_rope(arguments: Mapping[str, Any]) -> Unsupported | None:
    """As `support.supports`. More codes: "odd_head_dim", "table_width", "tables", "order", "across" and names."""
    arguments = with_defaults(arguments)
    reason = problem(arguments)
    if reason is not None:
        return reason
    x, across = arguments["x"], arguments["across"]
    d, r, heads = x.shape[-1], rotated_columns(arguments), 1 if across is None else x.shape[across]
    for name, size in (("the last dim of x", d), ("the table's width", r), ("the dim `across`", heads)):
        if not isinstance(size, int):
            return Unsupported("symbolic_row", f"{name} is the symbol {size}; kernels are built per width, fix it.")
    if any(statically_known_true(size == 0) for size in x.shape):
        return Unsupported("empty", f"x has no elements (shape {tuple(x.shape)}); there is nothing to launch.")
    if r and d % 2:
        return Unsupported("odd_head_dim", f"rows of {d} elements have no pairs; the kernel rotates even rows only.")
    if d * heads > MAX_ROW:
        return Unsupported(
            "row_too_long", f"a norm over {d * heads} elements exceeds {MAX_ROW}, a program's registers."
        )
    for name in NAMES:
        tensor = arguments[name]
        if tensor is not None and tensor.device != x.device:
            return Unsupported("device", f"{name} is on {tensor.device} but x on {x.device}; move it to x's device.")
        to = x.shape if name not in ("cos", "sin") or tensor is None else (*x.shape[:-1], tensor.shape[-1])
        if tensor is not None and not broadcasts(tuple(tensor.shape), tuple(to)):
            shapes = f"{name} of shape {tuple(tensor.shape)}", f"x of shape {tuple(x.shape)}"
            return Unsupported(
                "broadcast", f"it is not known that {shapes[0]} broadcasts to {shapes[1]}; fix the sizes."
            )
    if d != 1 and not statically_known_true(x.stride(-1) == 1):
        return Unsupported("inner_stride", f"x has inner stride {x.stride(-1)}; rows must be dense (inner stride 1).")
    from .rope_views import outer_dims

    return outer_dims(arguments)
