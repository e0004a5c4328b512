"""GPU timing for memory-bound kernels: cold inputs, no launch gaps, medians.

A call is captured many times in one CUDA graph, over rotating sets of inputs and outputs that together exceed the L2
cache several times, so every launch reads from memory and pays for the write-back of an earlier launch's results, as in
a model. A graph has no CPU gaps. The result is the median over replays of the replay's time per call.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..choosing import tuning_clock

LAUNCHES = 24
CALLS = 300  # of which the CPU's time is taken, fewer than CUDA queues


def sets_needed(bytes_per_call: int) -> int:
    """How many buffer sets of this size keep every launch cold, two at least."""
    return max(2, tuning_clock.sets_needed(bytes_per_call))


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 15) -> float:
    """Median time per call; `calls` are the same work on different buffer sets."""
    launches = [calls[i % len(calls)] for i in range(max(len(calls), min(LAUNCHES, 4 * len(calls))))]
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Results stay alive until the end of the capture: freed ones would be reused, and stay in cache.
        kept = [call() for call in launches]
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    del kept
    return statistics.median(times)


def cpu_microseconds(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Time of the CPU per call, of work that is too small to keep a GPU busy."""
    found = {}
    for name, call in calls.items():
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        found[name] = (time.perf_counter() - started) / CALLS * 1e6
        torch.cuda.synchronize()
    return found


@functools.cache
def copy_microseconds(traffic: int) -> float:
    """Time of a `copy_` that reads and writes `traffic` bytes in total, timed the same way, once for each size."""
    count = sets_needed(traffic)
    sources = [torch.randn(traffic // 4, device="cuda").to(torch.bfloat16) for _ in range(count)]
    targets = [torch.empty_like(source) for source in sources]
    return microseconds([lambda i=i: targets[i].copy_(sources[i]) for i in range(count)])  # type: ignore[misc]
