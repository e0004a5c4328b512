"""`python -m dkfuse.bench.attention [SHAPE ...]`: speed of every installed attention kernel, and what a call costs.

SHAPE is BxHxSxd, or BxHxSxKxd for K keys; left out, those of published diffusion transformers. S and K may be sums, as
25440+256 of image and text. TFLOP/s of 4*B*H*S*K*d, bf16, q, k and v `[B, S, H, d]` in memory; the lines at the end are
rows of `dkfuse.seams.attention_table`.

SHAPE:N, or --valid FRACTION for all shapes, measures attention of which only the first N keys of each sample, or that
fraction of them, take part: torch's given a mask `[B, 1, 1, K]` ("dense" as bias, "bool") beside kernels that take the
numbers, and torch's without a mask ("unmasked"). All K keys count for TFLOP/s, so that they compare as times do. With
--reorder the keys that take part are anywhere, and are brought to the front first, which is also timed alone.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dkfuse.kernels import attention_kernels, attention_run

from ..errors import first_line
from ..seams import attention_measure, attention_table
from .kernels import NO_GPU
from .timing import cpu_microseconds

SHAPES = (
    "1x24x4608x128",  # FLUX.1 1024px
    "2x38x4429x64",  # SD3.5-Large
    "1x24x25000x128",  # HunyuanVideo
    "1x40x32760x128",  # Wan2.1-14B 480p
    "1x12x32760x128",  # Wan2.1-1.3B 480p
    "1x30x4128x128",  # Z-Image
    "1x24x4224x128",  # Qwen-Image
    "2x48x17776x64",  # CogVideoX-5B
    "2x16x4096x72",  # PixArt-Sigma
    "1x40x32760x512x128",  # Wan2.1-14B, text
    "2x16x4096x300x72",  # PixArt-Sigma, text
    "8x16x256x72",  # DiT-XL/2
    "1x32x8064x64",  # LTX-Video
    "1x24x4352x96",  # Lumina-Image-2.0
)
BUDGET = 0.1  # seconds per kernel and shape


Shape = tuple[int, int, int, int, int]


def parse(text: str, fraction: float | None = None) -> tuple[Shape, int | None, int]:
    """((B, H, S, K, d), keys that take part or None, those that do in any case) of "BxHxSxd" or "BxHxSxKxd", with ":N".

    fraction: of the keys, where no N is given. Of K = 25440+256 the first 25440 take part in any case. ValueError for
    anything else.
    """
    sizes, _, valid = text.lower().partition(":")
    numbers = [sum(int(term) for term in part.split("+")) for part in sizes.split("x")]
    if len(numbers) == 4:
        numbers.insert(3, numbers[2])
    if len(numbers) != 5 or min(numbers) < 1:
        raise ValueError(f"{text!r} is not BxHxSxd or BxHxSxKxd")
    batch, heads, queries, keys, dim = numbers
    taken = int(valid) if valid else None if fraction is None else max(1, round(fraction * keys))
    if taken is not None and not 1 <= taken <= keys:
        raise ValueError(f"{text!r}: {taken} of {keys} keys cannot take part")
    first, *more = sizes.split("x")[-2].split("+")
    return (batch, heads, queries, keys, dim), taken, int(first) if more else 0


def tensors(shape: Shape) -> list[torch.Tensor]:
    batch, heads, queries, keys, dim = shape
    sizes = [(batch, tokens, heads, dim) for tokens in (queries, keys, keys)]
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for size in sizes]


def microseconds(call: Callable[[], Any]) -> tuple[float, float]:
    """(median time on the GPU, seconds of the first call, which may compile a kernel)."""
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(3, min(30, int(BUDGET / (time.perf_counter() - started))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in events), first


def calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Each installed kernel that takes the call."""
    capability = 10 * torch.cuda.get_device_capability()[0]
    arguments = {"q": q, "k": k, "v": v, "mask": None, "causal": False}
    return {
        name: lambda name=name: torch.ops.dkfuse.attention(q, k, v, None, using=name)  # type: ignore[misc]
        for name, kernel in attention_kernels.KERNELS.items()
        if attention_kernels.version_of(name) is not None and kernel.problem(arguments, capability) is None
    }


def masked_calls(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: int, sure: int, reorders: bool = False
) -> dict[str, Callable[[], Any]]:
    """Torch's attention without a mask and with a dense one, and each installed kernel that takes numbers of keys,
    given them in another order than they are in memory if `reorders`."""
    order = torch.arange(k.shape[2], device=k.device)
    order = torch.cat([order[:sure], order[sure:].flip(0)])

    def attention(name: str) -> torch.Tensor:
        keys, values = attention_measure.reordered(k, v, order) if reorders else (k, v)
        return torch.ops.dkfuse.attention(q, keys, values, None, lengths, using=name, sure=sure, bounded=True)

    capability = 10 * torch.cuda.get_device_capability()[0]
    lengths = torch.full((q.shape[0],), valid, dtype=torch.int32, device=q.device)
    taken = (torch.arange(k.shape[2], device=q.device) < lengths[:, None])[:, None, None]
    bias = torch.where(taken, 0.0, float("-inf")).to(q.dtype)
    arguments = {"q": q, "k": k, "v": v, "mask": None, "key_lengths": lengths, "sure": sure, "causal": False}
    return {
        "unmasked": lambda: F.scaled_dot_product_attention(q, k, v),
        attention_table.DENSE: lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        "bool": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=taken),
        **({"reorder": lambda: attention_measure.reordered(k, v, order)} if reorders else {}),
        **{
            name: functools.partial(attention, name)
            for name, kernel in attention_kernels.KERNELS.items()
            if name != "sdpa"
            and attention_kernels.version_of(name) is not None
            and kernel.problem(arguments, capability) is None
        },
    }


def overhead(valid: int | None = None, reorders: bool = False) -> dict[str, float]:
    """Microseconds of CPU per call, of attention that is too small to keep a GPU busy; FlashAttention 4 also by its
    own function, which our op calls only once (`attention_fa4`)."""
    q, k, v = tensors((1, 4, 128, 128, 64))
    plain = {"torch sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}
    if attention_kernels.version_of("fa4") is not None:
        plain["fa4's function"] = lambda: attention_run.fa4(q, k, v, False, None)
    masked = masked_calls(q, k, v, valid, len(k[0, 0]) - 8, reorders) if valid else {}
    return cpu_microseconds(masked or {**plain, **calls(q, k, v)})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dkfuse.bench.attention", description=__doc__)
    parser.add_argument("shapes", nargs="*", default=SHAPES, type=str)
    parser.add_argument("--valid", type=float, metavar="FRACTION", help="how many of the keys take part, 0 to 1")
    parser.add_argument("--reorder", action="store_true", help="bring the keys that take part to the front first")
    options = parser.parse_args(arguments)
    if options.reorder and options.valid is None:
        parser.error("--reorder needs --valid: without it all keys take part")
    try:
        shapes = [parse(text, options.valid) for text in options.shapes]
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("no CUDA device: there is nothing to measure", file=sys.stderr)
        return NO_GPU
    import dkfuse.kernels.attention  # noqa: F401  (registers the op)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    print(attention_kernels.versions())
    rows: list[str] = []
    compiled: dict[str, float] = {}
    with torch.no_grad():
        for shape, valid, sure in shapes:
            batch, heads, queries, keys, dim = shape
            speeds = {}
            q, k, v = tensors(shape)
            for name, call in (
                masked_calls(q, k, v, valid, sure, options.reorder) if valid else calls(q, k, v)
            ).items():
                try:
                    taken, first = microseconds(call)
                except Exception as error:
                    print(f"  {name} failed at {shape}: {first_line(error)}")
                    continue
                speeds[name] = round(4 * batch * heads * queries * keys * dim / taken * 1e-6, 1)
                compiled[name] = max(compiled.get(name, 0.0), first)
            text = "x".join(map(str, shape)) + (f":{valid}" if valid else "")
            print(f"{text:22}", "  ".join(f"{n} {s:.0f}" for n, s in speeds.items()), flush=True)
            for other in ("sdpa", "unmasked", "bool", "reorder"):
                speeds.pop(other, None)
            capability = 10 * torch.cuda.get_device_capability()[0]
            columns = f"{{}}, {speeds}" if valid else f"{speeds}"
            rows.append(f"    Row({capability}, {dim}, {batch * heads}, {queries}, {keys}, {columns}),")
        for kind in sorted({valid is not None for _, valid, _ in shapes}):
            spent = "  ".join(f"{n} {t:.1f}" for n, t in overhead(100 if kind else None, options.reorder).items())
            print(f"CPU us per call{', numbers of keys' if kind else ''}:", spent)
    print("longest first call, s:", "  ".join(f"{n} {t:.2f}" for n, t in compiled.items()))
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
