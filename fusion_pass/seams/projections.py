"""Projections of one input as one GEMM.

    y_i = x @ w_i.T + b_i,  i = 1..n     becomes     y = x @ W.T + b,  y_i = y[:, n_i : n_(i+1)]

W [sum N, K] and b [sum N] are not copied: they are the memory of the w_i and b_i, which `dkfuse.pack` puts side by
side, seen from the first of them (``as_strided``). The y_i are columns of y, read in place through their strides.

When it pays. A GEMM takes time for its waves of tiles and about one wave more to fill and drain the machine; one GEMM
instead of n saves n - 1 times that. On an H100, bf16, q, k and v: 429 -> 349 us at 4096 x 3072 -> 3072, 60 -> 50 at
512 x 3072, nothing at 32760 x 5120, where the ramps are 2 % of the time. In whole models, whose power is bound, less
was left of that: 2.3 % of the GEMM time of SD3.5-Large, 0.7 % of Qwen-Image's, none of FLUX.1's. What remains is one
launch in the place of three.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import fx

from .. import compat, memory
from ..choosing.choose import resolve_target
from ..matching.rules import Code, Stage
from ..reporting.report import Reason, Site, Status
from ..rewriting import origin
from ..rewriting.replace import copy_origin, emit, retell
from ..rewriting.strides import copying_reader, propagate
from ..settings import Settings
from .common import TILE, as_one, described, sms, why_apart
from .epilogue import problem
from .gelu import find as gelus
from .linear import Linear, linears, source
from .seam import Seam

aten = torch.ops.aten
FAMILY = "packed_projection"
RAMP = 1.16  # waves: (429 - 349) / 2 us of 34 us each
WORTH = 0.04  # of the time of the separate GEMMs
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def find(graph: fx.Graph, settings: Settings) -> Iterator[Seam]:
    """Groups of linears that read the same rows: those whose weights lie side by side, and those that could."""
    found = gelus(graph, {linear.node: linear for linear in linears(graph)})
    with_gelu = {gelu.linear.product for gelu in found if problem(gelu, settings) is None}  # worth more in its epilogue
    for group in _of_one_input(graph, with_gelu):
        target = resolve_target(settings.target, group[0].device)
        if not target.startswith("sm") or group[0].dtype not in DTYPES:
            continue
        packed = _side_by_side(group)
        rest = [linear for linear in group if all(linear not in run for run in packed)]
        for run in packed:
            yield _packed(run, target, settings)
        for siblings in _siblings(rest):
            yield Seam(_left(siblings, *_why_not(siblings, target)))


def _of_one_input(graph: fx.Graph, without: set[fx.Node]) -> list[list[Linear]]:
    groups: dict[object, list[Linear]] = {}
    for linear in linears(graph):
        value = linear.x.meta["val"]
        if linear.product in without or value.dim() != 2 or value.dtype != linear.weight.meta["val"].dtype:
            continue
        if not all(isinstance(size, int) for size in linear.weight.meta["val"].shape):
            continue  # weights that are no parameters
        with_bias = linear.product.target is aten.addmm.default
        key = (source(linear.x), str((value.shape, value.stride())), with_bias)  # a SymInt has no hash
        groups.setdefault(key, []).append(linear)
    return [group for group in groups.values() if len(group) > 1]


def _siblings(group: list[Linear]) -> list[list[Linear]]:
    """What `dkfuse.pack` would put side by side: the linears of one module."""
    found: dict[str, list[Linear]] = {}
    for linear in group:
        path = (origin.module(linear.product) or "").removesuffix(".base_layer")
        found.setdefault(path.rpartition(".")[0], []).append(linear)
    return [siblings for siblings in found.values() if len(siblings) > 1]


def _side_by_side(group: list[Linear]) -> list[list[Linear]]:
    """Runs of linears whose weights, and biases, follow each other in memory, in that order."""
    known = [linear for linear in group if all(memory.KEY in node.meta for node in _weights(linear))]
    places = {linear: memory.place(linear.weight.meta["val"]) for linear in known}
    ordered = sorted((p.storage, p.start, i) for i, linear in enumerate(known) if (p := places[linear]) is not None)
    runs: list[list[Linear]] = []
    for _, _, i in ordered:
        last = runs[-1][-1] if runs else None
        pairs = zip(_weights(last), _weights(known[i]), strict=True) if last is not None else ()
        if last is not None and all(memory.follows(a.meta["val"], b.meta["val"]) for a, b in pairs):
            runs[-1].append(known[i])
        else:
            runs.append([known[i]])
    return [run for run in runs if len(run) > 1]


def _weights(linear: Linear) -> list[fx.Node]:
    with_bias = linear.product.target is aten.addmm.default and linear.bias is not None
    return [linear.weight, linear.bias] if with_bias else [linear.weight]  # type: ignore[list-item]


def saved(rows: int, columns: list[int], target: str) -> float:
    """The fraction of the time of n GEMMs ``[rows, K] @ [K, N_i]`` that one GEMM of all columns is expected to save."""
    waves = rows * sum(columns) / (math.prod(TILE) * sms(target))
    separate = waves + len(columns) * RAMP
    return (len(columns) - 1) * RAMP / separate


def _gain(group: list[Linear], target: str) -> float:
    rows = compat.hint(group[0].x.meta["val"].shape[0])
    return saved(rows, [linear.features[1] for linear in group], target) if rows is not None else 1.0


def _why_not(group: list[Linear], target: str) -> tuple[str, str]:
    """The code and text of a group whose weights do not lie side by side."""
    count = f"{len(group)} projections of one input"
    if _gain(group, target) < WORTH:
        return "no_gain", f"{count}: they fill the GPU for so long that one GEMM would save less than {WORTH:.0%}"
    return why_apart([node for linear in group for node in _weights(linear)], count)


def _packed(run: list[Linear], target: str, settings: Settings) -> Seam:
    count = f"{len(run)} projections of one input with packed weights"
    if not settings.allows(FAMILY):
        return Seam(_left(run, Code.DISABLED.value, f"rule {FAMILY} is switched off by dkfuse.rules"))
    if _gain(run, target) < WORTH:
        text = f"{count}: they fill the GPU for so long that one GEMM would save less than {WORTH:.0%}"
        return Seam(_left(run, "no_gain", text))
    readers: set[fx.Node] = set()
    if (copied := copying_reader(_columns(run), readers)) is not None:
        text = f"{count}: {copied.target} would have to copy its columns of the result"
        return Seam(_left(run, Code.LAYOUT.value, text))
    site = _site(run)
    site.status, site.op, site.kernel = Status.FUSED, f"aten::{run[0].product.target.__name__.split('.')[0]}", "native"  # type: ignore[union-attr]
    x, n = run[0].x.meta["val"], sum(linear.features[1] for linear in run)
    if all(isinstance(size, int) for size in x.shape):
        rest = (n * x.shape[1] + x.shape[0] * n) * x.itemsize
        site.bytes_before, site.bytes_after = len(run) * x.nbytes + rest, x.nbytes + rest
    return Seam(site, lambda: _apply(run, readers))


def _columns(run: list[Linear]) -> list[tuple[fx.Node, torch.Tensor]]:
    """Each product with the value that it will have: columns of the wider one."""
    x, n = run[0].x.meta["val"], sum(linear.features[1] for linear in run)
    whole = x.new_empty((x.shape[0], n), dtype=run[0].product.meta["val"].dtype)
    parts = whole.split([linear.features[1] for linear in run], 1)
    return [(linear.product, part) for linear, part in zip(run, parts, strict=True)]


def _apply(run: list[Linear], readers: set[fx.Node]) -> None:
    graph = run[0].product.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    first = min((linear.product for linear in run), key=order.__getitem__)
    columns = [linear.features[1] for linear in run]
    with graph.inserting_before(first):
        weight = as_one(graph, run[0].weight, sum(columns))
        operands = [first.args[-2], emit(graph, aten.permute.default, weight, [1, 0])]
        if first.target is aten.addmm.default:
            operands.insert(0, as_one(graph, run[0].bias, sum(columns)))
        result = emit(graph, first.target, *operands)
        copy_origin(first, result)
        stops = list(itertools.accumulate(columns))
        parts = [
            emit(graph, aten.slice.Tensor, result, 1, stop - size, stop)
            for size, stop in zip(columns, stops, strict=True)
        ]
    for linear, part in zip(run, parts, strict=True):
        copy_origin(linear.product, part)
        linear.product.replace_all_uses_with(part)
        graph.erase_node(linear.product)
        propagate(part)
    retell(readers)
    for nodes in zip(*map(_weights, run), strict=True):
        memory.take(nodes)


def _left(group: list[Linear], code: str, message: str) -> Site:
    site = _site(group)
    site.reason = Reason(Stage.KERNEL.value, code, message, FAMILY)
    site.attempts = [site.reason]
    return site


def _site(group: list[Linear]) -> Site:
    shown = {"x": group[0].x, **{f"weight{i}": linear.weight for i, linear in enumerate(group)}}
    site = described(FAMILY, group[0].product, shown, Status.LEFT_TO_INDUCTOR)
    site.module = (site.module or "").rpartition(".")[0] or None  # the one that has the linears
    return site
