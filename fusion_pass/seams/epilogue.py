"""Linear + tanh-GELU in one GEMM: cublasLt's GELU epilogue, in the place of a pass over the linear's result.

    gelu_tanh(x @ weight.T + bias)

PyTorch takes the epilogue in `aten._addmm_activation` where bias is a dense vector, dtypes are equal and rows are
aligned; elsewhere it computes the same in two steps. The GELU then reads the GEMM's fp32 accumulator instead of the
rounded result, so the seam rounds once less than eager; ``dkfuse.roundings=eager`` leaves it alone. A product without a
bias has no such call in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import fx

from .. import compat
from ..matching.gain import footprint, is_elementwise, through_views
from ..matching.rules import Code, Reject, Stage
from ..matching.terms import short_dtype
from ..rewriting.replace import copy_origin
from ..settings import Settings
from . import gelu
from .common import aten, check_allowed, check_sizes, mergeable, read_sizes_elsewhere, record, reshaped, rows
from .gelu import Gelu
from .linear import linears, read
from .seam import Seam

FAMILY = "gelu_epilogue"
OP = "dkfuse::linear_gelu"
KERNEL = "cublaslt"


def find(graph: fx.Graph, settings: Settings) -> Iterator[Seam]:
    """Every linear whose result goes through a tanh-GELU."""
    for found in gelu.find(graph, {linear.node: linear for linear in linears(graph)}):
        reject = problem(found, settings)
        site = record(FAMILY, OP, KERNEL, found.linear.node, found.linear, _traffic(found), reject)
        yield Seam(site, partial(_apply, graph, found) if reject is None else None)


def problem(found: Gelu, settings: Settings) -> Reject | None:
    """Why `found` stays as it is."""
    try:
        _check(found, settings)
    except Reject as reject:
        return reject
    return None


def _check(found: Gelu, settings: Settings) -> None:
    linear = found.linear
    check_allowed(FAMILY, linear, settings)
    if settings.roundings == "eager":
        text = "roundings=eager: the epilogue does not round the linear's result before the GELU, as eager does"
        raise Reject(Code.ROUNDING, text)
    if (reader := found.escape()) is not None:
        raise Reject(Code.ESCAPES, f"{reader.name}, a value before the GELU, has another reader")
    dtype = found.result.meta["val"].dtype
    if dtype != linear.dtype:
        text = f"the GELU's result is kept in {short_dtype(dtype)}, the epilogue gives {short_dtype(linear.dtype)}"
        raise Reject(Code.DTYPE, text)
    if linear.bias is None:
        text = "the linear has no bias, and PyTorch offers the GELU epilogue only with one"
        raise Reject(Code.NO_BIAS, text, Stage.KERNEL, left=True)
    if not compat.statically_known_true(linear.bias.meta["val"].stride(0) == 1):
        raise Reject(Code.LAYOUT, "the bias is not dense in memory", Stage.KERNEL, left=True)
    check_sizes(linear, linear.features[0])
    if linear.batched and not (mergeable(linear.x.meta["val"]) or is_elementwise(through_views(linear.x))):
        text = "the linear reads a slice of a batch, which would have to be copied to be one matrix"
        raise Reject(Code.LAYOUT, text, Stage.KERNEL, left=True)


def _traffic(found: Gelu) -> tuple[int | None, int | None]:
    """Eager writes the linear's result, reads it, and writes the GELU's; the epilogue writes once."""
    inputs = [n for n in (found.linear.x, found.linear.weight, found.linear.bias) if n is not None]
    moved = [footprint(n.meta["val"]) for n in (*inputs, found.result)]
    if any(m is None for m in moved):
        return None, None
    total = sum(m for m in moved if m is not None)
    return total + 2 * (moved[-1] or 0), total


def _apply(graph: fx.Graph, found: Gelu) -> None:
    linear = read(found.linear.product)  # anew: a seam before this one may have replaced what it reads
    assert linear is not None and linear.bias is not None
    with graph.inserting_before(linear.node):
        x = rows(graph, linear.x)
        if linear.device.type == "cuda":  # the aten op itself: no Python is run at each call
            transposed = graph.call_function(aten.permute.default, (linear.weight, [1, 0]))
            transposed.meta["val"] = linear.weight.meta["val"].permute(1, 0)
            target, args, kwargs = aten._addmm_activation.default, (linear.bias, x, transposed), {"use_gelu": True}
        else:
            target, args, kwargs = torch.ops.dkfuse.linear_gelu.default, (x, linear.weight, linear.bias), {}
        call = graph.call_function(target, args, kwargs)
        call.meta["val"] = target(*(a.meta["val"] for a in args), **kwargs)
        copy_origin(found.result, call)
    with graph.inserting_before(found.result):
        result = reshaped(graph, call, linear, found.result, found.inside)
    found.result.replace_all_uses_with(result)
    old = [linear.product, *linear.views, linear.node, *found.inside, found.result]
    read_sizes_elsewhere(graph, old, [linear.x, result])
