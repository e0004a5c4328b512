"""Which GEMM computes a linear, and what comes after it: cuBLAS's as PyTorch calls it, or quack's.

    dkfuse.gemm=cublas   always cuBLAS's
    dkfuse.gemm=quack    quack's wherever it can, or a rejection that says what it does not take
    max-autotune         the faster one, timed now
    otherwise            the faster one by the table, at the nearest measured product

quack's is taken where it is expected to gain `MARGIN`; less is noise between runs. Products that take less than
`LAUNCH_BOUND` stay with cuBLAS: models of such products are bound by the CPU, whose calls of either cost the same, and
not by the microseconds that are saved, except under CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dkfuse.kernels import gemm_kernels
from dkfuse.kernels.gemm_kernels import CUBLAS, DEFAULT_TILES, GATED, INSTALL, TILES

from .. import compat
from ..choosing.choose import resolve_target
from ..matching.rules import Code, Reject, Stage
from ..settings import Settings
from . import gemm_measure, gemm_table
from .gemm_measure import Product

MARGIN = 1.03
LAUNCH_BOUND, LAUNCHED_AT_ONCE = 100.0, 20.0  # microseconds; the latter under CUDA graphs
RIVALS = {"none": "cuBLAS", "gelu": "cublasLt's epilogue", "silu": "cuBLAS and Inductor's pass"}


def choose(
    values: Mapping[str, Any], act: str, rule: str, settings: Settings, build: bool = True, measure: bool = True
) -> str:
    """The tiles of quack's GEMM for ``dkfuse::linear`` of these fake tensors, or Reject, saying why it is cuBLAS's.

    values: x [M, K], weight [N, K] and bias; rule: the seam that asks; build: build the kernel and try it, now or when
    a helper has built it; measure: take times now under max-autotune, else by the table.
    """
    x = values["x"]
    if settings.gemm == CUBLAS:
        raise _left(Code.DISABLED, "left to cuBLAS by dkfuse.gemm=cublas")
    if not settings.allows(rule):
        raise Reject(Code.DISABLED, f"rule {rule} is switched off by dkfuse.rules", Stage.KERNEL)
    target, forced = resolve_target(settings.target, x.device), settings.gemm != "auto"
    if not target.startswith("sm"):
        raise _left(Code.NO_KERNEL, f"target is {target}: quack's GEMM is for NVIDIA GPUs")
    capability = int(target[2:])
    if (unsupported := gemm_kernels.problem({**values, "act": act}, capability)) is not None:
        raise _left(unsupported.code, unsupported.message)
    rows, (columns, k) = compat.hint(x.shape[0]), values["weight"].shape
    if rows is None:
        raise _left(Code.SYMBOLIC, "the number of rows depends on data, and decides which GEMM is faster")
    product = Product(rows, columns, k, act, values.get("bias") is not None, x.dtype, x.device)
    if forced:
        tiles, gain = _fastest(_expected(product, capability) or {})
    elif measure and _measures(x):
        tiles, gain = _by_time(product, settings)
    else:
        tiles, gain = _by_table(product, capability)
    if gemm_kernels.version() is None:
        text = f"quack's GEMM was measured at {gain:.2f}x {_rival(product)}, near {_named(product)}: {INSTALL}"
        raise _left(Code.NOT_INSTALLED, text)
    if (message := gemm_kernels.untested()) is not None:
        raise _left(Code.UNTESTED_VERSION, message)
    if build and (failed := gemm_measure.failure(product, tiles)) is not None:
        raise _left(Code.KERNEL_FAILED, f"quack's GEMM failed when it was tried: {failed}")
    return tiles


def prepare(values: Mapping[str, Any], act: str, rule: str, settings: Settings) -> None:
    """Have helpers begin to compile what `choose` would take the time of, before it is asked about the first call."""
    x, (columns, k) = values["x"], values["weight"].shape
    if settings.gemm != "auto" or not settings.allows(rule) or not _measures(x):
        return
    right = resolve_target(settings.target, x.device) == f"sm{gemm_kernels.CAPABILITY}"
    fits = right and gemm_kernels.problem({**values, "act": act}, gemm_kernels.CAPABILITY) is None
    if fits and x.shape[0] >= gemm_table.MIN_ROWS:
        product = Product(x.shape[0], columns, k, act, values.get("bias") is not None, x.dtype, x.device)
        gemm_measure.prepare(product, list(TILES), settings.cache_dir)


def _left(code: Code | str, message: str) -> Reject:
    return Reject(code, message, Stage.KERNEL, left=True)


def _named(product: Product) -> str:
    return f"{product.rows}x{product.columns}x{product.k}"


def _kind(product: Product) -> str:
    return "silu" if product.act in GATED else product.act


def _rival(product: Product) -> str:
    return RIVALS[_kind(product)]


def _expected(product: Product, capability: int) -> dict[str, float] | None:
    return gemm_table.gains(capability, _kind(product), product.rows, product.columns, product.k)


def _fastest(gains: Mapping[str, float]) -> tuple[str, float]:
    """The tiles of the largest gain, the default ones where others gain hardly more: each is a kernel to compile."""
    best = max(gains, key=lambda name: gains[name], default=DEFAULT_TILES)
    if gains.get(DEFAULT_TILES, 0.0) * 1.01 >= gains.get(best, 0.0):
        best = DEFAULT_TILES
    return best, gains.get(best, 1.0)


def shortest() -> float:
    """Products of fewer microseconds are not a matter of choice: what calls cost decides."""
    return LAUNCHED_AT_ONCE if compat.inductor_config("triton.cudagraphs") else LAUNCH_BOUND


def _by_table(product: Product, capability: int) -> tuple[str, float]:
    if product.rows < gemm_table.MIN_ROWS:
        text = f"{product.rows} rows: quack's GEMM was slower for all products of fewer than {gemm_table.MIN_ROWS}"
        raise _left(Code.NOT_FASTER, text)
    if (taken := gemm_table.microseconds(product.rows, product.columns, product.k)) < (least := shortest()):
        text = f"{_named(product)} takes about {taken:.0f} us: below {least:.0f} us the CPU's calls decide"
        raise _left("launch_bound", text)
    gains = _expected(product, capability)
    if gains is None:
        text = f"no products were measured near {_named(product)} on sm{capability}: {_rival(product)} stays"
        raise _left("unmeasured", text)
    tiles, gain = _fastest(gains)
    if gain < MARGIN:
        text = f"{_rival(product)} is as fast at {_named(product)}: quack's GEMM is expected at {gain:.2f}x"
        raise _left(Code.NOT_FASTER, text)
    return tiles, gain


def _measures(x: torch.Tensor) -> bool:
    """Whether GEMMs are timed now: asked for, on a GPU that is there, for known sizes, and quack can be used."""
    return (
        bool(compat.inductor_config("max_autotune"))
        and x.device.type == "cuda"
        and torch.cuda.is_available()
        and isinstance(x.shape[0], int)
        and gemm_kernels.version() is not None
        and gemm_kernels.untested() is None
    )


def _by_time(product: Product, settings: Settings) -> tuple[str, float]:
    if product.rows < gemm_table.MIN_ROWS:
        text = f"{product.rows} rows: products of fewer than {gemm_table.MIN_ROWS} are not timed, cuBLAS was faster"
        raise _left(Code.NOT_FASTER, text)
    if gemm_table.microseconds(product.rows, product.columns, product.k) < shortest():
        return _by_table(product, gemm_kernels.CAPABILITY)  # which says so
    gemm_measure.prepare(product, list(TILES), settings.cache_dir)
    found = gemm_measure.times(product, list(TILES), settings.cache_dir)
    if found[CUBLAS] == float("inf"):
        return _by_table(product, gemm_kernels.CAPABILITY)
    best, gain = _fastest({name: found[CUBLAS] / time for name, time in found.items() if name != CUBLAS})
    if gain < MARGIN:
        text = f"{_rival(product)} took {found[CUBLAS]:.0f} us, quack's GEMM {found[best]:.0f} us"
        raise _left(Code.NOT_FASTER, text)
    return best, gain
