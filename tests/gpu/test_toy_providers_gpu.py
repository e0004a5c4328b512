"""The small block of every provider, compiled by Inductor: who ran its sites, and how exactly."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import dkfuse
from dkfuse.kernels.providers import PROVIDERS

from ..toy_providers import RUNS, block, inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("provider", RUNS)
def test_a_block(provider):
    if (missing := PROVIDERS[provider].problem()) is not None:
        pytest.skip(missing.message)
    values = inputs("cuda")
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        options = {"dkfuse.kernels": f"{provider},triton"}
        program = torch.compile(block, backend="dkfuse", dynamic=False, options=options)
        result, again = program(*values), program(*values)
        exact, eager = block(*(v.double() for v in values)), block(*values)
    assert Counter(site.kernel for site in coverage.fused()) == RUNS[provider], str(coverage)
    error, eagers = ((r.double() - exact).square().mean().sqrt().item() for r in (result, eager))
    assert error <= 1.02 * eagers and torch.equal(result, again)
