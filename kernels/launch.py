"""How a dkfuse op is launched: kernel, grid, arguments. Made from shapes and strides only, also from fake tensors.

A compiler pass turns a `Launch` into a Triton kernel node of the compiled program; the eager CUDA implementation of
the ops runs it directly. Sizes and strides may be `SymInt`s, which are never guarded on. Triton is imported when a plan
is made, not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import configs
from .axes import Axis, Int, collapse, inner_stride
from .configs import Config, choose
from .picks import PICKED, first_rows, has_rows
from .support import has_branch_norm, supports
from .tables import TABLES
from .unsupported import Unsupported

__all__ = ["Launch", "Unsupported", "plan", "run", "supports"]

_NORM_POINTERS = (
    ("x", "residual"),
    (
        *("gate", "branch_bias", "branch_weight", "x2", "gate2", "weight", "bias"),
        *("scale", "shift", "scale2", "shift2", "pick", *TABLES),
    ),
    ("sum", "out", "out2"),
)
_NO_BRANCH_NORM = {
    "BRANCH_NORM": "False",
    "BRANCH_CENTER": "False",
    "BRANCH_EPS": "0.0",
    "BRANCH_WEIGHT_OFFSET": "0.0",
}
_NO_LIMIT = {"LIMIT": "0.0"}
_NO_FACTOR = {"FACTOR2": "1.0"}
_POINTWISE_POINTERS = (
    ("x", "residual"),
    ("gate", "branch_bias", "scale", "shift", "pick", *TABLES[:3]),
    ("out",),
)
LAYOUT_MULTIPLES = 16


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    tensors: kernel pointer parameter -> op argument or output ("sum", "out", "out2") that it points to
    scalars: run-time integers (row counts, strides, offsets), int or SymInt
    constants: tl.constexpr parameters
    Together the three name every parameter of `kernel`, which is specialised to what this call uses.
    config: what the last two and the sizes of blocks among `constants` were made from, one for each call in the launch
    """

    kernel: Any
    grid: tuple[Int, ...]
    tensors: dict[str, str]
    scalars: dict[str, Int]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    config: tuple[Any, ...] = ()

    @property
    def config_text(self) -> str:
        """`config` in words, as reports show it."""
        return "; ".join(dict.fromkeys(map(str, self.config)))


def plan(
    op: str,
    arguments: Mapping[str, Any],
    outputs: Mapping[str, Any],
    *,
    sm_count: int,
    offsets: Mapping[str, Int] | None = None,
    config: Any = None,
) -> Launch:
    """The launch of `op` for these arguments and output tensors; raises `Unsupported` as `supports` reports it.

    arguments: the op's arguments by name, tensor-likes (shape, dtype, device, stride()) or values; defaults may miss
    outputs: "out", "out2", "sum" -> tensor-like of x's shape with inner stride 1 and any outer strides; an absent one
        is not written ("sum" where sum_dtype is None)
    sm_count: multiprocessors of the target
    offsets: output -> element offset from its data pointer, for writing into a slice of a bigger buffer
    config: overrides the tuned configuration, as one of `candidates`
    """
    reason = supports(op, arguments)
    if reason is not None:
        raise reason
    if op == "norm_rope":
        from .rope_launch import plan_rope

        return plan_rope(arguments, outputs, offsets=offsets or {}, config=config)
    x = arguments["x"]
    shape = tuple(x.shape)
    pointwise = op in ("gated_residual", "scale_shift")
    sandwich = has_branch_norm(arguments)
    full, broadcast, results = _POINTWISE_POINTERS if pointwise else _NORM_POINTERS
    rows = first_rows(arguments)
    tensors = {name: rows[name] for name in (*full, *broadcast) if rows.get(name) is not None}
    for name in results:
        if outputs.get(name) is not None:
            tensors[name] = check_output(name, outputs[name], shape)
    if "out" not in tensors:
        raise ValueError(f"plan({op!r}) needs the output tensor 'out'; got {sorted(outputs)}.")
    axes = collapse(tensors, shape)
    chosen = config or choose(shape[-1], op, _wide(arguments))

    values: dict[str, Any] = {f"n{i}": axes[i].size if i + 1 < len(axes) else None for i in range(2)}
    for name in (*full, *broadcast, *results):
        values.update(_strides(name, name in tensors, axes))
    for name in broadcast:
        values[f"{name}_si"] = inner_stride(tensors[name]) if name in tensors else None
        if name in PICKED:
            values[f"{name}_sp"] = arguments[name].stride(0) if has_rows(name, arguments) else None
    for name in results:
        offset = (offsets or {}).get(name, 0)
        values[f"{name}_offset"] = None if isinstance(offset, int) and offset == 0 else offset
    absent = {name: None for name in (*full, *broadcast, *results) if name not in tensors}
    fixed = {name: _expression(value, shape[-1]) for name, value in {**absent, **values}.items()}
    scalars = {name: value for name, value in values.items() if fixed[name] is None}
    if not (pointwise or sandwich):
        fixed.update(_NO_BRANCH_NORM)
    if not (pointwise or arguments.get("limit")):
        fixed.update(_NO_LIMIT)
    if not (pointwise or _has_factor(arguments)):
        fixed.update(_NO_FACTOR)

    from .specialize import specialize
    from .triton_norm import row_norm
    from .triton_pointwise import row_pointwise

    programs: Int = 1
    for axis in axes:
        programs = programs * axis.size
    return Launch(
        kernel=specialize(
            row_pointwise if pointwise else row_norm,
            f"dkfuse_{op}_branch" if sandwich else f"dkfuse_{op}",
            tuple((name, text) for name, text in fixed.items() if text is not None),
        ),
        grid=(programs, 1, 1),
        tensors={name: name for name in tensors},
        scalars=scalars,
        constants=_constants(arguments, pointwise, shape[-1], len(axes), chosen),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        config=(chosen,),
    )


def candidates(op: str, arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> list[Any]:
    """Values of `plan`'s `config` that are worth timing for such a call, a few; first the one that `plan` takes."""
    if op == "norm_rope":
        from .rope_launch import Call
        from .rope_launch import candidates as rope_candidates

        return list(rope_candidates([Call(arguments, outputs["out"])]))
    return list(configs.candidates(arguments["x"].shape[-1], op, _wide(arguments)))


def _wide(arguments: Mapping[str, Any]) -> bool:
    """Whether scale or shift is fp32."""
    given = [arguments.get(name) for name in ("scale", "shift", "scale2", "shift2")]
    return any(t is not None and t.dtype.itemsize == 4 for t in given)


def _has_factor(arguments: Mapping[str, Any]) -> bool:
    return arguments.get("x2") is not None and arguments.get("factor2", 1.0) != 1.0


def _expression(value: Int | None, width: int) -> str | None:
    """What the kernel's source says in place of a parameter of this value; None: it stays a run-time argument.

    Fixed are an absent tensor or stride, 1, and small multiples of the row width, which belong to the layout (a row, a
    sixth of a modulation vector) and not to the number of tokens.
    """
    if value is None:
        return "None"
    if not isinstance(value, int):
        return None
    if value == 1:
        return "1"
    if 0 < value <= LAYOUT_MULTIPLES * width and value % width == 0:
        return f"{value // width} * D"
    return None


def check_output(name: str, output: Any, shape: tuple[Int, ...]) -> Any:
    if len(output.shape) != len(shape):
        raise ValueError(f"output {name!r} has shape {tuple(output.shape)} but x {shape}; they must be equal.")
    if shape[-1] != 1 and output.stride(-1) != 1:
        raise ValueError(f"output {name!r} has inner stride {output.stride(-1)}; the kernels write dense rows only.")
    return output


def _strides(name: str, used: bool, axes: list[Axis]) -> dict[str, Int | None]:
    """`name`_s0.._s2, innermost row dim first; None where the dim or the tensor is absent or the stride is 0."""
    strides: dict[str, Int | None] = {}
    for i in range(3):
        stride = axes[i].strides[name] if used and i < len(axes) else 0
        strides[f"{name}_s{i}"] = None if isinstance(stride, int) and stride == 0 else stride
    return strides


def _constants(arguments: Mapping[str, Any], pointwise: bool, width: int, axes: int, config: Config) -> dict[str, Any]:
    constants = {
        "D": width,
        "CHUNK": config.chunk,
        "CHUNKS": config.chunks,
        "AXES": axes,
        "SCALE_OFFSET": float(arguments.get("scale_offset", 1.0)),
        "ROUNDINGS": int(arguments.get("roundings", 0)),
    }
    if not pointwise:
        constants["CENTER"] = arguments["norm"] == "layer"
        constants["EPS"] = float(arguments["eps"])
        constants["WEIGHT_OFFSET"] = float(arguments.get("weight_offset", 0.0))
    if _has_factor(arguments):
        constants["FACTOR2"] = float(arguments["factor2"])
    if arguments.get("limit"):
        constants["LIMIT"] = float(arguments["limit"])
    if has_branch_norm(arguments):
        constants["BRANCH_NORM"] = True
        constants["BRANCH_CENTER"] = arguments["branch_norm"] == "layer"
        constants["BRANCH_EPS"] = float(arguments.get("branch_eps", 0.0))
        constants["BRANCH_WEIGHT_OFFSET"] = float(arguments.get("branch_weight_offset", 0.0))
    return constants


def run(launch: Launch, tensors: Mapping[str, Any]) -> None:
    """Launch on real tensors; `tensors` maps op arguments and outputs to tensors."""
    launch.kernel[launch.grid](**keywords(launch, tensors))


def keywords(launch: Launch, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What the kernel is called with, and compiled for."""
    pointers = {parameter: tensors[name] for parameter, name in launch.tensors.items()}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return {**pointers, **launch.scalars, **launch.constants, **options}
