"""quack's GEMM for Hopper: a product of bf16 or fp16 matrices, with what comes after it done before it is written.

    out = act(x @ weight.T + bias)        see `dkfuse.kernels.gemm`

A persistent, warp-specialised kernel: TMA loads, two consumer warp groups that take turns at the tensor cores, so that
one's epilogue runs under the other's products ("pingpong", as in CUTLASS). How it is cut is named by `tiles`
(`gemm_kernels.TILES`); quack's autotuner is not asked. Kernels are compiled once per dtype, act, bias and tiles, not
per shape, in 2 to 3 s, ahead by helpers (`gemm_ahead`) or here, and kept on disk as shared libraries: a process that
finds one there calls it without importing quack or the CuTe DSL.

A gated act takes the weight as it lies, [first half; second half]: TMA deals its rows out in turns, so that a thread
has both values of a pair. A bias would have to lie like that too; it is dealt out by a copy of [N] elements a call.

Nothing synchronises or allocates here but that copy; launches go to PyTorch's current stream.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cute_ahead, gemm_ahead
from .gemm_kernels import ALIGNMENT, DEFAULT_TILES, GATED, TILES

SWIZZLE = 8  # the most clusters of a column of tiles that run side by side
NAMES = {"gelu": "gelu_tanh_approx", "silu_first": "swiglu", "silu_second": "dkfuse_swiglu_second"}

# what quack 0.5.3 makes the CuTe DSL say at each compilation of a kernel; it works all the same
HARMLESS = r"Argument epilogue_args \(position \d+\) cannot be converted to a JitArgument for function '\w*quack"

_calls: dict[tuple[Any, ...], Callable[[Tensor, Tensor, Tensor | None, Tensor], None]] = {}
_lock = threading.Lock()


def run(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, out: Tensor, tiles: str = DEFAULT_TILES) -> None:
    """Compute into `out` [M, N or N/2], contiguous, on the current device, which is that of all tensors; M > 0."""
    row = vector(bias, act) if bias is not None else None
    launch(batched(readable(x)), batched(readable(weight)), row, act, batched(out), tiles)


def launch(a: Tensor, b: Tensor, row: Tensor | None, act: str, out: Tensor, tiles: str) -> None:
    """The same of operands as the kernels take them: `batched`, and the bias as `vector` gives it."""
    key = (a.dtype, act, row is not None, tiles, a.device.index)
    call = _calls.get(key)
    if call is None:
        with _lock:
            call = _calls.get(key)
            if call is None:
                call = _calls[key] = _made(a.dtype, act, row is not None, tiles, a.device)
    call(a, b, row, out)


def readable(matrix: Tensor) -> Tensor:
    """`matrix`, or a copy where TMA could not read it: its rows have gaps, or they do not begin at whole 16 bytes."""
    outer, inner = matrix.stride()
    if inner == 1 and outer % ALIGNMENT == 0 and outer >= matrix.shape[1] and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def batched(matrix: Tensor) -> Tensor:
    """[rows, columns] as [rows, columns, 1], as quack's kernels take matrices."""
    rows, outer = matrix.shape[0], matrix.stride(0)
    return matrix.as_strided((rows, matrix.shape[1], 1), (outer, 1, rows * outer))


def vector(bias: Tensor, act: str) -> Tensor:
    """[1, N], dense and aligned, in the order of the product's columns: first and second half in turns if gated."""
    if act in GATED:
        return bias.view(2, -1).t().reshape(1, -1)
    if bias.stride(0) != 1 or bias.data_ptr() % 16:
        bias = bias.clone(memory_format=torch.contiguous_format)
    return bias.unsqueeze(0)


def _made(dtype: torch.dtype, act: str, bias: bool, tiles: str, device: torch.device) -> Callable[..., None]:
    """A function that launches the kernel of this kind."""
    kernel, form = compiled(dtype, act, bias, tiles, torch.cuda.get_device_capability(device))
    rows, columns = TILES[tiles].cluster
    schedule = (*form.schedule[: form.clusters], clusters(rows * columns, device), *form.schedule[form.clusters + 1 :])
    before, after = (None,) * form.row, (None,) * (form.fields - form.row - 1)
    if act == "none":

        def plain(a: Tensor, b: Tensor, row: Tensor | None, out: Tensor) -> None:
            kernel(a, b, out, None, (*before, row, *after), schedule, None)

        return plain

    before = before[1:]  # the result is the first of them

    def activated(a: Tensor, b: Tensor, row: Tensor | None, out: Tensor) -> None:
        kernel(a, b, None, None, (out, *before, row, *after), schedule, None)

    return activated


@dataclass(frozen=True)
class Form:
    """What calls of a kernel have besides matrices, as quack's named tuples have it in the installed version.

    fields: how many its epilogue's arguments are; row: which of them is the bias. schedule: the tile scheduler's
    arguments; clusters: which of them says how many clusters run at once. What is known when a kernel is compiled is
    None in its calls, and so are the other fields of the epilogue.
    """

    fields: int
    row: int
    schedule: tuple[int | None, ...]
    clusters: int

    @classmethod
    def of(cls, act: str) -> Form:
        """Of quack, which is imported."""
        from quack.gemm_act import GemmActMixin
        from quack.gemm_default_epi import GemmDefaultEpiMixin
        from quack.gemm_tvm_ffi_utils import make_scheduler_args

        fields = (GemmDefaultEpiMixin if act == "none" else GemmActMixin).EpilogueArguments._fields
        options = make_scheduler_args(1, SWIZZLE, None)
        schedule = tuple(options._replace(max_active_clusters=None))
        if not all(value is None or type(value) is int for value in schedule):
            raise TypeError(f"quack's scheduler takes other arguments than were read: {options}")
        if act != "none" and fields[0] != "mAuxOut":
            raise TypeError(f"quack's epilogue takes other arguments than were read: {', '.join(fields)}")
        row, number = fields.index("mRowVecBroadcast"), options._fields.index("max_active_clusters")
        return cls(len(fields), row, schedule, number)

    @classmethod
    def read(cls, kept: dict[str, Any]) -> Form:
        """From a file: `vars` of one."""
        return cls(**{**kept, "schedule": tuple(kept["schedule"])})


def clusters(size: int, device: torch.device) -> int:
    """How many clusters of `size` blocks run side by side on a GPU where each block takes an SM of its own.

    quack compiles an empty kernel to ask, in each process anew. The SMs of a Hopper GPU come in pairs, and a cluster of
    two takes a pair.
    """
    if size <= 2:
        return torch.cuda.get_device_properties(device).multi_processor_count // size
    from quack.cute_dsl_utils import get_max_active_clusters

    return get_max_active_clusters(size)


@functools.cache
def compiled(
    dtype: torch.dtype, act: str, bias: bool, tiles: str, capability: tuple[int, int]
) -> tuple[Callable[..., Any], Form]:
    """The compiled kernel and the form of its calls, once for a process: from disk, else compiled and kept there.

    To compile takes no GPU where QUACK_ARCH and CUTE_DSL_ARCH are set.
    """
    kind = gemm_ahead.Kind.of(dtype, act, bias, tiles)
    gemm_ahead.wait(kind)
    found = gemm_ahead.kept(kind)
    if found is None:
        cute_ahead.imported()
        function, arguments = asked(dtype, act, bias, tiles, capability)
        kernel = inspect.unwrap(function)(**arguments)  # not by quack's cache, whose files take quack to be read
        form = Form.of(act)
        gemm_ahead.keep(kind, kernel, form)
        found = gemm_ahead.kept(kind) or (kernel, form)  # the same way to call it in all processes
    return found


def asked(
    dtype: torch.dtype, act: str, bias: bool, tiles: str, capability: tuple[int, int]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of quack's that compiles the kernel, and what it is called with."""
    from quack.cute_dsl_utils import torch2cute_dtype_map

    warnings.filterwarnings("ignore", HARMLESS, UserWarning, r"cutlass\.base_dsl\.dsl$")
    element, cut = torch2cute_dtype_map[dtype], TILES[tiles]
    common: dict[str, Any] = {
        "a_dtype": element, "b_dtype": element, "c_dtype": None,
        "a_major": "k", "b_major": "k", "c_major": None,
        "tile_shape_mn": cut.tile, "cluster_shape_mnk": (*cut.cluster, 1),
        "pingpong": cut.pingpong, "persistent": True, "is_dynamic_persistent": False,
        "rowvec_dtype": element if bias else None, "colvec_dtype": None, "colvec_ndim": 0,
        "varlen_m": False, "gather_A": False, "use_tma_gather": False, "device_capacity": capability,
    }  # fmt: skip
    if act == "none":
        from quack.gemm import _compile_gemm
        from quack.rounding import RoundingMode

        return _compile_gemm, {
            **common, "d_dtype": element, "d_major": "n", "alpha_mode": 0, "beta_mode": 0, "add_to_output": False,
            "concat_layout": (), "varlen_k": False, "has_batch_idx_permute": False, "rounding_mode": RoundingMode.RN,
            "sr_seed_mode": 0, "num_warps": None,
        }  # fmt: skip
    from quack.gemm_act import _compile_gemm_act

    gated = act in GATED
    if act == "silu_second":
        _add_second()
    return _compile_gemm_act, {
        **common, "d_dtype": None, "d_major": None, "postact_dtype": element, "postact_major": "n",
        "activation": NAMES[act], "gemm_cls_name": "gated" if gated else "act",
        "concat_layout": ("B",) if gated else (),
    }  # fmt: skip


def _add_second() -> None:
    """Add SwiGLU of halves in the other order to what quack's kernels know by name."""
    from quack.activation import gate_fn_map, swiglu

    gate_fn_map.setdefault(NAMES["silu_second"], lambda up, gate: swiglu(gate, up))
