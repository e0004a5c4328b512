"""Linears with updates of low rank that are added to their results, as LoRAs that are not merged: accumulating GEMMs.

    x @ weight.T + bias  +  alpha * (down @ up.T)  [+ ...]            down = x @ (the update's first matrix).T

    bytes a row:   N written by each product; the sum reads both where its result is read
                   N written by the linear, read and written by the update's product; one tensor to read

Traffic is about the same. What is gained is what comes after: a norm, a rotation or a gate reads the result of a GEMM
again, and not of a sum that Inductor would have to write for it, and the linear itself may be quack's
(`dkfuse.bench.seams` measures both together). The two products took on an H200, of 4096 x 3072 x 3072 and rank 16,
121 us so, 118 without any sum and 138 with one that is written; of 4096 x 12288 x 3072 518, 472 and 556. So what an
activation reads is left: Inductor computes it with the sum.

The sum is rounded once where eager rounds the product, its multiple and the sum. A factor that is a tensor of one
element (an adapter whose weights are swapped without a new compilation) is multiplied into `down` instead, which is
small. The linear is not packed with others. What comes from an adapter in another dtype is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

import dkfuse.kernels.adapted_linear  # noqa: F401  (registers the op, also for compiled code that comes from a cache)

from .. import compat
from ..matching import gain
from ..matching.rules import Code, Reject, Stage
from ..matching.terms import same_shape, same_size
from ..rewriting.replace import copy_origin, emit
from ..settings import Settings
from . import gemm, gemm_choice
from .common import aten, check_allowed, check_sizes, is_tensor, record, reshaped
from .linear import KEEP_ROWS, Linear, linears, read
from .seam import Seam

FAMILY = "adapted_linear"
OP = "dkfuse::adapted_linear"
MIN_ROWS = 16  # of fewer, such as the samples of a modulation, there is nothing to gain behind the linear
NO_ACTIVATION = (*gain.CASTS, aten.pow.Tensor_Scalar, aten.neg.default)
MAX_RANK = 256  # an update of a higher rank takes the time of a linear of its own


@dataclass(frozen=True)
class Update:
    """alpha * down @ up.T: its linear, the numbers and the tensors of one element that multiply it, views above it."""

    linear: Linear
    alpha: float
    factors: tuple[fx.Node, ...]
    views: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Adapted:
    """A linear and what is added to it; `node` is the last sum, `views` what lies between the linear and the sums."""

    node: fx.Node
    linear: Linear
    updates: tuple[Update, ...]
    views: tuple[fx.Node, ...]


def find(graph: fx.Graph, settings: Settings) -> Iterator[Seam]:
    """Every sum of a linear and updates of low rank, the longest one first."""
    known = {linear.node: linear for linear in linears(graph)}
    products = {linear.product: linear for linear in known.values()}
    inner: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.target is not aten.add.Tensor or node in inner:
            continue
        if (adapted := _read_sum(node, known, products, inner)) is None:
            continue
        reject, tiles = None, ""
        try:
            _check(adapted, settings)
            tiles = _tiles(adapted.linear, settings)
        except Reject as error:
            reject = error
        kernel = "quack" if tiles else "cublas"
        site = record(FAMILY, OP, kernel, adapted.node, adapted.linear, _traffic(adapted), reject)
        yield Seam(site, partial(_apply, graph, adapted, tiles) if reject is None else None)


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_sum(
    node: fx.Node, known: dict[fx.Node, Linear], products: dict[fx.Node, Linear], inner: set[fx.Node]
) -> Adapted | None:
    """What `node` adds up, with the sums that it reads, which are noted as `inner`."""
    if len(node.args) != 2 or node.kwargs or not all(is_tensor(a) for a in node.args):
        return None
    for base, added in (node.args, node.args[::-1]):
        shapes = [n.meta["val"].shape for n in (base, added)]  # type: ignore[union-attr]
        if not all(same_shape(shape, node.meta["val"].shape) for shape in shapes):
            return None
        update = _read_update(added, products)  # type: ignore[arg-type]
        if update is None:
            continue
        found, views = _through_views(base)  # type: ignore[arg-type]
        if found is None:
            continue
        if found in known and _fits(update, known[found]):
            return Adapted(node, known[found], (update,), views)
        if found.target is aten.add.Tensor and (below := _read_sum(found, known, products, inner)) is not None:
            if not _fits(update, below.linear):
                continue
            inner.add(found)
            return Adapted(node, below.linear, (*below.updates, update), (*below.views, *views))
    return None


def _fits(update: Update, linear: Linear) -> bool:
    """Whether the update has the linear's rows and columns, and is not the linear itself."""
    columns = [one.features[1] for one in (update.linear, linear)]
    return same_size(*columns) and linear.product is not update.linear.product


def _read_update(node: fx.Node, products: dict[fx.Node, Linear]) -> Update | None:
    """The update whose multiple is `node`, where nothing else reads it."""
    alpha, factors, views = 1.0, [], []
    while len(node.users) == 1 and node not in products:
        if node.target in KEEP_ROWS and isinstance(node.args[0], fx.Node):
            views.append(node)
            node = node.args[0]
        elif node.target is aten.mul.Tensor and (factor := _factor(node)) is not None:
            of, other = factor
            if isinstance(other, fx.Node):
                factors.append(other)
            else:
                alpha *= other
            node = of
        else:
            return None
    linear = products.get(node)
    if linear is None or len(node.users) != 1 or node.target is not aten.mm.default:
        return None
    rank, columns = linear.features
    small = isinstance(rank, int) and isinstance(columns, int) and rank <= min(MAX_RANK, columns // 2)
    return Update(linear, alpha, tuple(factors), tuple(views)) if small else None


def _factor(node: fx.Node) -> tuple[fx.Node, float | fx.Node] | None:
    """What is multiplied, and the number or the tensor of no dims that it is multiplied by."""
    a, b = node.args
    for of, by in ((a, b), (b, a)):
        if isinstance(of, fx.Node) and isinstance(by, (int, float)):
            return of, float(by)
        if isinstance(of, fx.Node) and isinstance(by, fx.Node) and by.meta["val"].dim() == 0 < of.meta["val"].dim():
            return of, by
    return None


def _through_views(node: fx.Node) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """What `node` is a view of, and the views; None where something else reads one of them."""
    views = []
    while node.target in KEEP_ROWS and len(node.users) == 1 and isinstance(node.args[0], fx.Node):
        views.append(node)
        node = node.args[0]
    return (node if len(node.users) == 1 else None), tuple(views)


# -- deciding ----------------------------------------------------------------------------------------------------------


def _check(adapted: Adapted, settings: Settings) -> None:
    linear = adapted.linear
    check_allowed(FAMILY, linear, settings)
    if settings.roundings == "eager":
        raise Reject(Code.ROUNDING, "roundings=eager: eager rounds the product of an update, its multiple and the sum")
    dtypes = {update.linear.dtype for update in adapted.updates} | {adapted.node.meta["val"].dtype}
    if dtypes != {linear.dtype}:
        raise Reject(Code.DTYPE, "an update has another dtype than the linear", Stage.KERNEL, left=True)
    check_sizes(linear, *(update.linear.features[0] for update in adapted.updates))
    if (reader := _activation(adapted.node)) is not None:
        text = f"{reader.target} reads the sum: Inductor computes both in one kernel"
        raise Reject(Code.NO_GAIN, text, Stage.KERNEL, left=True)
    if linear.batched or linear.x.meta["val"].dim() != 2:
        raise Reject(Code.LAYOUT, "rows of the input do not lie evenly", Stage.KERNEL, left=True)
    rows = compat.hint(linear.x.meta["val"].shape[0])
    if rows is None or rows < MIN_ROWS:
        text = f"{rows} rows: with fewer than {MIN_ROWS} no kernel behind the linear gains anything"
        raise Reject(Code.NO_GAIN, text, Stage.KERNEL, left=True)


def _activation(node: fx.Node) -> fx.Node | None:
    """A reader that is a function of single values, or multiplies by as many others: of an MLP, and not of a norm."""
    for reader in gain.readers(node):
        if not gain.is_elementwise(reader) or reader.target in NO_ACTIVATION:
            continue
        factors = {n for n in reader.all_input_nodes if n.meta["val"].dim()}
        gated = (
            reader.target in (aten.mul.Tensor, aten.div.Tensor) and len({n.meta["val"].numel() for n in factors}) == 1
        )
        square = reader.target is aten.mul.Tensor and reader.args[0] is reader.args[1]  # what a norm begins with
        if (gated or len(factors) == 1) and not square:
            return reader
    return None


def _tiles(linear: Linear, settings: Settings) -> str:
    """How quack's GEMM is cut for the linear; "" where it is cuBLAS's."""
    bias = None if linear.bias is None else linear.bias.meta["val"]
    values = {"x": linear.x.meta["val"], "weight": linear.weight.meta["val"], "bias": bias}
    try:
        return gemm_choice.choose(values, "none", gemm.FAMILY, settings)
    except Reject:
        return ""


def _traffic(adapted: Adapted) -> tuple[int | None, int | None]:
    """Results only: a product, its multiple and the sum for each update, and one accumulating product."""
    shape, size = adapted.node.meta["val"].shape, adapted.linear.dtype.itemsize
    if not all(isinstance(n, int) for n in shape):
        return None, None
    result, count = math.prod(shape) * size, len(adapted.updates)
    return result * (1 + 6 * count), result * (1 + 2 * count)


# -- rewriting ---------------------------------------------------------------------------------------------------------


def _apply(graph: fx.Graph, adapted: Adapted, tiles: str) -> None:
    linear = read(adapted.linear.product)  # anew: a seam before this one may have replaced what it reads
    assert linear is not None
    target = torch.ops.dkfuse.adapted_linear.default
    with graph.inserting_before(adapted.node):
        downs = [_down(graph, update) for update in adapted.updates]
        ups = [update.linear.weight for update in adapted.updates]
        alphas = [update.alpha for update in adapted.updates]
        call = emit(graph, target, linear.x, linear.weight, linear.bias, downs, ups, alphas, tiles)
        copy_origin(linear.product, call)
        between = {*adapted.views, *(view for update in adapted.updates for view in update.views)}
        result = reshaped(graph, call, linear, adapted.node, between)
    adapted.node.replace_all_uses_with(result)


def _down(graph: fx.Graph, update: Update) -> fx.Node:
    again = read(update.linear.product)
    assert again is not None
    down = again.x
    for factor in update.factors:
        down = emit(graph, aten.mul.Tensor, down, factor)
    return down
