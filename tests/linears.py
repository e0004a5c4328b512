"""Linears for the tests of the seams to GEMMs, and what became of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import dkfuse

from .harness import tally

FAMILIES = ("gelu_epilogue", "split_projection")
GELU_INPUTS = "x:BLI w:QI b:Q"


def of_gemms(coverage: dkfuse.Coverage) -> list[dkfuse.Site]:
    """The seams under test: the same linears may be seams to packed projections too."""
    return [s for s in coverage.seams if s.family in FAMILIES]


def counts(coverage: dkfuse.Coverage) -> dict[str, int]:
    return tally([*coverage.sites, *of_gemms(coverage)])


def functional(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b), approximate="tanh")
