"""Keys chosen by flags, brought to the front: what attention by numbers of keys is given instead of a mask.

    order[b]  = the keys that take part in any case, the others that take part, those that do not      int64 [B, Sk]
    n[b]      = max(1, how many take part)                                                              int32 [B]
    out[b, i] = attention of k[order], v[order] by n; 0 where query i asks for no key

All of it is ATen, for Inductor to generate code for. Order and n are made once in a graph for all attentions that
choose by the same flags, from B x Sk flags; k and v in order are copies at the bandwidth of memory, of which Inductor
makes one with a cat before it. A query without any key is zero in torch's own definition of attention too; its fused
kernels differ (cuDNN attends to every key up to torch 2.11).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..matching.terms import same_size
from ..rewriting.replace import copy_origin
from ..rewriting.symbols import arguments as with_symbols
from .key_choice import Flags, KeyChoice
from .key_lengths import call

aten, prims = torch.ops.aten, torch.ops.prims
Known = dict[Any, Any]
TOKENS_FIRST = [0, 2, 1, 3]  # of [B, H, S, d], and back


def order_of_keys(graph: fx.Graph, choice: KeyChoice, q: fx.Node, known: Known) -> tuple[fx.Node, fx.Node]:
    """Nodes (order, n) for the samples of q `[B, H, S, d]`, made once per `known`, which is updated.

    They are made at the insertion point of the first call: later ones must come after it.
    """
    batch = q.meta["val"].shape[0]
    key = choice.keys, batch if isinstance(batch, int) else batch.node.expr
    if key not in known:
        before, after = choice.before, choice.after
        taken = _all(graph, choice.keys, before, after)
        if not same_size(taken.meta["val"].shape[0], batch):
            taken = call(graph, aten.expand.default, taken, with_symbols(graph, [batch, -1], [q]))
        count = call(graph, aten.sum.dim_IntList, taken, [1])
        count = call(graph, aten.add.Tensor, count, choice.sure) if choice.sure else count
        count = call(graph, aten.clamp_min.default, count, 1)
        ranks = call(graph, prims.convert_element_type.default, taken, torch.uint8)
        both = call(graph, aten.sort.stable, ranks, stable=True, dim=1, descending=True)
        order = graph.call_function(operator.getitem, (both, 1))
        order.meta["val"] = both.meta["val"][1]
        copy_origin(both, order)
        if choice.sure:
            order = call(graph, aten.add.Tensor, order, before) if before else order
            end = before + taken.meta["val"].shape[1]
            sure = [(0, before), (end, end + after)]
            parts = [_range(graph, order, *ends) for ends in sure if ends[0] < ends[1]]
            order = call(graph, aten.cat.default, [*parts, order], 1)
        known[key] = order, call(graph, prims.convert_element_type.default, count, torch.int32)
    return known[key]


def in_order(graph: fx.Graph, keys: fx.Node, order: fx.Node, known: Known) -> fx.Node:
    """k or v `[B, H, Sk, d]` with its tokens in this order, in memory `[B, Sk, H, d]`."""
    if order not in known:
        batch = order.meta["val"].shape[0]
        known[order] = _column(graph, order, batch)
    tokens = call(graph, aten.permute.default, keys, TOKENS_FIRST)
    tokens = call(graph, aten.index.Tensor, tokens, [known[order], order])
    return call(graph, aten.permute.default, tokens, TOKENS_FIRST)


def zero_where_nobody_asks(graph: fx.Graph, choice: KeyChoice, out: fx.Node, known: Known) -> fx.Node:
    """`out` `[B, H, S, d]`, zero for queries that ask for no key."""
    if not choice.queries:
        return out
    key = choice.queries, "queries"
    if key not in known:
        rows = _all(graph, choice.queries, 0, 0)
        for dim in (1, 3):
            rows = call(graph, aten.unsqueeze.default, rows, dim)
        known[key] = rows
    zero = call(graph, aten.full.default, out, [], 0.0, operands=False)
    return call(graph, aten.where.self, known[key], out, zero)


def _all(graph: fx.Graph, flags: Iterable[Flags], before: int, after: int) -> fx.Node:
    """Bool `[B, places]`, `[1, places]` for the same of each sample: where all flags are true, without the first
    `before` and the last `after` places, which are among those that are true in any case."""
    found: fx.Node | None = None
    for each in flags:
        node, value = each.node, each.node.meta["val"]
        if each.sample is not None and each.sample > each.place:
            node = call(graph, aten.transpose.int, node, each.sample, each.place)
        samples = 1 if each.sample is None else value.shape[each.sample]
        sizes = with_symbols(graph, [samples, value.shape[each.place]], [each.node])
        node = call(graph, aten.reshape.default, node, sizes)
        if value.dtype != torch.bool:
            node = call(graph, aten.ne.Scalar, node, 0)
        node = call(graph, aten.logical_not.default, node) if each.negated else node
        pad = [each.before - before, each.after - after]
        node = call(graph, aten.constant_pad_nd.default, node, pad, True) if any(pad) else node
        found = node if found is None else call(graph, aten.logical_and.default, found, node)
    assert found is not None
    return found


def _range(graph: fx.Graph, order: fx.Node, start: int, end: int) -> fx.Node:
    """start..end for each sample of `order`."""
    numbers = call(graph, aten.unsqueeze.default, _counted(graph, order, end - start, start), 0)
    sizes = with_symbols(graph, [order.meta["val"].shape[0], end - start], [order])
    return call(graph, aten.expand.default, numbers, sizes)


def _column(graph: fx.Graph, order: fx.Node, samples: Any) -> fx.Node:
    """The numbers of the samples, `[B, 1]`."""
    (count,) = with_symbols(graph, [samples], [order])
    return call(graph, aten.unsqueeze.default, _counted(graph, order, count), 1)


def _counted(graph: fx.Graph, like: fx.Node, count: Any, start: int = 0) -> fx.Node:
    how = {"start": start, "step": 1, "dtype": torch.int64, "requires_grad": False}
    return call(graph, prims.iota.default, like, count, operands=False, **how)
