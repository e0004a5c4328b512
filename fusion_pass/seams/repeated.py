"""A linear of rows that were repeated for tokens, computed for the rows.

    linear(f(repeat(rows)))  =  repeat(linear(f(rows)))         f row by row, as in `rewriting.repeats`

FLUX.3 repeats the embedding of a timestep for each token before the projections that make shifts, scales and gates of
it, Cosmos that of each frame for the frame's tokens. The product has then as many equal rows as there are tokens, and
everything that reads them reads a row for each token; behind repeated rows kernels read each once. Only for what is
repeated in the graph itself: rows that a pipeline repeats are inputs, and may differ.

The row is rounded as each of its copies was. Sums may be added in another order, as in any product of another number of
rows, so `dkfuse.roundings=eager` leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import fx

from ..matching.gain import footprint, total_bytes
from ..matching.rules import Code, Reject
from ..matching.terms import same_shape
from ..rewriting.repeats import Repeats, leading, reshaped
from ..rewriting.replace import copy_origin, emit, emit_copy
from ..rewriting.strides import RESHAPES, is_returned, spread
from ..settings import Settings
from .common import aten, check_allowed, record
from .linear import linears, read
from .seam import Seam

FAMILY = "repeated_rows"


def find(graph: fx.Graph, settings: Settings) -> Iterator[Seam]:
    """Every linear of repeated rows, also of those that are repeated once a linear before is computed for the rows."""
    found = {linear.node: linear for linear in linears(graph)}
    repeats = Repeats()
    for node in graph.nodes:
        repeats.read(node)
        if node not in found or (known := repeats.found.get(found[node].x)) is None:
            continue
        linear, shape = found[node], node.meta["val"].shape
        lead = leading(tuple(shape), math.prod(known.tokens))
        if lead is None or len(lead) + 1 != len(shape):  # its bias is added in another shape
            continue
        reject: Reject | None = None
        try:
            check_allowed(FAMILY, linear, settings)
            if settings.roundings == "eager":
                raise Reject(Code.ROUNDING, "roundings=eager: a product of fewer rows may add up in another order")
        except Reject as error:
            reject = error
        else:
            repeats.found[node] = replace(known, lead=lead, direct=False)
        op = "aten::mm" if linear.bias is None else "aten::addmm"
        before, after = (linear.x, linear.weight, node), (linear.weight,)
        traffic = [total_bytes(*(footprint(n.meta["val"]) for n in nodes)) for nodes in (before, after)]
        site = record(FAMILY, op, "cublas", linear.product, linear, tuple(traffic), reject)
        yield Seam(site, partial(_apply, graph, linear.product, repeats) if reject is None else None)


def _apply(graph: fx.Graph, product: fx.Node, repeats: Repeats) -> None:
    linear = read(product)  # seams before this one may have replaced what it read
    assert linear is not None
    with graph.inserting_before(linear.node):
        row = repeats.row(graph, linear.x)
        *outer, width = row.meta["val"].shape
        columns = linear.features[1]
        flat = emit(graph, aten.reshape.default, row, [-1, width])
        transposed = emit(graph, aten.permute.default, linear.weight, [1, 0])
        if linear.bias is None:
            made = emit(graph, aten.mm.default, flat, transposed)
        else:
            made = emit(graph, aten.addmm.default, linear.bias, flat, transposed)
        copy_origin(product, made)
        one = reshaped(graph, made, [*outer, columns])
        many = repeats.last(graph, linear.x, one)
        copy_origin(product, many)
        if is_returned(linear.node):  # to who may write into one row
            many = emit_copy(graph, many)
            repeats.read(many)
    for user in [u for u in linear.node.users if u.target in RESHAPES]:
        if same_shape(user.meta["val"].shape, many.meta["val"].shape):
            user.replace_all_uses_with(many)
            graph.erase_node(user)
    if linear.node.users:
        result, wanted = many, linear.node.meta["val"].shape
        if not same_shape(wanted, many.meta["val"].shape):
            with graph.inserting_before(linear.node):
                result = reshaped(graph, many, wanted)
            repeats.read(result)
        linear.node.replace_all_uses_with(result)
    graph.erase_node(linear.node)
    spread(many)
