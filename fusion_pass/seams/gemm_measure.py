"""GEMMs timed on the GPU that will run them, and kernels tried there, once per call and machine.

Times are kept in the process and on disk (`disk_cache`, kind "gemm"), under the call, the GPU, torch and quack's
version. Kernels take turns of a few milliseconds, since most products run at the GPU's power limit, which an idle GPU
does not know; the fastest turn of each counts. cuBLAS's SwiGLU is its GEMM and one pass over the result, which Inductor
makes of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dkfuse.kernels import gemm, gemm_ahead, gemm_kernels
from dkfuse.kernels.gemm_kernels import CUBLAS, GATED, QUACK

from .. import compat
from ..errors import first_line
from . import kept_times, late

log = logging.getLogger("dkfuse")
TURNS = 5
TURN = 4.0  # milliseconds
FEW = 8  # rows, and tiles of columns, to try a kernel with
KIND = "gemm"
Key = tuple[Any, ...]  # of a kernel that is tried: tiles, act, bias, dtype, device
_known: dict[tuple[str, ...], dict[str, float]] = {}
_failures: dict[Key, str | None] = {}


@dataclass(frozen=True)
class Product:
    """A product to be computed: ``[rows, k] @ [k, columns]``, of known sizes, contiguous."""

    rows: int
    columns: int
    k: int
    act: str
    bias: bool
    dtype: torch.dtype
    device: torch.device


def times(product: Product, tiles: list[str], folder: str | None) -> dict[str, float]:
    """Microseconds of `gemm_kernels.CUBLAS` and of quack's GEMM by `tiles`; inf where it failed.

    folder: the cache folder of the settings. The tensors that it is timed on are random, on the same device.
    """
    names = [CUBLAS, *tiles]
    return kept_times.times(_known, KIND, _key(product), names, folder, lambda _: timed(product, names))  # in turns


def prepare(product: Product, tiles: list[str], folder: str | None) -> None:
    """Have helpers begin to compile what `times` would take the time of."""
    for name in kept_times.missing(_known, KIND, _key(product), tiles, folder):
        submit(product, name)


def _key(product: Product) -> tuple[str, ...]:
    return repr(product), compat.environment_fingerprint(), gemm_kernels.fingerprint()


def failure(product: Product, tiles: str) -> str | None:
    """What goes wrong when quack's kernel for such products is built and run once, on few rows; None: nothing does.

    It is built here, rather than when the compiled code first runs; where a helper can build it, it is tried `late`.
    Without a GPU nothing is tried.
    """
    if product.device.type != "cuda" or not torch.cuda.is_available():
        return None
    key = (tiles, product.act, product.bias, product.dtype, product.device)
    few = Product(FEW, 16 * FEW, 8 * FEW, product.act, product.bias, product.dtype, product.device)
    if key not in _failures and late.add(key, partial(submit, product, tiles), partial(_try, key, few)):
        return None
    return _try(key, few)


def submit(product: Product, tiles: str) -> bool:
    """Have a helper compile quack's kernel; whether that is to be waited for."""
    return gemm_ahead.submit(gemm_ahead.Kind.of(product.dtype, product.act, product.bias, tiles))


def _try(key: Key, few: Product) -> str | None:
    if key not in _failures:
        with compat.real_tensors(), torch.no_grad():
            _failures[key] = _tried(few, key[0])
    return _failures[key]


def _tried(product: Product, tiles: str) -> str | None:
    try:
        x, weight, bias = _operands(product)
        found = torch.ops.dkfuse.linear(x, weight, bias, act=product.act, using=QUACK, tiles=tiles)
        expected = gemm.reference(x, weight, bias, act=product.act)
        if not torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.02):
            return f"its result is wrong by {(found.float() - expected.float()).abs().max().item():.3g}"
    except torch.OutOfMemoryError:  # says nothing of the kernel, and there may be memory later
        return None
    except Exception as error:
        log.warning("dkfuse: quack's GEMM cannot be used: %s", first_line(error))
        return first_line(error)
    return None


def _operands(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator(product.device).manual_seed(0)  # not torch's own, whose numbers are the model's

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=product.device, dtype=product.dtype, generator=generator)

    weight = random(product.columns, product.k) * product.k**-0.5
    return random(product.rows, product.k), weight, random(product.columns) if product.bias else None


def timed(product: Product, names: list[str], turns: int = TURNS, turn: float = TURN) -> dict[str, float]:
    """Microseconds of cuBLAS and of quack's GEMM by tiles, now: the best of `turns` of `turn` milliseconds.

    inf for a kernel that failed, and for all where there is no memory for the operands.
    """
    found, repeats = dict.fromkeys(names, float("inf")), dict.fromkeys(names, 1)
    try:
        x, weight, bias = _operands(product)
    except torch.OutOfMemoryError as error:
        log.warning("dkfuse: %s is not timed: %s", product, first_line(error))
        return found
    calls = {name: _call(name, product, x, weight, bias) for name in names}
    for name in names:
        try:
            calls[name]()
            milliseconds = _turn(calls[name], 3, product.device)
            repeats[name] = max(3, round(turn / max(milliseconds, 1e-3)))
        except Exception as error:
            log.warning("dkfuse: %s of %s failed when it was timed: %s", name, product, first_line(error))
            del calls[name]
    for _ in range(turns):
        for name, call in calls.items():
            found[name] = min(found[name], 1e3 * _turn(call, repeats[name], product.device))
    return found


def _call(
    name: str, product: Product, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[], Any]:
    if name != CUBLAS:
        return lambda: torch.ops.dkfuse.linear(x, weight, bias, act=product.act, using=QUACK, tiles=name)
    if product.act not in GATED:
        return lambda: gemm.by_cublas(x, weight, bias, product.act)

    def gated() -> torch.Tensor:
        first, second = torch.nn.functional.linear(x, weight, bias).chunk(2, -1)
        return first * second

    return gated


def _turn(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Milliseconds of one of `repeats` calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / repeats
