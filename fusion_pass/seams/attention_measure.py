"""Attention kernels timed on the GPU that will run them, once per call and machine.

Times are kept in the process and on disk (`disk_cache`, kind "attention"), under the call, the GPU, torch and the
kernels' versions. With numbers of keys every key takes part, the longest that a call can be; `DENSE` is torch's own
attention then, given the mask as `[B, 1, 1, Sk]` bias. Where keys are brought in order first, that is timed with it.
"""

from __future__ import annotations

import logging
import math
import statistics
from typing import Any

import torch

from dkfuse.kernels import attention_kept, attention_kernels, cute_ahead

from .. import compat
from ..choosing.tuning_clock import extent
from ..errors import first_line
from . import kept_times, late
from .attention_table import DENSE

log = logging.getLogger("dkfuse")
REPEATS = 15
FEW = 128  # tokens to try a kernel with
KIND = "attention"
_known: dict[tuple[str, ...], dict[str, float]] = {}
_failures: dict[tuple[Any, ...], str | None] = {}


def times(
    tensors: list[torch.Tensor],
    causal: bool,
    kernels: list[str],
    folder: str | None,
    lengths: bool = False,
    sure: int = 0,
    reorders: bool = False,
) -> dict[str, float]:
    """Microseconds of each kernel for a call with q, k, v like `tensors` (fake, of known sizes); inf where it failed.

    folder: the cache folder of the settings; lengths: with numbers of keys, sure: of which so many take part
    in any case; reorders: k and v are brought in order for kernels that take numbers. The tensors that it is timed on
    are random, on the same device.
    """

    def measure(names: list[str]) -> dict[str, float]:
        generator = torch.Generator(tensors[0].device).manual_seed(0)  # not torch's own, whose numbers are the model's
        real = [_random(t, generator) for t in tensors]
        return {name: _time(real, causal, name, lengths, sure, reorders) for name in names}

    key = _key(tensors, causal, lengths, sure, reorders)
    return kept_times.times(_known, KIND, key, kernels, folder, measure)


def failure(kernel: str, q: torch.Tensor, k: torch.Tensor, causal: bool, lengths: bool = False) -> str | None:
    """What goes wrong when `kernel` is built and run once, for few tokens of this kind; None where nothing does.

    It is built here, rather than when the compiled code first runs; where a helper can build it, it is tried `late`.
    Without a GPU nothing is tried.
    """
    if q.device.type != "cuda" or not torch.cuda.is_available():
        return None
    head_dim = compat.hint(q.shape[3]) or 0
    groups = (compat.hint(q.shape[1]) or 1) // (compat.hint(k.shape[1]) or 1)
    key = (kernel, q.device, q.dtype, head_dim, groups, causal, lengths)
    kind = attention_kept.Kind.of(q.dtype, head_dim, groups, causal, lengths)

    def attempt() -> str | None:
        if key in _failures:
            return _failures[key]
        if kernel == "fa4":
            attention_kept.wait(kind)
        with compat.real_tensors(), torch.no_grad():
            sizes = [(1, FEW, heads, head_dim) for heads in (groups, 1, 1)]
            few = [_numbers(s, q).transpose(1, 2) for s in sizes]
            _failures[key] = _tried(few, causal, kernel, lengths)
        return _failures[key]

    def submit() -> bool:
        major, minor = torch.cuda.get_device_capability(q.device)
        return attention_kept.submit(kind, 10 * major + minor) or cute_ahead.importing()

    if kernel == "fa4" and key not in _failures and late.add(key, submit, attempt):
        return None
    return attempt()


def _numbers(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Some numbers that differ, not drawn from torch's random ones, as the user's seed is the user's."""
    count = torch.arange(math.prod(shape), device=like.device, dtype=torch.float32)
    return count.sin_().to(like.dtype).view(shape)


def _tried(tensors: list[torch.Tensor], causal: bool, kernel: str, lengths: bool = False) -> str | None:
    try:
        _call(_operands(tensors, kernel, lengths), causal, kernel, FEW - 1 if lengths else 0)
        torch.cuda.synchronize(tensors[0].device)
    except torch.OutOfMemoryError:  # says nothing of the kernel, and there may be memory later
        return None
    except Exception as error:
        log.warning("dkfuse: attention kernel %s cannot be used: %s", kernel, first_line(error))
        return first_line(error)
    return None


def _operands(tensors: list[torch.Tensor], kernel: str, lengths: bool) -> list[torch.Tensor | None]:
    """q, k, v, mask and numbers of keys, all of which take part."""
    q, k, _ = tensors
    if not lengths:
        return [*tensors, None, None]
    if kernel == DENSE:
        return [*tensors, q.new_zeros((q.shape[0], 1, 1, k.shape[2])), None]
    return [*tensors, None, torch.full((q.shape[0],), k.shape[2], dtype=torch.int32, device=q.device)]


def reordered(k: torch.Tensor, v: torch.Tensor, order: torch.Tensor) -> list[torch.Tensor]:
    """k and v in one order for all samples, which eager copies as fast as compiled code does any order."""
    return [t.transpose(1, 2).index_select(1, order).transpose(1, 2) for t in (k, v)]


def _call(operands: list[Any], causal: bool, kernel: str, sure: int, order: Any = None) -> torch.Tensor:
    import dkfuse.kernels.attention  # noqa: F401  (registers the op)

    if order is not None:
        q, k, v, *others = operands
        operands = [q, *reordered(k, v, order), *others]
    gqa = operands[0].shape[1] != operands[1].shape[1]
    using = "sdpa" if kernel == DENSE else kernel
    return torch.ops.dkfuse.attention(*operands, causal=causal, gqa=gqa, using=using, sure=sure)


def _key(
    tensors: list[torch.Tensor], causal: bool, lengths: bool, sure: int, reorders: bool = False
) -> tuple[str, ...]:
    calls = [(tuple(t.shape), t.stride(), str(t.dtype), str(t.device)) for t in tensors]
    return (
        f"{calls}{causal}{lengths}{sure}{'reorders' * reorders}",
        compat.environment_fingerprint(),
        attention_kernels.versions(),
    )


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    memory = torch.randn(extent(like), dtype=like.dtype, device=like.device, generator=generator)
    return memory.as_strided(tuple(like.shape), like.stride())


def _time(
    tensors: list[torch.Tensor],
    causal: bool,
    kernel: str,
    lengths: bool = False,
    sure: int = 0,
    reorders: bool = False,
) -> float:
    """Median of single calls, in microseconds, after two that compile and warm up."""
    device = tensors[0].device
    try:
        operands, order = _operands(tensors, kernel, lengths), None
        if reorders and kernel != DENSE:
            order = torch.arange(tensors[1].shape[2], device=device)
        for _ in range(2):
            _call(operands, causal, kernel, sure, order)
        torch.cuda.synchronize(device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
        for start, end in events:  # without waiting, so that the GPU is busy while the next call is prepared
            start.record()
            _call(operands, causal, kernel, sure, order)
            end.record()
        torch.cuda.synchronize(device)
        found = [start.elapsed_time(end) * 1e3 for start, end in events]
    except Exception as error:
        log.warning("dkfuse: attention kernel %s failed at %s: %s", kernel, list(tensors[0].shape), first_line(error))
        return float("inf")
    return statistics.median(found)
