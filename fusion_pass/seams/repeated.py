"""A linear of one row that was repeated for all tokens, computed for the row.

    linear(f(expand(row)))  =  expand(linear(f(row)))           row [B, 1, K] or [1, K], f pointwise

FLUX.3 repeats the embedding of a timestep for each token before the projections that make shifts, scales and gates of
it. The product has then as many equal rows as there are tokens, and everything that reads them reads a row for
each token; behind a repeated row kernels read one. Only for what is repeated in the graph itself: rows that a pipeline
repeats are inputs, and may differ.

The row is rounded as each of its copies was. Sums may be added in another order, as in any product of another number of
rows, so `dkfuse.roundings=eager` leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import fx

from ..matching.gain import footprint, is_elementwise, total_bytes
from ..matching.rules import Code, Reject
from ..matching.terms import same_shape, same_size
from ..rewriting.replace import copy_origin, emit, emit_copy, emit_like
from ..rewriting.strides import RESHAPES, is_returned, spread
from ..settings import Settings
from .common import aten, check_allowed, is_tensor, record
from .linear import linears, read
from .seam import Seam

FAMILY = "repeated_rows"
Outer = tuple[Any, ...]
COPIES = (*RESHAPES, aten.clone.default, aten.alias.default)


def find(graph: fx.Graph, settings: Settings) -> Iterator[Seam]:
    """Every linear of repeated rows, also of those that are repeated once a linear before is computed for one."""
    found = {linear.node: linear for linear in linears(graph)}
    repeated: dict[fx.Node, Outer] = {}
    for node in graph.nodes:
        if (outer := _outer(node, repeated)) is not None:
            repeated[node] = outer
        if node not in found or found[node].x not in repeated:
            continue
        linear, shape = found[node], node.meta["val"].shape
        if len(shape) != 2 and not same_shape(shape[:-1], repeated[linear.x]):  # its bias is added in another shape
            continue
        reject: Reject | None = None
        try:
            check_allowed(FAMILY, linear, settings)
            if settings.roundings == "eager":
                raise Reject(Code.ROUNDING, "roundings=eager: a product of fewer rows may add up in another order")
        except Reject as error:
            reject = error
        else:
            repeated[node] = repeated[linear.x]
        op = "aten::mm" if linear.bias is None else "aten::addmm"
        before, after = (linear.x, linear.weight, node), (linear.weight,)
        traffic = [total_bytes(*(footprint(n.meta["val"]) for n in nodes)) for nodes in (before, after)]
        site = record(FAMILY, op, "cublas", linear.product, linear, tuple(traffic), reject)
        yield Seam(site, partial(_apply, graph, linear.product) if reject is None else None)


def _is_expand(node: fx.Node) -> bool:
    """``[B, 1, K]`` or ``[1, K]`` for every token."""
    if node.target is not aten.expand.default:
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    if not 2 <= len(before) == len(after) <= 3 or not all(isinstance(size, int) for size in before):
        return False
    token = len(before) - 2
    grown = [d for d, (one, many) in enumerate(zip(before, after, strict=True)) if not same_size(one, many)]
    return grown == [token] and before[token] == 1


def _outer(node: fx.Node, repeated: Mapping[fx.Node, Outer]) -> Outer | None:
    """Samples and tokens of repeated rows: an expand, a copy of such rows, or a pointwise op that treats them alike."""
    if _is_expand(node):
        return tuple(node.meta["val"].shape[:-1])
    if node.op != "call_function" or not (node.target in COPIES or is_elementwise(node)):
        return None
    inputs = _inputs(node)
    if not inputs or not all(i in repeated for i in inputs):
        return None
    shape, before, outer = node.meta["val"].shape, inputs[0].meta["val"].shape, repeated[inputs[0]]
    if node.target in COPIES:  # [B * L, K] or [B, L, K]
        fits = len(shape) == 2 or same_shape(shape[:-1], outer)
        return outer if len(shape) and same_size(before[-1], shape[-1]) and fits else None
    alike = all(same_shape(i.meta["val"].shape, shape) and same_shape(repeated[i], outer) for i in inputs)
    return outer if alike else None


def _inputs(node: fx.Node) -> list[fx.Node]:
    """What `node` reads but numbers, sizes and what is the same for every row, such as a bias."""
    return [i for i in node.all_input_nodes if is_tensor(i) and i.meta["val"].dim() > 1]


def _apply(graph: fx.Graph, product: fx.Node) -> None:
    linear = read(product)  # seams before this one may have replaced what it read
    assert linear is not None
    with graph.inserting_before(linear.node):
        row, expand = _row(graph, linear.x, {})
        *outer, width = row.meta["val"].shape
        columns = linear.features[1]
        flat = emit(graph, aten.reshape.default, row, [-1, width])
        transposed = emit(graph, aten.permute.default, linear.weight, [1, 0])
        if linear.bias is None:
            made = emit(graph, aten.mm.default, flat, transposed)
        else:
            made = emit(graph, aten.addmm.default, linear.bias, flat, transposed)
        copy_origin(product, made)
        one = emit(graph, aten.reshape.default, made, [*outer, columns])
        many = emit(graph, aten.expand.default, one, [*expand.args[1][:-1], columns])  # type: ignore[index]
        copy_origin(product, many)
        if is_returned(linear.node):  # to who may write into one row
            many = emit_copy(graph, many)
    for user in [u for u in linear.node.users if u.target in RESHAPES]:
        if same_shape(user.meta["val"].shape, many.meta["val"].shape):
            user.replace_all_uses_with(many)
            graph.erase_node(user)
    if linear.node.users:
        result, wanted = many, linear.node.meta["val"].shape
        if not same_shape(wanted, many.meta["val"].shape):
            with graph.inserting_before(linear.node):
                result = emit(graph, aten.reshape.default, many, [-1, columns])
        linear.node.replace_all_uses_with(result)
    graph.erase_node(linear.node)
    spread(many)


def _row(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> tuple[fx.Node, fx.Node]:
    """One row for each sample of the repeated rows `node`, and the node that repeats it."""
    if node not in known:
        if _is_expand(node):
            known[node] = node.args[0], node  # type: ignore[assignment]
        elif node.target in COPIES:
            known[node] = _row(graph, _inputs(node)[0], known)
        else:
            rows = {i: _row(graph, i, known) for i in _inputs(node)}
            args = fx.map_arg(node.args, lambda i: rows[i][0] if i in rows else i)
            known[node] = emit_like(graph, node, *args), next(iter(rows.values()))[1]
    return known[node]
