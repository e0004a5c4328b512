"""Scales of columns that are multiplied behind a product of widened weights, put into these weights.

    mul(reshape(mm(x, cast(w))), scale)  ->  reshape(mm(x, mul(cast(w), scale)))          w in int8 or fp8

As of torchao's int8 weights. They are widened for each call, in a pass over them that can multiply for nothing; what
reads the multiple, or its sum with a bias (`biases`), a norm of queries or a gate, then reads the result of a GEMM.
Each scaled weight is rounded where eager rounds the product: as many roundings, and one less with a bias. Not under
``roundings=eager``. It has not been timed.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..matching.gain import CASTS, through_views
from ..matching.terms import NARROW
from ..rewriting.replace import copy_origin, emit, emit_like
from ..settings import Settings
from .common import aten, is_tensor
from .linear import row_behind


def into_weights(graph: fx.Graph, settings: Settings) -> None:
    """Rewrite every such multiple in `graph`."""
    if settings.roundings == "eager":
        return
    for product in graph.find_nodes(op="call_function", target=aten.mm.default):
        x, w = product.args
        dtype = product.meta["val"].dtype
        if dtype not in NARROW or not _is_widened(w) or (behind := row_behind(product, aten.mul.Tensor)) is None:
            continue
        multiple, scale, views = behind
        if multiple.meta["val"].dtype != dtype:
            continue
        with graph.inserting_before(multiple):
            scaled = emit(graph, aten.mul.Tensor, w, scale)
            found = emit(graph, aten.mm.default, x, scaled)
            copy_origin(product, scaled)
            copy_origin(product, found)
            for view in views:
                found = emit_like(graph, view, found, *view.args[1:])
        multiple.replace_all_uses_with(found)
        for node in (multiple, *reversed(views), product):
            graph.erase_node(node)


def _is_widened(w: Any) -> bool:
    """Whether `w` is cast from one byte an element, exactly, for this product only: others would read it unscaled."""
    w = through_views(w) if len(w.users) == 1 else w
    if w.target not in CASTS or len(w.users) != 1 or not is_tensor(w.args[0]):
        return False
    return w.args[0].meta["val"].dtype.itemsize == 1
