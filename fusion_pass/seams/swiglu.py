"""SwiGLU in the GEMM before it: quack's gated epilogue, in the place of a pass over the linears' results.

    silu(x @ w1.T [+ b1]) * (x @ w3.T [+ b3])        w1, w3 [F, K]

as one product with the weight [w1; w3] or [w3; w1]: of one linear whose result is cut in two, or of two linears whose
weights `dkfuse.pack` laid side by side. The weights are not copied; two are read as one like those of
`projections`, whose guard checks at each call that they still lie so.

    bytes a row:   K read, 2 F written by the GEMM, 2 F read and F written by the pass
                   K read, F written by the gated GEMM

Eager rounds both linears and the silu before the last product, the epilogue once at the end; `dkfuse.roundings=eager`
leaves it alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx

from dkfuse.kernels.gemm_kernels import QUACK

from .. import memory
from ..matching.gain import footprint, is_elementwise, through_views
from ..matching.rules import Code, Reject, Stage
from ..matching.terms import same_shape, short_dtype
from ..rewriting.replace import copy_origin
from ..rewriting.symbols import arguments as with_symbols
from ..settings import Settings
from . import gating, gemm_choice
from .common import as_one, mergeable, read_sizes_elsewhere, record, rows, view, why_apart
from .gating import Gating
from .linear import Linear, linears, read, source
from .seam import Seam

FAMILY = "swiglu_epilogue"
OP = "dkfuse::linear"


def find(graph: fx.Graph, settings: Settings) -> Iterator[Seam]:
    """Every SwiGLU of linears of one input."""
    for found in gating.find(graph, {linear.node: linear for linear in linears(graph)}):
        if not _of_one_input(found.linears):
            continue
        reject, tiles = None, ""
        try:
            tiles = _chosen(found, settings)
        except Reject as error:
            reject = error
        linear = found.gate.linear
        site = record(FAMILY, OP, QUACK, linear.node, linear, _traffic(found), reject)
        for name, other in zip(("weight2", "bias2"), _weights(found.linears[-1]), strict=False):
            if len(found.linears) == 2:
                site.shapes[name] = [*map(int, other.meta["val"].shape)]
        yield Seam(site, partial(_apply, graph, found, tiles) if reject is None else None)


def _of_one_input(found: list[Linear]) -> bool:
    first, last = found[0], found[-1]
    a, b = first.x.meta["val"], last.x.meta["val"]
    alike = same_shape(a.shape, b.shape) and same_shape(a.stride(), b.stride()) and a.dtype == b.dtype
    return alike and (first.x is last.x or source(first.x) is source(last.x))


def _chosen(found: Gating, settings: Settings) -> str:
    """quack's tiles for the SwiGLU, or Reject."""
    linear = found.gate.linear
    if settings.roundings == "eager":
        text = "roundings=eager: the epilogue rounds neither half before their product, eager both and the silu"
        raise Reject(Code.ROUNDING, text)
    if (reader := found.escape()) is not None:
        raise Reject(Code.ESCAPES, f"{reader.name}, a value before the SwiGLU's result, has another reader")
    if (other := found.result.meta["val"].dtype) != linear.dtype or (other := found.narrowed()) is not None:
        own = short_dtype(linear.dtype)
        text = f"a value of the SwiGLU is {short_dtype(other)}, its linears and the epilogue's result are {own}"
        raise Reject(Code.DTYPE, text)
    if linear.batched and not (mergeable(linear.x.meta["val"]) or is_elementwise(through_views(linear.x))):
        text = "the linear reads a slice of a batch, which would have to be copied to be one matrix"
        raise Reject(Code.LAYOUT, text, Stage.KERNEL, left=True)
    _check_halves(found)
    apart = _why_apart(found)
    x, weights = linear.x.meta["val"], [node.meta["val"] for node in _weights(linear)]
    if len(found.linears) == 2:  # as they will be, or would be, side by side
        weights = [w.new_empty((2 * w.shape[0], *w.shape[1:])) for w in weights]
    values = {"x": x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), "weight": weights[0], "bias": None}
    if len(weights) > 1:
        values["bias"] = weights[1]
    tiles = gemm_choice.choose(values, _act(found), FAMILY, settings, build=apart is None)
    if apart is not None:
        raise apart
    return tiles


def _check_halves(found: Gating) -> None:
    linear, other = found.gate.linear, found.up.linear
    widths = found.gate.width, found.up.width
    whole = [found.gate.start == found.up.start == 0 and widths == (linear.features[1], other.features[1])]
    if linear is other or linear == other:
        starts = sorted((found.gate.start, found.up.start))
        whole = [starts == [0, widths[0]] and 2 * widths[0] == linear.features[1]]
    if not all(whole) or widths[0] != widths[1]:
        text = (
            f"silu of columns {found.gate.start}:{found.gate.stop} times columns {found.up.start}:{found.up.stop} of "
            f"linears of {linear.features[1]} and {other.features[1]}: the halves of one, or two whole ones, are needed"
        )
        raise Reject("columns", text, Stage.KERNEL, left=True)
    if (linear.bias is None) != (other.bias is None):
        raise Reject("one_bias", "one of the two linears has a bias, the other has none", Stage.KERNEL, left=True)


def _weights(linear: Linear) -> list[fx.Node]:
    return [linear.weight] if linear.bias is None else [linear.weight, linear.bias]


def _in_memory(found: Gating) -> list[Linear] | None:
    """The linears in the order of their weights, of which each follows the one before in memory; None: they do not."""
    for order in (found.linears, found.linears[::-1]):
        pairs = list(zip(*map(_weights, order), strict=True))
        known = all(memory.KEY in node.meta for pair in pairs for node in pair)
        if known and all(memory.follows(a.meta["val"], b.meta["val"]) for a, b in pairs):
            return order
    return None


def _why_apart(found: Gating) -> Reject | None:
    """Why two linears cannot be one product; None where they can, or are one."""
    if len(found.linears) == 1 or _in_memory(found) is not None:
        return None
    weights = [node for linear in found.linears for node in _weights(linear)]
    return Reject(*why_apart(weights, "its two linears"), Stage.KERNEL, left=True)


def _act(found: Gating) -> str:
    """Which half of the weight is the gate's; the first, of two that lie apart."""
    if len(found.linears) == 1:
        return "silu_first" if found.gate.start < found.up.start else "silu_second"
    order = _in_memory(found) or found.linears
    return "silu_first" if order[0] == found.gate.linear else "silu_second"


def _traffic(found: Gating) -> tuple[int | None, int | None]:
    """Eager writes the linears' results, reads and writes for the silu and the product; the epilogue writes once."""
    inputs = [found.gate.linear.x, *(node for linear in found.linears for node in _weights(linear))]
    moved = [footprint(n.meta["val"]) for n in (*inputs, found.result)]
    if any(m is None for m in moved):
        return None, None
    total = sum(m for m in moved if m is not None)
    return total + 6 * (moved[-1] or 0), total


def _apply(graph: fx.Graph, found: Gating, tiles: str) -> None:
    linear = read(found.gate.linear.product)  # anew: a seam before this one may have replaced what it reads
    assert linear is not None
    target: Any = torch.ops.dkfuse.linear.default
    with graph.inserting_before(found.result):
        x = rows(graph, linear.x)
        weights: list[Any] = _weights(linear)
        if len(found.linears) == 2:
            order = _in_memory(found)
            assert order is not None
            pairs = list(zip(*map(_weights, order), strict=True))
            weights = [as_one(graph, pair[0], 2 * pair[0].meta["val"].shape[0]) for pair in pairs]
            for pair in pairs:
                memory.take(pair)
        args, kwargs = (x, *weights), {"act": _act(found), "using": QUACK, "tiles": tiles}
        call = graph.call_function(target, args, kwargs)
        call.meta["val"] = target(*(a.meta["val"] for a in args), **kwargs)
        copy_origin(found.result, call)
        result = call
        wanted = found.result.meta["val"].shape
        if not same_shape(call.meta["val"].shape, wanted):
            live = [linear.x, source(linear.x)]
            result = view(graph, call, with_symbols(graph, list(wanted), live), wanted)
    found.result.replace_all_uses_with(result)
    old = [*found.inside, found.result]
    for each in found.linears:
        old += [each.product, *each.views, each.node]
    read_sizes_elsewhere(graph, old, [linear.x, result])
