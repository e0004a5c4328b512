"""One model on all sides, in one process.

Compile time. Every side has caches of its own, empty at first. Cold: the first call, caches empty, after a small model
was compiled by each backend, so that imports and processes that compile (Inductor's workers, dkfuse's helper) are not
in it; dkfuse goes first, so that what is left of such costs falls on it, such as what torch does for a model's kind of
code the first time in a process. Warm: the first call after Dynamo and Inductor have forgotten what they hold in
memory, caches full. That is what a new process would find on disk, without its imports and its start of CUDA. Both
times end when the first forward has ended. What compilers of kernels outside of Inductor (CuTe DSL, NVRTC) hold in
memory stays there: for their share of a cold compile measure one model per process. Without the warm compile
(`--no-warm`) what was compiled cold is what runs.

Times. All sides run alternately, so that clocks drift for all of them; results are medians. A single call is timed
right after another one of its side, and more of them than were asked for where they are short (ENOUGH): the CPU's time
of a call differs by half for seconds on end where a host has other guests, for all sides alike. GPU time is the sum of
the kernels in a profile of one call, right after others of that side (STEADY): at the clocks of a long run, which are
lower than those of a single forward on an idle GPU where GEMMs reach the power limit. The time in a loop is taken at
those clocks too, and has in it what the GPU waits for between kernels. Packing (`--pack`) is done before anything is
compiled: all sides see the same weights, which are contiguous for each of them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import compat
from ..reporting.recording import record
from ..reporting.report import Coverage
from . import targets
from .averages import median, medians
from .classify import KINDS, kind
from .device import QUEUE, Device, Launched
from .reference import difference, outputs, tensors
from .results import OURS, ModelResult, Side
from .sides import Options, Run, caches_in, runner
from .sites import site_times
from .targets import Target

CALLS, ENOUGH = 200, 4000.0  # single calls of each side, unless `rounds` of all of them took so many milliseconds
STEADY = 300.0  # milliseconds of calls right before what is timed
MOST_BEFORE = 50
LOOPS = 9
WARM_UP = 3  # calls before the first timed one; CUDA graphs are recorded in them
Report = Callable[[str], None]


def measure(
    target: Target,
    options: Options,
    device: Device,
    compile: Callable[..., Any] = torch.compile,
    say: Report = lambda _: None,
) -> ModelResult:
    """Build `target` and compare all sides on it; `say` is told what is being done."""
    say(f"building {target.label}")
    compat.forget_compilations()
    device.free()
    module, kwargs = targets.build(target, options.layers, options.size, options.dtype, device.kind)
    try:
        return compare(target, module, kwargs, options, device, compile, say)
    finally:
        del module, kwargs
        compat.forget_compilations()
        device.free()


def compare(
    target: Target,
    module: nn.Module,
    kwargs: dict[str, Any],
    options: Options,
    device: Device,
    compile: Callable[..., Any],
    say: Report,
) -> ModelResult:
    """All sides of `module`; see the module's docstring."""
    result = ModelResult(
        target.name,
        {name: Side() for name in options.sides},
        target.batch or 1,
        options.layers,
        options.mode,
        options.pack,
        options.attention,
        targets.depth(target, options.layers, options.size),
        options.size,
        options.dtype,
    )
    with torch.no_grad(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        say(f"{target.label}: reference")
        reference, result.reference, result.note = outputs(module, kwargs, options.fp32)
        device.free()
        if options.pack:
            import dkfuse

            dkfuse.pack(module)  # type: ignore[attr-defined]
        make = {name: lambda name=name: runner(name, module, kwargs, options, compile) for name in options.sides}
        coverage, runs = _cold(result, make, device, Path(folder), say, keep=not options.warm)
        if options.warm:
            runs = _warm(result, make, device, Path(folder), say)
        for name, run in runs.items():
            if name != result.reference:
                result.sides[name].error = difference(tensors(run()), reference)
        del reference
        profiles = _times(result, runs, options, device, lambda text: say(f"{target.label}: {text}"))
        for name, run in runs.items():
            result.sides[name].peak_gib = device.peak(run)
    result.coverage = coverage.totals
    result.sites = site_times(coverage.sites, profiles[OURS], device.copy)
    return result


def prime(device: Device) -> None:
    """Profile a small model and compile it with both backends: imports, decompositions, compile workers."""
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()).to(device.kind)
    with torch.no_grad(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, caches_in(Path(folder)):
        inputs = torch.randn(32, 64, device=device.kind)
        device.profiled(lambda: module(inputs))  # before any CUDA graph is recorded
        for backend in ("inductor", OURS):
            torch.compile(module, backend=backend, dynamic=False)(inputs)
        device.synchronize()
    compat.forget_compilations()


def _cold(
    result: ModelResult, make: dict[str, Any], device: Device, folder: Path, say: Report, keep: bool
) -> tuple[Coverage, dict[str, Run]]:
    """Compile each side; `keep`: what was compiled stays, warmed up, and so do Dynamo's entries for the model."""
    found = Coverage()
    runs: dict[str, Run] = {}
    compat.forget_compilations()
    for name, maker in make.items():
        if name == "eager":
            if keep:
                runs[name] = _warmed_up(maker())
            continue
        say(f"{result.model}: compiling for {name}")
        (compat.forget_kernels if keep else compat.forget_compilations)()
        recording = record(result.model) if name == OURS else contextlib.nullcontext(found)
        with caches_in(folder / name), recording as seen:
            run = maker()
            result.sides[name].compile_cold = device.seconds(run)
            if keep:
                runs[name] = _warmed_up(run)
        if name == OURS:
            found = seen
        del run
        device.free()
    return found, runs


def _warmed_up(run: Run) -> Run:
    for _ in range(WARM_UP):
        run()
    return run


def _warm(result: ModelResult, make: dict[str, Any], device: Device, folder: Path, say: Report) -> dict[str, Run]:
    compat.forget_compilations()
    runs = {}
    for name, maker in make.items():
        say(f"{result.model}: {name}" + ("" if name == "eager" else ", compiling from its caches"))
        with caches_in(folder / name):
            run = maker()
            seconds = device.seconds(run)
            runs[name] = _warmed_up(run)
        if name != "eager":
            result.sides[name].compile_warm = seconds
    return runs


def _times(
    result: ModelResult, runs: dict[str, Run], options: Options, device: Device, say: Report
) -> dict[str, Sequence[Sequence[Launched]]]:
    """Fill in wall, loop, CPU and GPU times; the profiles."""
    say("timing")
    timed: dict[str, list[Any]] = {name: [] for name in runs}
    loops: dict[str, list[float]] = {name: [] for name in runs}
    profiles: dict[str, list[list[Launched]]] = {name: [] for name in runs}
    for i in range(max(options.rounds, CALLS)):
        if i >= options.rounds and sum(t.wall for found in timed.values() for t in found) > ENOUGH:
            break
        for name, run in runs.items():
            run()  # as in denoising, where a model comes after itself: its code is in the CPU's caches
            timed[name].append(device.timed(run))
    before = {n: max(1, min(MOST_BEFORE, round(STEADY / median(t.wall for t in found)))) for n, found in timed.items()}
    for _ in range(LOOPS):
        for name, run in runs.items():
            loops[name].append(device.looped(run, before[name]))
    say("profiling")
    for _ in range(options.profiles):
        for name, run in runs.items():
            profiles[name].append(device.profiled(run, before[name]))
    for name, side in result.sides.items():
        side.wall = median(t.wall for t in timed[name])
        side.loop = median(loops[name])
        side.launches = round(median(len(profile) for profile in profiles[name]))
        if side.launches < QUEUE or options.graphs(name):
            side.cpu = median(t.cpu for t in timed[name])
        side.kernels = medians([_by_name(profile) for profile in profiles[name]])
        for label in KINDS:
            side.split[label] = sum(ms for kernel, ms in side.kernels.items() if kind(kernel) == label)
    return dict(profiles)


def _by_name(profile: Sequence[Launched]) -> dict[str, float]:
    """Milliseconds by kernel."""
    found: dict[str, float] = {}
    for launched in profile:
        found[launched.name] = found.get(launched.name, 0.0) + launched.microseconds / 1000
    return found
