"""Every provider takes the sites of a small block that its constraints allow, and says why not the others."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import nn

import dkfuse

from .toy_providers import RUNS, block, inputs


class Block(nn.Module):
    def forward(self, *values):
        return block(*values)


@pytest.mark.parametrize("provider", RUNS)
def test_sites_of_a_provider(provider):
    settings = dkfuse.Settings(target="sm90", kernels=(provider, "triton"))
    coverage = dkfuse.coverage(Block(), *inputs(), settings=settings)
    assert Counter(site.kernel for site in coverage.fused()) == RUNS[provider], str(coverage)
    others = [site for site in coverage.fused() if site.kernel != provider]
    assert all(provider in {reason.rule for reason in site.passed_over} for site in others)
