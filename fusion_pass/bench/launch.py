"""`python -m dkfuse.bench.launch [--json FILE]`: what launching a fused kernel costs the CPU in a compiled program.

The program is a chain of small matmuls with a norm+modulate behind each, so that nothing fuses across and the CPU is
the bottleneck. Per matmul and norm, in microseconds of CPU time: with Inductor's own kernel, with our kernel as a
Triton kernel node (what the backend inserts), the same with Inductor's static launcher for user kernels, and with the
op called as an opaque op. The matmul is in all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import compat_triton
from .kernels import NO_GPU

STEPS = 50
WIDTH = 256
ROWS = 16


def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def opaque(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.ops.dkfuse.norm_modulate(x, None, None, scale, shift, norm="layer", eps=1e-6, out_dtype=x.dtype)


@functools.cache
def kernel_node() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """norm_modulate as a `triton_op`, which traces to the Triton kernel node that the backend inserts."""
    from torch.library import triton_op, wrap_triton

    from dkfuse.kernels.launch import plan

    @functools.cache
    def configured(kernel: Any, num_warps: int, num_stages: int) -> Any:
        triton: Any = importlib.import_module("triton")
        return triton.autotune([triton.Config({}, num_warps=num_warps, num_stages=num_stages)], key=[])(kernel)

    @triton_op("dkfuse_bench::norm_modulate", mutates_args=())
    def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        arguments = {"x": x, "scale": scale, "shift": shift, "norm": "layer", "eps": 1e-6, "out_dtype": x.dtype}
        out = torch.empty_like(x)
        launch = plan("norm_modulate", arguments, {"out": out}, sm_count=132)
        pointers = {parameter: {**arguments, "out": out}[name] for parameter, name in launch.tensors.items()}
        kernel = wrap_triton(configured(launch.kernel, launch.num_warps, launch.num_stages))
        kernel[launch.grid](**pointers, **launch.scalars, **launch.constants)
        return out

    return norm_modulate


def program(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        for _ in range(STEPS):
            x = norm(x @ weight, scale, shift)
        return x

    return run


def cpu_microseconds(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], repeats: int = 40) -> float:
    """Median CPU time per step; the queue is drained between repeats, outside the clock."""
    for _ in range(3):
        function(*inputs)
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(*inputs)
        times.append((time.perf_counter() - start) * 1e6 / STEPS)
    torch.cuda.synchronize()
    return statistics.median(times)


def measure(with_opaque: bool = True) -> dict[str, float]:
    """CPU microseconds per matmul and norm, by how the norm runs."""
    import dkfuse.kernels.ops  # noqa: F401  (registers torch.ops.dkfuse)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    inputs = (random(1, ROWS, WIDTH), random(WIDTH, WIDTH) / WIDTH**0.5, random(1, 1, WIDTH), random(1, 1, WIDTH))
    expected = program(eager)(*(t.double() for t in inputs))
    results = {}
    static: dict[str, Any] = {"static_launch_user_defined_triton_kernels": True}
    ways = (
        ("inductor", eager, None),
        ("kernel node", kernel_node(), None),
        ("kernel node, static", kernel_node(), static),
        ("opaque op", opaque, None),
    )
    for name, norm, options in ways:
        if name == "opaque op" and not with_opaque:
            continue
        torch._dynamo.reset()
        compiled = torch.compile(program(norm), dynamic=False, options=options)
        with compat_triton.workers_told() if options else contextlib.nullcontext():
            first = compiled(*inputs)
        error = ((first.double() - expected).norm() / expected.norm()).item()
        if not error < 0.2:
            raise AssertionError(f"{name}: relative error {error:.3f} after {STEPS} steps, expected under 0.2.")
        # Twice each: the smaller median is the one less disturbed by the machine.
        results[name] = min(cpu_microseconds(compiled, inputs) for _ in range(2))
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dkfuse.bench.launch", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--no-opaque", action="store_true", help="leave out the opaque op")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        lack = "triton" if torch.cuda.is_available() else "an NVIDIA GPU"
        print(f"The launch benchmark needs {lack}, which this machine does not have.", file=sys.stderr)
        return NO_GPU
    results = measure(with_opaque=not options.no_opaque)
    for name, value in results.items():
        print(f"{name:20} {value:6.2f} us per matmul and norm  ({value - results['inductor']:+.2f} against Inductor)")
    if options.json:
        options.json.write_text(json.dumps({"schema": "dkfuse.bench.launch/1", "microseconds": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
