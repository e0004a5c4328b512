"""Whole models against Inductor: GPU time by kind of kernel, and wall time, in one process.

    python -m dkfuse.bench.models flux sd35-large@2 wan21-14b [--layers 8] [--json FILE]

Each model is built at published width and token count with random weights, compiled by both backends with
``dynamic=False``, and run alternately. GPU time is the sum of kernel durations under the profiler (medians); a kernel
counts as GEMM, attention, dkfuse, Inductor, copy or other by its name. "Glue" is everything that is neither GEMM nor
attention.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

KINDS = (  # in this order: Inductor names its kernels after what it fused, attention and convolutions included
    ("dkfuse", re.compile(r"^dkfuse_")),
    ("inductor", re.compile(r"^triton_")),
    ("attention", re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE)),
    ("gemm", re.compile(r"gemm|nvjet|cutlass|xmma|splitk|cublas|gemv|conv", re.IGNORECASE)),
    ("copy", re.compile(r"memcpy|memset|copy|CatArray", re.IGNORECASE)),
)


@dataclass
class Side:
    """One backend on one model. Times in ms per forward; `split` is GPU time by kind of kernel."""

    compile_seconds: float = 0.0
    wall: float = 0.0
    split: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    peak_gib: float = 0.0
    error: float = 0.0  # relative to fp32 where it fits, else to eager

    @property
    def gpu(self) -> float:
        return sum(self.split.values())

    @property
    def glue(self) -> float:
        return sum(v for k, v in self.split.items() if k not in ("gemm", "attention"))


def kind(name: str) -> str:
    """Which kind of work a GPU kernel does, by its name."""
    return next((label for label, pattern in KINDS if pattern.search(name)), "other")


def profile(run: Callable[[], Any]) -> dict[str, float]:
    """GPU milliseconds of one call of `run`, by kernel."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] = kernels.get(event.name, 0.0) + event.self_device_time_total / 1000
    return kernels


def wall(run: Callable[[], Any]) -> float:
    """Milliseconds of one synchronised call."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in a model's output."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest relative error ||a - b|| / ||b|| over the outputs."""
    return max(((x.double() - y.double()).norm() / y.double().norm()).item() for x, y in zip(a, b, strict=True))


def measure(
    name: str, layers: int, rounds: int, mode: str | None = None, batch: int = 1
) -> tuple[dict[str, Side], Any]:
    """Both backends on `name`; (sides, coverage)."""
    import dkfuse
    from dkfuse import zoo

    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    module, kwargs = zoo.build(name, "full", "cuda", dtype=torch.bfloat16, layers=layers, batch=batch)
    sides: dict[str, Side] = {}
    runs: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        reference = tensors(module(**kwargs))
        with dkfuse.record(name) as coverage:
            for backend in ("inductor", "dkfuse"):
                compiled = torch.compile(module, backend=backend, dynamic=False, **({"mode": mode} if mode else {}))
                runs[backend] = functools.partial(compiled, **kwargs)
                side = sides[backend] = Side()
                started = time.perf_counter()
                out = tensors(runs[backend]())
                torch.cuda.synchronize()
                side.compile_seconds = time.perf_counter() - started
                side.error = difference(out, reference)
                torch.cuda.reset_peak_memory_stats()
                runs[backend]()
                side.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        times: dict[str, list[float]] = {backend: [] for backend in runs}
        for _ in range(rounds):
            for backend, run in runs.items():
                times[backend].append(wall(run))
        for backend in runs:
            sides[backend].wall = statistics.median(times[backend])
        _profile(sides, runs)
    return sides, coverage


def _profile(sides: dict[str, Side], runs: dict[str, Callable[[], Any]], rounds: int = 5) -> None:
    """GPU time of both sides, alternating so that clocks drift for both; medians over the rounds, kernel by kernel."""
    seen: dict[str, list[dict[str, float]]] = {backend: [] for backend in runs}
    for _ in range(rounds):
        for backend, run in runs.items():
            seen[backend].append(profile(run))
    for backend, rows in seen.items():
        names = sorted({name for row in rows for name in row})
        medians = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names}
        side = sides[backend]
        side.kernels = dict(sorted(medians.items(), key=lambda item: -item[1]))
        for name, spent in medians.items():
            side.split[kind(name)] = side.split.get(kind(name), 0.0) + spent


def main(arguments: list[str] | None = None) -> int:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["flux", "sd35-large", "wan21-14b"], help="NAME or NAME@BATCH")
    parser.add_argument("--layers", type=int, default=8, help="blocks per stack (default 8)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each backend, alternating (default 15)")
    parser.add_argument("--mode", help="Inductor mode for both sides")
    parser.add_argument("--json", help="write every number here")
    parser.add_argument("--top", type=int, default=0, help="list this many kernels of each side")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("dkfuse.bench.models needs a CUDA GPU, and torch sees none here.", file=sys.stderr)
        return 4
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"dkfuse / Inductor, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    heads = ("model", "fused", "glue", "gemm", "attention", "GPU", "wall", "peak", "compile", "error / Inductor's")
    for head in heads:
        table.add_column(head, justify="left" if head == "model" else "right")
    console = Console(width=140)
    results = {}
    for name in options.models:
        model, _, batch = name.partition("@")
        sides, coverage = measure(model, options.layers, options.rounds, options.mode, int(batch or 1))
        ours, theirs = sides["dkfuse"], sides["inductor"]
        results[name] = {
            "sides": {k: {**asdict(s), "gpu": s.gpu, "glue": s.glue} for k, s in sides.items()},
            "coverage": coverage.totals,
        }
        ratios = [
            (ours.glue, theirs.glue),
            (ours.split.get("gemm", 0.0), theirs.split.get("gemm", 0.0)),
            (ours.split.get("attention", 0.0), theirs.split.get("attention", 0.0)),
            (ours.gpu, theirs.gpu),
            (ours.wall, theirs.wall),
            (ours.peak_gib, theirs.peak_gib),
            (ours.compile_seconds, theirs.compile_seconds),
            (ours.error, theirs.error),
        ]
        totals = coverage.totals
        table.add_row(name, f"{totals['fused']}/{totals['sites']}", *(f"{a / b:.3f}" if b else "-" for a, b in ratios))
        for backend, side in sides.items():
            split = ", ".join(f"{k} {v:.3f}" for k, v in side.split.items())
            console.print(f"{name} {backend}: {split} ms; wall {side.wall:.2f} ms", highlight=False)
            for kernel, spent in list(side.kernels.items())[: options.top]:
                console.print(f"    {spent:8.3f} ms  {kernel[:110]}", highlight=False)
    console.print(table)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
