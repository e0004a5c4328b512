"""Biases that are added behind a product and views, put into the product: ``x @ w + b`` is ``addmm(b, x, w)``.

    add(reshape(mm(x, w)), bias)  ->  reshape(addmm(bias, x, w))

As of weights that are widened from fp8 for each call (torchao), before or after they are transposed: w need not be a
weight that a linear could be read of. cuBLAS adds a bias for nothing, and rounds once less; what reads the sum, a norm
of queries or a gate, then reads the result of a GEMM. Not under ``roundings=eager``.
"""

from __future__ import annotations

from functools import partial

from torch import fx

from ..compat import statically_known_true
from ..matching.terms import NARROW
from ..rewriting.replace import emit
from ..settings import Settings
from .common import aten
from .linear import replace_product, row_behind


def into_products(graph: fx.Graph, settings: Settings) -> None:
    """Rewrite every such sum in `graph`."""
    if settings.roundings == "eager":
        return
    for product in graph.find_nodes(op="call_function", target=aten.mm.default):
        x, w = product.args
        behind = row_behind(product, aten.add.Tensor)  # not before its turn: a bias may be such a sum itself
        if behind is None:
            continue
        sum_, bias, views = behind
        dtype = product.meta["val"].dtype
        if dtype not in NARROW or sum_.meta["val"].dtype != dtype:
            continue
        if not statically_known_true(bias.meta["val"].stride(0) == 1):
            continue  # cuBLAS's epilogue reads a dense one
        replace_product(product, sum_, views, partial(emit, graph, aten.addmm.default, bias, x, w))
