"""`python -m dkfuse.bench.gemm [PRODUCT ...]`: quack's GEMM against cuBLAS's, and what a call costs.

PRODUCT is ROWSxCOLUMNSxK, with ":gelu" for a tanh-GELU behind it or ":silu" for a SwiGLU of its halves; left out, those
of `dkfuse.seams.gemm_table`. Times of ``[rows, K] @ [K, columns]``, bf16, with a bias (SwiGLU: without), each kernel in
turns of some milliseconds at the GPU's power limit; ratios are cuBLAS's time / quack's, where cuBLAS's includes a pass
over the result for a SwiGLU. The lines at the end are rows of the table.
"""

from __future__ import annotations

import argparse
import sys

import torch

import dkfuse.kernels.gemm  # noqa: F401  (registers the op)
from dkfuse.kernels import gemm_kernels
from dkfuse.kernels.gemm_kernels import CUBLAS, DEFAULT_TILES, QUACK, TILES

from ..seams import gemm_measure, gemm_table
from ..seams.gemm_measure import Product
from .kernels import NO_GPU
from .timing import cpu_microseconds

ACTS = {"none": "none", "gelu": "gelu", "silu": "silu_first"}
TURNS, TURN = 9, 12.0


def parse(text: str) -> tuple[int, int, int, str]:
    """(rows, columns, K, "none", "gelu" or "silu") of "4096x9216x3072:gelu"; ValueError for anything else."""
    sizes, _, act = text.lower().partition(":")
    numbers = [int(part) for part in sizes.split("x") if part.isdigit()]
    if len(numbers) != 3 or sizes.count("x") != 2 or min(numbers) < 1 or (act or "none") not in ACTS:
        raise ValueError(f"{text!r} is not ROWSxCOLUMNSxK, with or without :gelu or :silu")
    return numbers[0], numbers[1], numbers[2], act or "none"


def overhead() -> dict[str, float]:
    """Microseconds of CPU per call, of products that are too small to keep a GPU busy."""
    x, weight, bias = (torch.zeros(*s, device="cuda", dtype=torch.bfloat16) for s in ((8, 64), (128, 64), (128,)))
    transposed = weight.t()
    calls = {"addmm": lambda: torch.addmm(bias, x, transposed)}
    for kind, act in ACTS.items():
        added = None if kind == "silu" else bias
        calls[f"quack {kind}"] = lambda act=act, added=added: torch.ops.dkfuse.linear(  # type: ignore[misc]
            x, weight, added, act=act, using=QUACK, tiles=DEFAULT_TILES
        )
    return cpu_microseconds(calls)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dkfuse.bench.gemm", description=__doc__)
    parser.add_argument("products", nargs="*", type=str)
    options = parser.parse_args(arguments)
    try:
        products = [parse(text) for text in options.products]
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("no CUDA device: there is nothing to measure", file=sys.stderr)
        return NO_GPU
    if gemm_kernels.version() is None:
        print(f"quack is not installed: {gemm_kernels.INSTALL}", file=sys.stderr)
        return NO_GPU
    products = products or [(row.rows, row.columns, row.k, row.act) for row in gemm_table.TABLE]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {gemm_kernels.fingerprint()}")
    capability = 10 * torch.cuda.get_device_capability()[0]
    lines: list[str] = []
    with torch.no_grad():
        for rows, columns, k, act in products:
            device = torch.device("cuda", torch.cuda.current_device())
            product = Product(rows, columns, k, ACTS[act], act != "silu", torch.bfloat16, device)
            found = gemm_measure.timed(product, [CUBLAS, *TILES], TURNS, TURN)
            gains = {name: round(found[CUBLAS] / found[name], 3) for name in TILES}
            text = "  ".join(f"{name} {gain:.3f}" for name, gain in gains.items())
            speed = 2 * rows * columns * k / found[CUBLAS] * 1e-6
            print(
                f"{rows}x{columns}x{k}:{act:6} cuBLAS {found[CUBLAS]:.1f} us, {speed:.0f} TFLOP/s; {text}", flush=True
            )
            lines.append(f'    Row({capability}, "{act}", {rows}, {columns}, {k}, {gains}),'.replace("'", '"'))
        print("CPU us per call:", "  ".join(f"{name} {spent:.1f}" for name, spent in overhead().items()))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
