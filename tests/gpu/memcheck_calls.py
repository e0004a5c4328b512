"""`python tests/gpu/memcheck_calls.py PROVIDER`: a provider's kernels on odd calls, for `compute-sanitizer` to watch.

Every tensor is an allocation of its own (torch's caching allocator is off), so that an access beyond a buffer leaves
it. Inputs are made and results compared on the CPU, in fp64, so that the GPU runs little but the kernels. Whatever of
an output's buffer is not the output must stay as it was.

Exit code 0: every result right, 1: one is wrong, 2: there is nothing to run. `test_memcheck_gpu.py` runs it under
memcheck.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a file of the package tests.gpu, and what it needs before torch is there
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "tests.gpu"
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    os.environ.pop("PYTORCH_ALLOC_CONF", None)

import torch
from torch import Tensor

from ..odd_calls import BF16, FP16, FP32, OddCall, calls, moved

# half a unit in the last place, relative, and the smallest step next to 0
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
SMALLEST = {BF16: 0.0, FP16: 2.0**-24, FP32: 0.0}
FP32_NOISE = 1e-5  # of the largest value of a row: what fp32 arithmetic may lose where terms cancel


def wrong(value: Tensor, expected: Tensor) -> str | None:
    """Which element is not `expected` (fp64) rounded once from fp32 arithmetic."""
    noise = expected.abs().amax(-1, keepdim=True) * FP32_NOISE + SMALLEST[value.dtype]
    excess = (value.double() - expected).abs() - expected.abs() * ROUNDING[value.dtype] - noise
    bad = ~(excess <= 0)
    if not bad.any():
        return None
    first = int(bad.flatten().nonzero()[0])
    found, wanted = value.flatten()[first].item(), expected.flatten()[first].item()
    return f"{int(bad.sum())} of {bad.numel()} elements are wrong, element {first} is {found} and not {wanted}"


def outside(buffer: Tensor, view: Tensor) -> Tensor:
    """The elements of a buffer that do not belong to the view, as bytes."""
    mine = torch.zeros(buffer.numel(), dtype=torch.bool)
    mine.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return buffer[~mine].view(torch.uint8)


def whole(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def problems(provider: str, call: OddCall, device: str) -> Iterator[str]:
    """What is wrong with the results of one call."""
    from dkfuse.kernels.ops import reference_outputs
    from dkfuse.kernels.registry import find

    arguments, outputs = call.build()
    expected = reference_outputs(call.op, arguments, compute=torch.float64)
    buffers: dict[int, Tensor] = {}
    there, written = moved(arguments, device, buffers), moved(outputs, device, buffers)
    implementation = find(provider, call.op)
    assert implementation is not None
    implementation.load()(there, written)
    if device == "cuda":
        torch.cuda.synchronize()
    for name, output in outputs.items():
        after = buffers[output.untyped_storage().data_ptr()].cpu()
        value = after.as_strided(output.shape, output.stride(), output.storage_offset())
        if (text := wrong(value, expected[name])) is not None:
            yield f"{name}: {text}"
        if not torch.equal(outside(after, output), outside(whole(output), output)):
            yield f"{name}: the buffer around the output has changed"
    results = {output.untyped_storage().data_ptr() for output in outputs.values()}
    for name, operand in arguments.items():
        key = operand.untyped_storage().data_ptr() if isinstance(operand, Tensor) else None
        if key is None or key in results:
            continue
        if not torch.equal(buffers[key].cpu().view(torch.uint8), whole(operand).view(torch.uint8)):
            yield f"{name}: an operand has changed"


def group_problems(device: str) -> Iterator[str]:
    """Queries and keys of text and image by one launch of Triton's, into joint tensors."""
    from dkfuse.kernels.launch import run
    from dkfuse.kernels.ops import reference_outputs
    from dkfuse.kernels.rope_launch import Call, plan_group

    from ..odd_calls import at_end, random, rope, tables

    heads, d, lengths = 3, 64, (3, 257)
    results = [torch.full((1, sum(lengths), heads, d), float("nan"), dtype=BF16) for _ in range(2)]
    buffers: dict[int, Tensor] = {}
    there = moved({str(p): out for p, out in enumerate(results)}, device, buffers)
    planned, tensors, alias, expected = [], {}, {}, []
    for i, (stream, p) in enumerate((s, p) for s in range(2) for p in range(2)):
        tokens, start = lengths[stream], sum(lengths[:stream])
        x = at_end(1, tokens, heads * d, seed=i).unflatten(-1, (heads, d))
        arguments = rope(x, weight=random(d, seed=i), **tables("half", d, tokens, 1))
        expected.append((p, start, tokens, reference_outputs("norm_rope", arguments, compute=torch.float64)["out"]))
        planned.append(Call(arguments, results[p][:, start : start + tokens], start * heads * d))
        tensors.update((f"{i}.{n}", v) for n, v in moved(arguments, device, buffers).items())
        tensors[f"{i}.out"] = there[str(p)]
        alias.update({f"{i}.out": f"{p}.out"} if stream else {})
    run(plan_group(planned, alias=alias), tensors)
    if device == "cuda":
        torch.cuda.synchronize()
    for p, start, tokens, wanted in expected:
        if (text := wrong(there[str(p)].cpu()[:, start : start + tokens], wanted)) is not None:
            yield f"projection {p}, {tokens} tokens: {text}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("provider", help="'breach': a kernel that gives the right results and reads too much")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(argv)
    if options.provider == "breach":
        from . import memcheck_breach

        memcheck_breach.offer()
    ran, failed = 0, 0
    checks: list[tuple[str, Any]] = [
        (f"{call.op} {call.name}", problems(options.provider, call, options.device)) for call in calls(options.provider)
    ]
    if options.provider == "triton":
        checks.append(("norm_rope, four in one launch", group_problems(options.device)))
    for name, found in checks:
        texts = list(found)
        print(f"{options.provider} {name}: {'; '.join(texts) or 'ok'}", flush=True)
        ran, failed = ran + 1, failed + bool(texts)
    if options.device == "cuda" and torch.cuda.memory_reserved():
        print("torch's caching allocator is on: tensors share allocations, a breach may go unnoticed", file=sys.stderr)
        return 2
    if not ran:
        print(f"{options.provider} takes none of the calls", file=sys.stderr)
        return 2
    print(f"{ran} calls, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
