"""Memory of models that modulate per token, compiled on a GPU: sums with a table are not written, nor gaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness import counts, run

pytestmark = pytest.mark.gpu
TOKENS, WIDTH, BLOCKS = 4096, 1536, 4


def blocks(x: Tensor, tables: Tensor, e: Tensor, w: Tensor, of: Callable = torch.add) -> Tensor:
    """As Wan2.2 writes it: six parts of each token, fp32 tables, two modulations and two gates a block."""
    for table in tables:
        mod = of(table[None, None], e.unflatten(2, (6, -1)).float())
        shift, scale, gate, shift2, scale2, gate2 = (part.squeeze(2) for part in mod.chunk(6, dim=2))
        for s, t, g in ((scale, shift, gate), (scale2, shift2, gate2)):
            n = (F.layer_norm(x.float(), (WIDTH,)) * (1 + s) + t).type_as(x)
            x = (x.float() + (n @ w) * g).type_as(x)
    return x


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, TOKENS, WIDTH), (BLOCKS, 6, WIDTH), (1, TOKENS, 6 * WIDTH), (WIDTH, WIDTH))
    x, tables, e, w = (torch.randn(size, generator=generator) / 4 for size in sizes)
    return [x.cuda().bfloat16(), tables.cuda(), e.cuda().bfloat16(), (w / 10).cuda().bfloat16()]


def peak(function: Any, args: list[Tensor]) -> int:
    """Bytes beyond the inputs that one call takes."""
    with torch.no_grad():
        function(*args)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*args)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def products(*args: Tensor) -> Tensor:
    """Nothing to take apart: Inductor computes each part."""
    return blocks(*args, of=torch.mul)


@pytest.mark.parametrize(("function", "rows"), [(blocks, 2), (products, 6 * 2 * BLOCKS)])
def test_peak_memory(function: Callable, rows: int) -> None:
    """That of Inductor and at most so many bf16 activations: of products, every part of every block in fp32 once."""
    args = inputs()
    results, coverage = run(function, args, remainder="inductor")
    found = counts(coverage)
    assert found.get("residual_gate_norm_modulate", 0) == 2 * BLOCKS - 1, str(coverage)
    with torch.no_grad():
        expected = function(*args)
    assert (results[0] - expected).float().norm() / expected.float().norm() < 2e-2
    torch.compiler.reset()
    theirs = peak(torch.compile(function, dynamic=False), args)
    torch.compiler.reset()
    ours = peak(torch.compile(function, backend="dkfuse", dynamic=False), args)
    activation = TOKENS * WIDTH * 2
    assert ours <= theirs + rows * activation, (ours / activation, theirs / activation)
