"""Weights that are widened from int8 or fp8 for each call, as torchao's, brought into the form of other weights.

    mul(reshape(mm(x, cast(w))), scale)  ->  reshape(mm(x, mul(cast(w), scale)))      scales of columns go into them
    mm(x, pointwise(permute(w)))         ->  mm(x, permute(pointwise(w)))             they end in a transposition

The pass that widens weights multiplies for nothing. What reads the multiple, or its sum with a bias (`biases`), a norm
of queries or a gate, then reads the result of a GEMM. Each scaled weight is rounded where eager rounds the product: as
many roundings, and one less with a bias; not under ``roundings=eager``.

Of what ends in a transposition linears are read, which other seams start from, and their GEMMs read rows of weights as
they lie. Of weights that are transposed before they are widened Inductor writes columns instead.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..compat import statically_known_true
from ..matching.gain import CASTS, is_elementwise, through_views
from ..matching.terms import NARROW
from ..rewriting.replace import copy_origin, emit, emit_like
from ..settings import Settings
from .common import aten, is_tensor
from .linear import TRANSPOSES, replace_product, row_behind

PRODUCTS = (aten.mm.default, aten.addmm.default)


def bring_into_form(graph: fx.Graph, settings: Settings) -> None:
    """Rewrite every product of such weights in `graph`."""
    if settings.roundings != "eager":
        for product in graph.find_nodes(op="call_function", target=aten.mm.default):
            _scale_into_weights(graph, product)
    products = [product for target in PRODUCTS for product in graph.find_nodes(op="call_function", target=target)]
    for w in dict.fromkeys(product.args[-1] for product in products):
        _end_in_transposition(graph, w)


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


def _end_in_transposition(graph: fx.Graph, w: fx.Node) -> None:
    """Let products read the transposition of weights that are computed as they lie, not from transposed ones.

    Inductor writes what pointwise ops compute row by row, which transposes the weights in memory.
    """
    if not is_elementwise(w) or any(reader.target not in PRODUCTS or reader.args[-1] is not w for reader in w.users):
        return
    inner, outer = w.meta["val"].stride()
    if not statically_known_true(inner == 1) or not statically_known_true(outer == w.meta["val"].shape[0]):
        return
    with graph.inserting_before(w):
        as_it_lies = _of_transposed(graph, w)
        w.replace_all_uses_with(emit(graph, aten.permute.default, as_it_lies, [1, 0]))


def _of_transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What an elementwise op computes, transposed."""
    return emit_like(graph, node, *fx.map_arg(node.args, lambda operand: _transposed(graph, operand)))


def _transposed(graph: fx.Graph, operand: fx.Node) -> fx.Node:
    """A matrix, or what is broadcast to one, transposed: that which it is the transposition of, where it is one."""
    if not is_tensor(operand) or not (dims := operand.meta["val"].dim()):
        return operand
    if dims == 1:
        return emit(graph, aten.unsqueeze.default, operand, 1)
    if operand.target in TRANSPOSES:
        return operand.args[0]
    if is_elementwise(operand) and len(operand.users) == 1:
        return _of_transposed(graph, operand)
    return emit(graph, aten.permute.default, operand, [1, 0])
