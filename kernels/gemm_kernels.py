"""What quack's GEMM for Hopper takes, and which versions of it are used: nothing here imports it.

`quack-kernels` (Apache 2.0, Wentao Guo, Ted Zadouri, Tri Dao) is written in CuTe DSL; `flash-attn-4` installs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .packages import between, installed
from .registry import Constraint
from .unsupported import Unsupported

QUACK, CUBLAS = "quack", "cublas"
NAMES = (CUBLAS, QUACK)
ACTIVATIONS = ("none", "gelu", "silu_first", "silu_second")
GATED = ("silu_first", "silu_second")
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: tiles of a result, tiles that share what they load (a cluster), both as (rows, columns).

    pingpong: two warp groups compute a tile each in turns, instead of one tile together.
    """

    tile: tuple[int, int]
    cluster: tuple[int, int]
    pingpong: bool


# each is a kernel to compile, so there are few
TILES = {
    "128x192": Tiles((128, 192), (2, 1), True),
    "128x160": Tiles((128, 160), (2, 1), True),
}
DEFAULT_TILES = "128x192"  # of ten measured the fastest at two thirds of the shapes, the other one at the rest
ALIGNMENT = 8  # elements: the 16 bytes that a TMA descriptor asks of addresses and strides
CAPABILITY = 90
DISTRIBUTION = "quack-kernels"
# The parts of it that are called here are no public interface, so no other version is used. flash-attn-4 4.0.0b20 gets
# 0.5.3, whose nvidia-cutlass-dsl it can share; what was measured is 0.6.1.
TESTED = ("0.5.3", "0.6.1")
INSTALL = "pip install 'dkfuse[attention]'"


def _dtypes(arguments: Mapping[str, Any]) -> str | None:
    tensors = [arguments[n] for n in ("x", "weight", "bias") if arguments.get(n) is not None]
    found = {t.dtype for t in tensors}
    if len(found) == 1 and found <= set(HALF):
        return None
    return f"dtypes are {', '.join(sorted(str(d).removeprefix('torch.') for d in found))}, not all bf16 or all fp16"


def _layout(arguments: Mapping[str, Any]) -> str | None:
    for name in ("x", "weight"):
        tensor = arguments[name]
        if tensor.dim() != 2:
            return f"{name} has {tensor.dim()} dims, it must be a matrix"
        outer, inner = tensor.stride()
        if not statically_known_true(inner == 1) or not _aligned(outer) or not _aligned(tensor.storage_offset()):
            return (
                f"{name} has strides [{outer}, {inner}] from element {tensor.storage_offset()} on: rows without gaps "
                f"that begin at multiples of {ALIGNMENT} elements are needed"
            )
    bias = arguments.get("bias")
    if bias is not None and not (statically_known_true(bias.stride(0) == 1) and _aligned(bias.storage_offset())):
        return f"the bias has stride {bias.stride(0)} from element {bias.storage_offset()} on: a dense one is needed"
    return None


def _sizes(arguments: Mapping[str, Any]) -> str | None:
    n, k = arguments["weight"].shape
    unit = 2 * ALIGNMENT if arguments["act"] in GATED else ALIGNMENT
    if not isinstance(k, int) or not isinstance(n, int):
        return f"a weight of {n} x {k} has a symbolic size"
    if k % ALIGNMENT or n % unit or not k or not n:
        return f"a weight of {n} x {k}: {unit} must divide its rows and {ALIGNMENT} its columns"
    return None


def _aligned(value: Any) -> bool:
    return statically_known_true(value % ALIGNMENT == 0)


CONSTRAINTS = (
    Constraint("dtype", "x, weight and bias all bf16 or all fp16", _dtypes),
    Constraint("alignment", "8 divides K and N, 16 divides N of a gated one", _sizes),
    Constraint("layout", "x and weight [rows, K] with dense rows of whole 16 bytes, a dense bias", _layout),
)


def problem(arguments: Mapping[str, Any], capability: int) -> Unsupported | None:
    """Why quack's GEMM cannot serve ``dkfuse::linear`` of these arguments on a GPU of this capability; None if it can.

    arguments: x, weight, bias (fake or real) and act, as the op takes them.
    """
    if capability != CAPABILITY:
        return Unsupported("arch", f"quack's GEMM is used on sm{CAPABILITY}, not on sm{capability}")
    for constraint in CONSTRAINTS:
        if (message := constraint.problem(arguments)) is not None:
            return Unsupported(constraint.code, f"quack: {message}")
    return None


def version() -> str | None:
    """The installed version of quack, or None."""
    return installed(DISTRIBUTION)


def untested() -> str | None:
    """Why the installed version is not used, in one sentence; None where it is, or where there is none."""
    found = version()
    if found is None or between(found, TESTED):
        return None
    return f"{DISTRIBUTION} {found} is outside of what was tested ({' to '.join(dict.fromkeys(TESTED))}): {INSTALL}"


def fingerprint() -> str:
    """What a compiled graph depends on."""
    return f"{DISTRIBUTION}={version()}"
