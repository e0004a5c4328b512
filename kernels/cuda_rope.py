"""norm_rope as a CUDA kernel compiled at run time: the host side of `cuda_rope.cu`.

A kernel is built per head dim, dtypes, norm, rotation, kind of tables and alignment; sizes and strides are arguments.
The tile axis is one along which the tables stay the same, so that a group of lanes reads them once for ROWS heads.
Calls of the same layout share a plan.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .axes import Axis, Int
from .bounded import kept
from .cuda_compile import cubin
from .cuda_driver import Kernel
from .rope_support import NAMES, ROTATIONS, with_defaults
from .rope_views import Rows, see

TABLES = ("half", "full", "complex")
NORMS = ("none", "rms", "layer")
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
BLOCK = 8  # columns that a lane reads at once
ELEMENTS = 32  # of x that a lane holds at least, where there are as many rows
MAX_ROWS = 4
THREADS = 128
MAX_TILES = 2**31
VECTOR = 16  # bytes
VALUES = ("norm", "eps", "weight_offset", "rotation", "tables", "norm_last")


class Arguments(ctypes.Structure):
    """The kernel's parameter, as `Arguments` in the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*NAMES, "out")),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ("x", "cos", "sin", "out")),
        *((name, ctypes.c_uint32) for name in ("n0", "n1", "tiles", "total")),
        *((name, ctypes.c_float) for name in ("eps", "weight_offset")),
    )


@dataclass(frozen=True)
class Config:
    """rows: of the tile axis that a group of lanes takes; threads: of a block, a multiple of 32."""

    rows: int
    threads: int = THREADS


@dataclass(frozen=True)
class Plan:
    kernel: Kernel
    blocks: int
    threads: int
    template: Arguments

    def __call__(self, tensors: tuple[Any, ...]) -> None:
        filled = Arguments.from_buffer_copy(self.template)  # its own copy: plans are shared by threads
        for name, tensor in zip((*NAMES, "out"), tensors, strict=True):
            if tensor is not None:
                setattr(filled, name, tensor.data_ptr())
        self.kernel.launch(self.blocks, self.threads, filled)


_plans: dict[tuple[Any, ...], Plan | None] = {}


def run(arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """norm_rope into outputs["out"], which may be x itself. Raises what `prepare` raises."""
    launch(arguments, outputs["out"])


def launch(arguments: Mapping[str, Any], out: Any, config: Config | None = None) -> None:
    """`run` with a configuration of one's own."""
    tensors = (*[arguments[name] for name in NAMES], out)
    key: list[Any] = [config, out.get_device(), *[arguments[name] for name in VALUES]]
    addresses = 0
    for tensor in tensors:
        if tensor is None:
            key.append(None)
            continue
        key += tensor.shape, tensor.stride(), tensor.dtype
        addresses = 2 * addresses + (tensor.data_ptr() % VECTOR == 0)
    plan = kept(_plans, (*key, addresses), lambda: _plan(arguments, tensors, config))
    if plan is not None:
        plan(tensors)


def prepare(arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Compile the kernel for such a call, of real or fake tensors, into the disk cache; nothing without a GPU.

    Raises ImportError without NVRTC, RuntimeError where the source does not compile, Unsupported where the row dims of
    these tensors do not collapse to three.
    """
    if not torch.cuda.is_available():
        return
    arguments = with_defaults(arguments)
    rows, axes = _rows(arguments, outputs["out"])
    aligned = dict.fromkeys((*NAMES, "out"), True)
    chosen = choose(rows, axes)
    cubin(source(), macros(arguments, outputs["out"], rows, axes, aligned, chosen), _arch(arguments["x"].device))


@functools.cache
def source() -> str:
    return Path(__file__).with_suffix(".cu").read_text()


def lanes_of(d: int, half: bool) -> int:
    """Lanes that share a row."""
    return min(32, d // (BLOCK * (2 if half else 1)))


def choose(rows: Rows, axes: list[Axis]) -> Config:
    """Rows enough to keep ELEMENTS a lane in flight, but no more than there are."""
    wanted = max(1, min(MAX_ROWS, ELEMENTS * lanes_of(rows.d, rows.half) // rows.d))
    size = axes[0].size
    while isinstance(size, int) and wanted > size:
        wanted //= 2
    return Config(wanted)


def macros(
    arguments: Mapping[str, Any],
    out: Any,
    rows: Rows,
    axes: list[Axis],
    aligned: Mapping[str, bool],
    config: Config,
) -> dict[str, int]:
    """What a kernel is specialised to. aligned: tensor -> whether its pointer is on a VECTOR boundary."""

    def kind(tensor: Any) -> int:
        return 0 if tensor is None else KINDS[tensor.dtype]

    def vectors(name: str) -> bool:
        tensor = out if name == "out" else arguments[name]
        if tensor is None:
            return True
        steps = (axis.strides[name] * tensor.element_size() for axis in axes)
        return aligned[name] and all(statically_known_true(step % VECTOR == 0) for step in steps)

    rotates = arguments["rotation"] != "none"
    per_row = rotates and not all(_still(axes[0], name) for name in ("cos", "sin"))
    values = {
        "D": rows.d,
        "R": rows.r,
        "ROWS": config.rows,
        "THREADS": config.threads,
        "NORM": NORMS.index(arguments["norm"]),
        "NORM_LAST": bool(arguments["norm_last"]),
        "ROTATION": ROTATIONS.index(arguments["rotation"]),
        "TABLES": TABLES.index(arguments["tables"]) if rotates else 0,
        "ROW_TABLES": per_row,
        "X_KIND": kind(arguments["x"]),
        "WEIGHT_KIND": kind(arguments["weight"]),
        "BIAS_KIND": kind(arguments["bias"]),
        "TABLE_KIND": kind(arguments["cos"]),
        "OUT_KIND": kind(out),
        "HAS_WEIGHT": arguments["weight"] is not None,
        "HAS_BIAS": arguments["bias"] is not None,
        "X_ALIGNED": vectors("x"),
        "WEIGHT_ALIGNED": vectors("weight"),
        "BIAS_ALIGNED": vectors("bias"),
        "TABLE_ALIGNED": vectors("cos") and vectors("sin"),
        "OUT_ALIGNED": vectors("out"),
    }
    return {f"DK_{name}": int(value) for name, value in values.items()}


def _rows(arguments: Mapping[str, Any], out: Any) -> tuple[Rows, list[Axis]]:
    """The rows, and three axes of them, the tile's first: if possible one along which the tables stay the same."""
    rows = see(arguments, out)
    axes = list(rows.axes)
    still = next((i for i, axis in enumerate(axes) if _still(axis, "cos") and _still(axis, "sin")), 0)
    axes.insert(0, axes.pop(still))
    return rows, [*axes, *(Axis(1, dict.fromkeys(rows.inner, 0)) for _ in range(3 - len(axes)))]


def _still(axis: Axis, name: str) -> bool:
    stride: Int = axis.strides.get(name, 0)
    return isinstance(stride, int) and stride == 0


def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _kernel(settings: tuple[tuple[str, int], ...], device: int) -> Kernel:
    return Kernel(cubin(source(), dict(settings), _arch(torch.device("cuda", device))), "norm_rope", device)


def _plan(arguments: Mapping[str, Any], tensors: tuple[Any, ...], config: Config | None) -> Plan | None:
    x, out = arguments["x"], tensors[-1]
    if x.numel() == 0:
        return None
    rows, axes = _rows(arguments, out)
    chosen = config or choose(rows, axes)
    names = (*NAMES, "out")
    aligned = {n: t is None or t.data_ptr() % VECTOR == 0 for n, t in zip(names, tensors, strict=True)}
    settings = macros(arguments, out, rows, axes, aligned, chosen)
    tiles = -(-int(axes[0].size) // chosen.rows)
    total = tiles * int(axes[1].size) * int(axes[2].size)
    if max(total, int(axes[0].size)) >= MAX_TILES:
        raise ValueError(f"norm_rope of {x.numel() // rows.d} rows exceeds {MAX_TILES} tiles; split x.")
    filled = Arguments(
        n0=int(axes[0].size),
        n1=int(axes[1].size),
        tiles=tiles,
        total=total,
        eps=arguments["eps"],
        weight_offset=arguments["weight_offset"],
    )
    for name in ("x", "cos", "sin", "out"):
        setattr(filled, f"{name}_stride", (ctypes.c_int64 * 3)(*(int(axis.strides.get(name, 0)) for axis in axes)))
    groups = chosen.threads // lanes_of(rows.d, rows.half)
    kernel = _kernel(tuple(settings.items()), x.device.index)
    return Plan(kernel, -(-total // groups), chosen.threads, filled)
