"""What the bench asks of a GPU: times, profiles, memory. Tests give it another one.

timed(run)     wall and CPU milliseconds of one call on an idle GPU: CPU is the time until the call returns, while
               the GPU still works; longer than the launches took where more than QUEUE of them were waiting
looped(run, n) milliseconds that one of n calls takes the GPU, idle between kernels or not, of calls without a pause
               after n others: what a denoising loop takes for a forward
profiled(run, before)
               every kernel of one call in the order of launch, after `before` calls without a pause: clocks are then
               those of a long run, at the power limit where the model reaches it, as in a denoising loop
peak(run)      the most memory that was allocated during one call, in GiB, weights included
copy(n)        microseconds of a copy that reads and writes n bytes in total
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .. import compat

QUEUE = 1000  # launches that CUDA queues before it makes the CPU wait
MARK = "spin_kernel"  # of compat.keep_busy


@dataclass(frozen=True)
class Launched:
    """One kernel as the profiler saw it."""

    name: str
    microseconds: float


@dataclass(frozen=True)
class Timed:
    """One call, in milliseconds."""

    wall: float
    cpu: float


class Device(Protocol):
    """See the module's docstring."""

    kind: str  # of torch.device
    name: str

    def timed(self, run: Callable[[], Any]) -> Timed: ...
    def looped(self, run: Callable[[], Any], calls: int) -> float: ...
    def profiled(self, run: Callable[[], Any], before: int = 0) -> list[Launched]: ...
    def peak(self, run: Callable[[], Any]) -> float: ...
    def copy(self, traffic: int) -> float: ...
    def synchronize(self) -> None: ...
    def free(self) -> None: ...
    def seconds(self, run: Callable[[], Any]) -> float: ...


class Cuda:
    """The current CUDA device."""

    kind = "cuda"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self.name = torch.cuda.get_device_name()

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        self._torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Wall time of one call, in seconds."""
        return self.timed(run).wall / 1000

    def timed(self, run: Callable[[], Any]) -> Timed:
        self.synchronize()
        start = time.perf_counter()
        result = run()  # kept until the clock has stopped
        returned = time.perf_counter()
        self.synchronize()
        end = time.perf_counter()
        del result
        return Timed((end - start) * 1000, (returned - start) * 1000)

    def looped(self, run: Callable[[], Any], calls: int) -> float:
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        for mark in (start, end):
            for _ in range(calls):
                run()
            mark.record()
        self.synchronize()
        return start.elapsed_time(end) / calls

    def profiled(self, run: Callable[[], Any], before: int = 0) -> list[Launched]:
        torch = self._torch
        self.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(before):
                run()
            compat.keep_busy(1)  # a kernel that no model has: what comes after it is the call that is asked for
            run()
            self.synchronize()
        events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda e: e.time_range.start)
        marks = [i for i, e in enumerate(events) if MARK in e.name]
        if len(marks) != 1:
            raise RuntimeError(f"the profile of one call holds {len(marks)} launches of {MARK}, 1 was made")
        events = events[marks[0] + 1 :]
        return [Launched(e.name, e.self_device_time_total) for e in events if e.self_device_time_total > 0]

    def peak(self, run: Callable[[], Any]) -> float:
        self.free()
        self._torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronize()
        return self._torch.cuda.max_memory_allocated() / 2**30

    def copy(self, traffic: int) -> float:
        from .timing import copy_microseconds

        return copy_microseconds(traffic)
