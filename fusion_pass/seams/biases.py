"""Biases that are added behind a product and views, put into the product: ``linear(x, w) + b`` is ``linear(x, w, b)``.

    add(reshape(mm(x, w.T)), bias)  ->  reshape(addmm(bias, x, w.T))

As of weights that are widened from fp8 for each call (torchao). cuBLAS adds a bias for nothing, and rounds once less;
what reads the sum, a norm of queries or a gate, then reads the result of a GEMM. Not under ``roundings=eager``.
"""

from __future__ import annotations

from torch import fx

from ..compat import statically_known_true
from ..matching.terms import NARROW
from ..rewriting.replace import copy_origin, emit, emit_like
from ..settings import Settings
from .common import aten
from .linear import linears, read


def into_products(graph: fx.Graph, settings: Settings) -> None:
    """Rewrite every such sum in `graph`."""
    if settings.roundings == "eager":
        return
    for each in list(linears(graph)):
        linear = read(each.product)  # anew: its bias may be what a sum before this one became
        assert linear is not None
        product, sum_ = linear.product, linear.node
        if linear.bias is None or product is sum_ or product.target is not aten.mm.default:
            continue
        if linear.dtype not in NARROW or sum_.meta["val"].dtype != linear.dtype:
            continue
        if not statically_known_true(linear.bias.meta["val"].stride(0) == 1):
            continue  # cuBLAS's epilogue reads a dense one
        with graph.inserting_before(sum_):
            found = emit(graph, aten.addmm.default, linear.bias, *product.args)
            copy_origin(product, found)
            for view in linear.views:
                found = emit_like(graph, view, found, *view.args[1:])
        sum_.replace_all_uses_with(found)
        graph.erase_node(sum_)
        for node in (*reversed(linear.views), product):
            graph.erase_node(node)
