"""Seams to GEMMs in the pass and in real models, and the ops that they put into the graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dkfuse
from dkfuse import Settings, Status, fuse, zoo
from dkfuse.kernels import linear_ops

from .harness import BF16, FP32, spell
from .linears import GELU_INPUTS, functional

# -- in the pass -------------------------------------------------------------------------------------------------------

# seams of the tiny models: their products are too narrow to be split, their attention too short to be measured, their
# joint tensors too small to be worth writing in place
ZOO = {
    "flux": {
        ("attention", "unmeasured"): 4,
        ("packed_projection", "not_packed"): 6,
        ("split_projection", "no_gain"): 2,
        ("gelu_epilogue", "fused"): 6,
        ("joint_projection", "no_gain"): 2,
    },
    "sd3-medium": {
        ("attention", "unmeasured"): 2,
        ("packed_projection", "not_packed"): 4,
        ("gelu_epilogue", "fused"): 3,
        ("joint_projection", "no_gain"): 6,
        ("patch_embedding", "fused"): 1,
    },
    "wan21-1.3b": {
        ("attention", "unmeasured"): 4,
        ("packed_projection", "not_packed"): 4,
        ("split_projection", "dtype"): 1,
        ("gelu_epilogue", "fused"): 3,
        ("patch_embedding", "fused"): 1,
    },
}


@pytest.mark.parametrize("name", list(ZOO))
def test_seams_of_real_models(name: str) -> None:
    pytest.importorskip("diffusers")
    module, kwargs = zoo.build(name)
    coverage = dkfuse.coverage(module, settings=Settings(target="sm90"), **kwargs)
    found = coverage.seams
    assert Counter((s.family, s.reason.code if s.reason else "fused") for s in found) == ZOO[name], str(coverage)
    every = [s.id for s in (*coverage.sites, *coverage.seams)]
    assert len(set(every)) == len(every)
    assert all(s.source and s.module for s in found)


def test_planning_alone_changes_nothing() -> None:
    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        def inner(module: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(module)
            return module.forward

        return dkfuse.compat.lower_with(gm, inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(functional, backend=backend, dynamic=False)(*spell(GELU_INPUTS))
    graph, settings = graphs[0].graph, Settings(target="sm90")
    before = str(graph)
    assert fuse.plan(graph, settings).record.seams == [] and str(graph) == before
    assert [s.status for s in fuse.decided(graph, settings).record.seams] == [Status.FUSED]
    assert "dkfuse.linear_gelu" in str(graph) and "tanh" not in str(graph)


# -- the ops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float64])
def test_ops_are_what_they_say(dtype: torch.dtype) -> None:
    x, w, b = spell("x:LI w:QI b:Q", dtype)
    wide, narrow = x.repeat(1, 2), torch.randn(192, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    calls = [
        (torch.ops.dkfuse.linear_gelu.default, (x, w, b)),
        (torch.ops.dkfuse.split_linear.default, ([x, wide[:, 64:]], narrow, b)),
        (torch.ops.dkfuse.split_linear.default, ([x, x, x], torch.cat([w] * 3, 1), None)),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    rows = F.linear(x.double(), w.double(), b.double())
    tolerance = {"rtol": 0, "atol": {BF16: 0.15, FP32: 1e-4}.get(dtype, 1e-12)}
    torch.testing.assert_close(calls[0][0](*calls[0][1]).double(), F.gelu(rows, approximate="tanh"), **tolerance)
    both = F.linear(wide.double(), narrow.double(), b.double())
    torch.testing.assert_close(calls[1][0](*calls[1][1]).double(), both, **tolerance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.ones(2, 3)], torch.ones(4, 5), None), "parts have 3 columns together, but weight 5"),
        (([], torch.ones(4, 5), None), "at least one part"),
        (([torch.ones(2, 3)], torch.ones(4, 3).bfloat16(), None), "one floating dtype"),
        (([torch.ones(2, 3)], torch.ones(4, 3), torch.ones(5)), r"bias has shape \(5,\), it must be \[4\]"),
    ],
)
def test_calls_without_a_meaning(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_ops.split_linear(*arguments)
