"""Compile a small FLUX.1 with dkfuse, compare it with eager and with float64, and show what was fused.

    python examples/demo.py            (or: make demo)

Needs no GPU and no download: the transformer is the one of diffusers with random weights, two blocks of each kind. With
a GPU it has the published width and its times are shown too.
"""

from __future__ import annotations

import copy
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import dkfuse
from dkfuse import zoo
from dkfuse.reporting.render import print_report

console = Console(highlight=False)
warnings.filterwarnings("ignore", category=FutureWarning)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = "full" if device == "cuda" else "tiny"
    module, inputs = zoo.build("flux", size, device, torch.bfloat16, layers=2)
    # diffusers multiplies both by 1000 in bfloat16; these values survive that, so that float64 is a fair reference
    inputs["timestep"] = torch.full_like(inputs["timestep"], 0.5)
    inputs["guidance"] = torch.full_like(inputs["guidance"], 4.0)
    where = torch.cuda.get_device_name() if device == "cuda" else "this CPU"
    parameters = sum(p.numel() for p in module.parameters()) / 1e6
    console.print(
        f"[bold]FLUX.1 transformer[/], 2 + 2 blocks, {parameters:.0f} M random parameters, bfloat16, on {where}"
    )

    # Without a C++ compiler Inductor cannot generate code for the CPU: what is not fused then runs in eager mode.
    has_compiler = device == "cuda" or any(map(shutil.which, ("g++", "clang++", "c++")))
    options = {} if has_compiler else {"dkfuse.remainder": "eager"}
    compiled = torch.compile(module, backend="dkfuse", dynamic=False, options=options)
    with torch.no_grad():
        eager = run(module, inputs)
        start = time.perf_counter()
        with dkfuse.record("flux") as coverage, console.status('compiling with backend="dkfuse"'):
            ours = run(compiled, inputs)
        console.print(f'compiled with backend="dkfuse" in {time.perf_counter() - start:.0f} s')
        exact = run(copy.deepcopy(module).double(), in_double(inputs))
        times = measure(module, compiled, inputs) if device == "cuda" else {}

    errors = {"eager": relative(eager, exact), "dkfuse": relative(ours, exact)}
    table = Table(title="error against float64", title_justify="left", box=None, pad_edge=False)
    for title in ("", "relative error", *(["ms per step"] if times else [])):
        table.add_column(title, justify="left" if not title else "right")
    for name, error in errors.items():
        table.add_row(name, f"{error:.2e}", *([f"{times[name]:.2f}"] if times else []))
    if times:
        table.add_row("torch.compile", "", f"{times['inductor']:.2f}")
    console.print(table)
    console.print()
    print_report(coverage, console)
    if device == "cpu":
        console.print()
        console.print(
            "On a CPU the fused ops run as the PyTorch code that defines them. On an H100 the same model, at its "
            "published width, gets these kernels:\n"
        )
        print_report(plan("sm90"), console)

    if errors["dkfuse"] > 1.1 * errors["eager"]:
        console.print("[red]dkfuse is less accurate than eager[/]")
        return 1
    coverage.assert_fused("modulate", at_least=8)
    console.print("\n[green]ok[/]: more with [bold]dkfuse coverage flux --size full --target sm90[/]")
    return 0


def plan(target: str) -> dkfuse.Coverage:
    """What dkfuse would do on another device: traced without weights, nothing runs."""
    module, inputs = zoo.build_fake("flux", "full", layers=2)
    with console.status(f"planning for {target}"):
        found = dkfuse.coverage(module, settings=dkfuse.Settings(target=target), **inputs)
    found.model = "flux (full width, 2 + 2 blocks)"
    return found


def run(module: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    return module(**inputs)[0]


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    floating = {k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {k: v.double() if k in floating else v for k, v in inputs.items()}


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def measure(module: nn.Module, compiled: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of a call in eager mode, with Inductor, and with dkfuse, taken in turns."""
    with console.status("compiling with Inductor"):
        inductor = torch.compile(module, dynamic=False)
        run(inductor, inputs)
    calls = {"eager": module, "inductor": inductor, "dkfuse": compiled}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(20):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(call, inputs)
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


if __name__ == "__main__":
    sys.exit(main())
