"""Weights that are widened from int8 or fp8 for each call, as torchao's, brought into the form of other weights.

    mul(reshape(mm(x, cast(w))), scale)  ->  reshape(mm(x, mul(cast(w), scale)))      scales of columns go into them
    mm(x, pointwise(permute(w)))         ->  mm(x, permute(permute(pointwise(..))))   they end in a transposition

The pass that widens weights multiplies for nothing. What reads the multiple, or its sum with a bias (`biases`), a norm
of queries or a gate, then reads the result of a GEMM. Each scaled weight is rounded where eager rounds the product: as
many roundings, and one less with a bias; not under ``roundings=eager``. It has not been timed.

Of what ends in a transposition linears are read, which other seams start from. Weights that were transposed before
they were widened lie in memory as those that are transposed afterwards, so that two more views say it.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..compat import statically_known_true
from ..matching.gain import CASTS, is_elementwise, through_views
from ..matching.terms import NARROW
from ..rewriting.replace import copy_origin, emit
from ..settings import Settings
from .common import aten, is_tensor
from .linear import TRANSPOSES, replace_product, row_behind


def bring_into_form(graph: fx.Graph, settings: Settings) -> None:
    """Rewrite every product of such weights in `graph`."""
    if settings.roundings != "eager":
        for product in graph.find_nodes(op="call_function", target=aten.mm.default):
            _scale_into_weights(graph, product)
    for target in (aten.mm.default, aten.addmm.default):
        for product in graph.find_nodes(op="call_function", target=target):
            _end_in_transposition(graph, product)


def _scale_into_weights(graph: fx.Graph, product: fx.Node) -> None:
    x, w = product.args
    dtype = product.meta["val"].dtype
    if dtype not in NARROW or not _is_widened(w) or (behind := row_behind(product, aten.mul.Tensor)) is None:
        return
    multiple, scale, views = behind
    if multiple.meta["val"].dtype != dtype:
        return

    def scaled_product() -> fx.Node:
        scaled = emit(graph, aten.mul.Tensor, w, scale)
        copy_origin(product, scaled)
        return emit(graph, aten.mm.default, x, scaled)

    replace_product(product, multiple, views, scaled_product)


def _is_widened(w: Any) -> bool:
    """Whether `w` is cast from one byte an element, exactly, for this product only: others would read it unscaled."""
    w = through_views(w) if len(w.users) == 1 else w
    if w.target not in CASTS or len(w.users) != 1 or not is_tensor(w.args[0]):
        return False
    return w.args[0].meta["val"].dtype.itemsize == 1


def _end_in_transposition(graph: fx.Graph, product: fx.Node) -> None:
    """Give a product of pointwise results that lie transposed a transposition of dense ones."""
    w = product.args[-1]
    if not is_tensor(w) or w.target in TRANSPOSES or not is_elementwise(w):
        return
    inner, outer = w.meta["val"].stride()
    if not statically_known_true(inner == 1) or not statically_known_true(outer == w.meta["val"].shape[0]):
        return
    with graph.inserting_before(product):
        dense = emit(graph, aten.permute.default, w, [1, 0])
        product.replace_input_with(w, emit(graph, aten.permute.default, dense, [1, 0]))
