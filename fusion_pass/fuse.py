"""The pass: one pure function over an `fx.Graph` with ``meta["val"]``, usable on any ATen graph.

    ops of other libraries           as what they compute
    products as the model has them   what Inductor padded
    seams                            what touches a GEMM or an attention, rewritten at once
    TermView(graph)                  nothing mutated
    anchors                          what could be fused, found without the rules
    rules, widest first, from the last node up
        match -> checks -> gain -> kernel
    replace, sort, drop dead code    only for the sites that were taken

The result says what became of every anchor.
"""

from __future__ import annotations

import time

import torch
from torch import fx

from . import seams
from .choosing import building
from .planner import Plan, plan
from .reporting import records
from .reporting.report import Graph, Status
from .rewriting import known_ops, layouts, padded, picked, repeats, segments, unit_vectors
from .settings import Settings

__all__ = ["Plan", "decided", "plan", "run", "settled"]


def decided(graph: fx.Graph, settings: Settings, built: bool = False) -> Plan:
    """Take the seams of `graph`, which changes it, and decide what else to fuse in it; the record has both.

    built: build the kernels that can be built ahead; a site whose kernel cannot is planned once more without it.
    """
    started = time.perf_counter()
    without_assertions(graph)
    known_ops.expand(graph)
    repeats.drop_repeats_of_one(graph)
    products = padded.without_padding(graph)
    picked.functions_of_rows(graph)
    taken = seams.run(graph, settings)
    repeats.repeat_last(graph)
    spent = sum(site.status is Status.FUSED for site in taken)
    result = settled(graph, settings, spent)
    while built and building.failed(result.taken):  # remembered: the next plan chooses another kernel
        result = settled(graph, settings, spent)
    result.record.seams, result.products = taken, products
    result.record.seconds = time.perf_counter() - started
    return result


def without_assertions(graph: fx.Graph) -> None:
    """Drop what exported programs assert of dtypes and devices, which were known when this graph was made.

    Inductor drops it later in its passes; until then it would be a reader of every value that is cast.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)


def settled(graph: fx.Graph, settings: Settings, spent: int = 0) -> Plan:
    """`plan`, and once more where unit vectors get weights, or a copy brings rows together or gives sites the layout
    that they were refused for.

    Without sites gained each is taken back.
    """

    def gained(before: Plan, made: picked.Picks) -> Plan:
        if not made:
            return before
        again = plan(graph, settings, spent)
        if _fused(again) > _fused(before):
            return again
        picked.undo(graph, made)
        return before

    first = plan(graph, settings, spent)
    if settings.roundings == "fused":
        first = gained(first, unit_vectors.weighted(graph, first.view))
    first = gained(first, [*segments.as_picks(graph), *picked.side_by_side(graph)])
    before = layouts.copies_of_rows(graph)
    if not (copies := layouts.settle(graph, first.refused)):
        return first
    again = plan(graph, settings, spent)
    if _fused(again) - _fused(first) >= layouts.worth(graph, copies, before):
        return again
    layouts.undo(graph, copies)
    return first


def _fused(planned: Plan) -> int:
    return sum(site.status is Status.FUSED for site in planned.record.sites)


def run(graph: fx.Graph, settings: Settings, lowered: bool = True) -> Graph:
    """Fuse `graph` in place and return its record. `lowered=False` leaves ``dkfuse::`` ops in the graph."""
    from .rewriting.lower import lower
    from .rewriting.opaque import lower_opaque
    from .rewriting.replace import replace
    from .rewriting.strides import renew_views

    started = time.perf_counter()
    what = decided(graph, settings, built=True)
    calls = replace(graph, what.view, what.taken)
    padded.pad_again(graph, what.products)
    if lowered:
        lower(graph, calls)
        renew_views(graph)
        records.add_launches(what.record.sites, what.states)
    else:
        lower_opaque(graph, calls, eager=True)
    for call in calls:
        call.meta.pop("dkfuse_site", None)  # a graph that is kept keeps no plan
    what.record.seconds = time.perf_counter() - started
    return what.record
