"""What the tests of quack's GEMM share: a pretended package, graphs as a GPU traces them, and SwiGLU sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dkfuse
from dkfuse import Settings, seams
from dkfuse.kernels import gemm_kernels
from dkfuse.reporting.report import Site

from .harness import BF16, tally

TESTED = gemm_kernels.TESTED[1]
FAMILIES = ("swiglu_epilogue", "gemm_kernel")


def install(monkeypatch: pytest.MonkeyPatch, version: str | None = TESTED) -> None:
    """Pretend that this version of quack is installed."""
    monkeypatch.setattr(gemm_kernels, "version", lambda: version)


def of_gemms(coverage: dkfuse.Coverage) -> list[Site]:
    return [site for site in coverage.seams if site.family in FAMILIES]


def counts(coverage: dkfuse.Coverage) -> dict[str, int]:
    return tally(of_gemms(coverage))


def on_gpu(function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = BF16) -> fx.GraphModule:
    """The ATen graph of `function` of fake tensors on a GPU, with silu as Inductor decomposes it."""
    with FakeTensorMode():
        tensors = [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]
    return make_fx(function, decomposition_table=dkfuse.compat.decompositions())(*tensors)


def rewritten(module: fx.GraphModule, target: str = "sm90", **settings: Any) -> list[Site]:
    """Rewrite the seams of a graph; the records of those under test."""
    found = [s for s in seams.run(module.graph, Settings(target=target, **settings)) if s.family in FAMILIES]
    module.graph.eliminate_dead_code()
    module.graph.lint()
    return found


def calls(module: fx.GraphModule) -> list[tuple[str, str, str]]:
    """(act, kernel, tiles) of every ``dkfuse::linear`` in the graph."""
    nodes = module.graph.find_nodes(op="call_function", target=torch.ops.dkfuse.linear.default)
    return [(n.kwargs["act"], n.kwargs["using"], n.kwargs["tiles"]) for n in nodes]
