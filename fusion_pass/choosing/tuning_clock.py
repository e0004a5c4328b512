"""Kernel launches timed side by side on a GPU, on tensors of their own.

Inputs are cold: launches rotate among sets of tensors that together exceed the L2 cache several times, as in
`dkfuse.bench.timing`, unless that takes more than MOST_SETS. A round is one series of launches of every candidate,
queued while the GPU is kept busy, so that no launch waits for the CPU; candidates take turns, so that clocks drift for
all of them. Random numbers come from a generator of its own, results are written to memory of its own, and all of it is
given back.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from dkfuse.kernels.launch import Launch, keywords, run

from .. import compat
from ..errors import first_line

log = logging.getLogger("dkfuse")
COLD_BYTES = 256 << 20  # several times the L2 cache of any current GPU
MOST_SETS = 48
LAUNCHES = 12  # of one candidate in a round, at least
ROUNDS = 5  # of each of two series
SHARE = 0.5  # of the free memory
BUSY_CYCLES = 60_000  # of the GPU, for each launch that is queued meanwhile: about 30 us
ACCESS = 16  # bytes; Triton compiles for addresses that are multiples of it, or not
THREADS = 8
RETRIES = 2  # of a compilation in which Python's parser failed
Tensors = dict[str, torch.Tensor]


def times(launches: Sequence[Launch], tensors: Mapping[str, Any]) -> list[tuple[float, float]] | None:
    """Microseconds of each launch, the medians of two series; (inf, inf) where it does not compile or run.

    tensors: what `launches` name, of known sizes on one GPU, fake or not: they are neither read nor written. None where
    tensors like them need more than SHARE of the free memory.
    """
    device = next(iter(tensors.values())).device
    with compat.real_tensors(), torch.no_grad(), torch.cuda.device(device):
        per_set = sum(extent(t) * t.element_size() for t in tensors.values())
        count = sets_needed(per_set)
        if count * per_set > SHARE * _free(device):
            log.debug("dkfuse: %d bytes are too many to time %s with", count * per_set, launches[0].config_text)
            return None
        sets: list[Tensors] = []
        try:
            sets.append(like(tensors, torch.Generator(device).manual_seed(0)))
            while len(sets) < count:
                sets.append(_copies(sets[0]))
            return _series(launches, sets)
        except torch.cuda.OutOfMemoryError as error:
            log.debug("dkfuse: no memory to time %s with: %s", launches[0].config_text, first_line(error))
            return None
        finally:
            sets.clear()
            torch.cuda.empty_cache()


def sets_needed(bytes_per_call: int) -> int:
    """How many sets of tensors of this size keep every launch cold, MOST_SETS at most."""
    return max(1, min(MOST_SETS, math.ceil(COLD_BYTES / bytes_per_call)))


def like(tensors: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """Random tensors with the shapes, strides, dtypes and alignment of `tensors`."""
    found = {}
    for name, tensor in tensors.items():
        start = misalignment(tensor) // tensor.element_size()
        memory = torch.empty(start + extent(tensor), dtype=tensor.dtype, device=generator.device)
        if tensor.dtype.is_floating_point:
            memory.normal_(generator=generator)
        elif tensor.dtype == torch.bool:  # a mask of tokens
            memory.random_(0, 2, generator=generator)
        else:  # numbers of rows, of which there may be one only
            memory.zero_()
        found[name] = memory.as_strided(tuple(tensor.shape), tensor.stride(), start)
    return found


def misalignment(tensor: Any) -> int:
    """Bytes from the last multiple of ACCESS to the tensor's start, if its storage starts at one."""
    return tensor.storage_offset() * tensor.element_size() % ACCESS


def extent(tensor: Any) -> int:
    """Elements from the first of a tensor to its last, in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _copies(tensors: Tensors) -> Tensors:
    copies = {}
    for name, tensor in tensors.items():
        memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).clone()
        copies[name] = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return copies


def _free(device: torch.device) -> int:
    """Bytes that may be allocated, those included that torch holds and nobody uses."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def _series(launches: Sequence[Launch], sets: Sequence[Tensors]) -> list[tuple[float, float]]:
    compile_together(launches, sets[0])
    runs = [_runs(launch, sets[0]) for launch in launches]
    torch.cuda.synchronize()
    found: list[list[float]] = [[] for _ in launches]
    for _ in range(2 * ROUNDS):
        for own, launch, works in zip(found, launches, runs, strict=True):
            own.append(_round(launch, sets) if works else math.inf)
    return [(statistics.median(own[:ROUNDS]), statistics.median(own[ROUNDS:])) for own in found]


class _Compilers(ThreadPoolExecutor):
    """Threads that say why a kernel was not compiled, which Triton's mode drops, and try again where that may help.

    Python 3.11.7, for one, counts the depth of syntax trees for all threads together, so that one that is parsed beside
    another may fail with a SystemError (CPython's gh-106905).
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def compiled(left: int = RETRIES) -> Any:
            try:
                return fn(*args, **kwargs)
            except Exception as error:
                if left and _of_the_parser(error):
                    return compiled(left - 1)
                log.debug("dkfuse: a configuration is not compiled", exc_info=True)
                raise

        return super().submit(compiled)


def _of_the_parser(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, SystemError):
        error = error.__cause__
    return error is not None


def compile_together(launches: Sequence[Launch], tensors: Tensors) -> None:
    """Compile the kernels of `launches` in threads. One that cannot be compiled says so when it is launched."""
    from triton import AsyncCompileMode

    workers = max(1, min(THREADS, os.cpu_count() or 1, len(launches)))
    try:
        with _Compilers(workers) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for launch in launches:
                launch.kernel.warmup(grid=launch.grid, **keywords(launch, tensors))
    except Exception as error:  # each is compiled when it is launched, and fails alone
        log.debug("dkfuse: configurations are compiled one by one: %s", first_line(error))


def _runs(launch: Launch, tensors: Tensors) -> bool:
    try:
        run(launch, tensors)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler or the driver: the other candidates are still worth having
        log.debug("dkfuse: configuration %s does not run: %s", launch.config_text, first_line(error))
        return False
    return True


def _round(launch: Launch, sets: Sequence[Tensors]) -> float:
    """Microseconds of a launch, the mean of as many as there are sets, or more."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    count = len(sets) * math.ceil(LAUNCHES / len(sets))
    compat.keep_busy(BUSY_CYCLES * count)
    start.record()
    for i in range(count):
        run(launch, sets[i % len(sets)])
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / count


__all__ = ["extent", "like", "misalignment", "sets_needed", "times"]
