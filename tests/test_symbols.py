"""Sizes that are symbols, as nodes of the graph that compute them."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dkfuse.kernels.launch import plan
from dkfuse.rewriting import symbols


def test_the_grid_of_square_images_of_any_size() -> None:
    """torch gives two equal sizes one symbol, and the number of rows is its square."""
    context = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DUCK, DimDynamic.DUCK, DimDynamic.STATIC],
        constraint_sizes=[None] * 4,
    )
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.empty(2, 6, 6, 64), symbolic_context=context)
    assert x.shape[1].node.expr == x.shape[2].node.expr
    arguments = {"x": x, "norm": "layer", "eps": 1e-6, "out_dtype": torch.float32}
    launch = plan("norm_modulate", arguments, {"out": x}, sm_count=132)
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    graph.output(symbols.arguments(graph, launch.grid, [node]))
    for batch, size in ((2, 6), (3, 11)):
        assert torch.fx.GraphModule({}, graph)(torch.empty(batch, size, size, 64)) == (batch * size * size, 1, 1)
