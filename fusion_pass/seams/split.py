"""``linear(cat([a, b], -1))`` as accumulating GEMMs over column views of the weight: the cat is never written.

    y = a @ weight[:, :k].T + bias;  y += b @ weight[:, k:].T      the narrower first

    bytes a row:   with the cat      K read + K written by the cat, K read and N written by the GEMM
                   split             K read by the GEMMs, N written by each, N read by each but the first

A part that Inductor computes where the cat is written (a pointwise result) has to be written either way, so it saves
nothing; a GELU that moves into the epilogue of the linear before it saves its pass as well. The seam is taken where it
saves twice of what the partial sums cost.

The partial sum is rounded, and so is the product that cuBLAS adds to it, which eager's one product does not do: the
squared RMS error of the linear is 2.18 of eager's. A GELU that moves into an epilogue rounds once less, so that the two
together stay close to eager. With s the share of the columns that come out of the epilogue the ratio is

    sqrt((2.18 + 0.40 s) / (1 + 1.08 s))      1.16 for Flux's 3072 + 12288 columns, 1.24 for halves, 1.48 without

(measured on an H100: 1.157 for Flux and HunyuanVideo, 1.476 without). A site may have 1.25; to be sure of it 1.2 is the
limit here, so that a cat without a GELU is not split. More than two parts were not measured and are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from .. import compat
from ..choosing.choose import resolve_target
from ..matching.gain import is_elementwise, through_views
from ..matching.rules import Code, Reject, Stage
from ..rewriting.calls import cat_dim
from ..rewriting.replace import copy_origin
from ..settings import Settings
from . import common, epilogue, gelu
from .common import aten, check_allowed, check_sizes, is_tensor, mergeable, read_sizes_elsewhere, record, reshaped, rows
from .gelu import Gelu
from .linear import Linear, linears, read, source
from .seam import Seam

FAMILY = "split_projection"
OP = "dkfuse::split_linear"
KERNEL = "cublas"
MIN_COLUMNS = 1024  # of a part: a GEMM with a shorter reduction is bound by its output
MAX_ERROR = 1.2  # expected RMS error, in units of eager's
SPLIT, EPILOGUE, GELU = 2.18, 0.40, 1.08  # squared errors, in units of one product's
MARGIN = 2  # bytes saved for each byte that the partial sums cost


@dataclass(frozen=True)
class Split:
    """A linear, the cat that it reads, and the cat's parts [..., K_i]."""

    linear: Linear
    cat: fx.Node

    @property
    def parts(self) -> list[fx.Node]:
        return list(self.cat.args[0])  # type: ignore[arg-type]

    @property
    def chain(self) -> list[fx.Node]:
        """The nodes from what the linear reads up to the cat."""
        chain = [self.linear.x]
        while chain[-1] is not self.cat:
            chain.append(chain[-1].args[0])  # type: ignore[arg-type]
        return chain

    @property
    def columns(self) -> list[int]:
        return [p.meta["val"].shape[-1] for p in self.parts]


def find(graph: fx.Graph, settings: Settings) -> Iterator[Seam]:
    """Every linear of a cat along the last dim."""
    every = list(linears(graph))
    gelus = {source(g.result): g for g in gelu.find(graph, {linear.node: linear for linear in every})}
    for linear in every:
        cat = source(linear.x)
        if cat.target is not aten.cat.default or not _along_rows(cat):
            continue
        split = Split(linear, cat)
        reject: Reject | None = None
        try:
            _check(split, gelus, settings)
        except Reject as error:
            reject = error
        site = record(FAMILY, OP, KERNEL, linear.node, linear, _traffic(split), reject)
        yield Seam(site, partial(_apply, graph, split) if reject is None else None)


def _along_rows(cat: fx.Node) -> bool:
    parts = cat.args[0]
    return isinstance(parts, (list, tuple)) and len(parts) > 1 and cat_dim(cat) == cat.meta["val"].dim() - 1


def _check(split: Split, gelus: dict[fx.Node, Gelu], settings: Settings) -> None:
    check_allowed(FAMILY, split.linear, settings)
    if settings.roundings == "eager":
        raise Reject(Code.ROUNDING, "roundings=eager: the sum is rounded after each product, eager rounds once")
    if (reader := _other_reader(split)) is not None:
        text = f"the cat is read by {reader.name} too, and has to be written anyway"
        raise Reject(Code.ESCAPES, text, Stage.KERNEL, left=True)
    if any(p.meta["val"].dtype != split.linear.dtype for p in split.parts):
        raise Reject(Code.DTYPE, "the parts of the cat differ in dtype")
    check_sizes(split.linear, *split.columns)
    for columns in split.columns:
        if columns < MIN_COLUMNS:
            text = f"a part of the cat has {columns} columns: products of less than {MIN_COLUMNS} gain nothing"
            raise Reject(Code.NO_GAIN, text, Stage.KERNEL, left=True)
    _check_tiles(split, common.sms(resolve_target(settings.target, split.linear.device)))
    if len(split.parts) > 2:
        text = f"the cat has {len(split.parts)} parts: only the error of two products was measured"
        raise Reject(Code.ROUNDING, text, left=True)
    if (error := expected_error(split.columns, _through_epilogue(split, gelus, settings))) > MAX_ERROR:
        text = (
            f"parts of {split.columns} columns: the sum has {error:.2f}x of eager's rounding error and may have "
            f"{MAX_ERROR}x; a GELU in an epilogue before it would round once less"
        )
        raise Reject(Code.ROUNDING, text, left=True)
    saved, cost = _saved(split, gelus, settings), 2 * split.linear.features[1] * (len(split.parts) - 1)
    if saved < MARGIN * cost:
        text = f"a row would save {saved} elements of traffic at the cat and cost {cost} for the partial sums"
        raise Reject(Code.NO_GAIN, text, Stage.KERNEL, left=True)


def _check_tiles(split: Split, sms: int) -> None:
    sizes = [compat.hint(size) for size in split.cat.meta["val"].shape[:-1]]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        raise Reject(Code.SYMBOLIC, "the number of rows depends on data: it may be small", Stage.KERNEL, left=True)
    count = common.tiles(math.prod(known), split.linear.features[1])
    if count < sms:
        text = f"the result has {count} tiles of 128 x 256 for {sms} SMs: two products would leave SMs idle twice"
        raise Reject(Code.NO_GAIN, text, Stage.KERNEL, left=True)


def expected_error(columns: Sequence[int], through_epilogue: int) -> float:
    """RMS error against eager's, where every column contributes alike and some come out of a GELU epilogue."""
    share = through_epilogue / sum(columns)
    return math.sqrt((SPLIT + EPILOGUE * share) / (1 + GELU * share))


def _other_reader(split: Split) -> fx.Node | None:
    """Who reads the cat besides the linear."""
    allowed = {*split.chain, split.linear.product}
    for node in split.chain:
        for user in node.users:
            if user not in allowed and user.target is not aten.expand.default and is_tensor(user):
                return user
    return None


def _saved(split: Split, gelus: dict[fx.Node, Gelu], settings: Settings) -> int:
    """Elements of a row that need not be read and written once more."""
    saved = 2 * _through_epilogue(split, gelus, settings)
    for part, columns in zip(split.parts, split.columns, strict=True):
        if mergeable(part.meta["val"]) and not is_elementwise(through_views(part)):
            saved += 2 * columns
    return saved


def _through_epilogue(split: Split, gelus: dict[fx.Node, Gelu], settings: Settings) -> int:
    """Columns that a GELU epilogue will compute."""
    found = [gelus.get(source(part)) for part in split.parts]
    taken = [g is not None and epilogue.problem(g, settings) is None for g in found]
    return sum(columns for columns, in_epilogue in zip(split.columns, taken, strict=True) if in_epilogue)


def _traffic(split: Split) -> tuple[int | None, int | None]:
    """Activations only: the weight is read once either way."""
    rows_, size = math.prod(split.cat.meta["val"].shape[:-1]), split.linear.dtype.itemsize
    if not isinstance(rows_, int) or not all(isinstance(c, int) for c in split.columns):
        return None, None
    k, n = split.linear.features
    return rows_ * size * (3 * k + n), rows_ * size * (k + n * (2 * len(split.parts) - 1))


def _apply(graph: fx.Graph, split: Split) -> None:
    linear = read(split.linear.product)  # anew: a seam before this one may have replaced what it reads
    assert linear is not None
    target = torch.ops.dkfuse.split_linear.default
    with graph.inserting_before(linear.node):
        parts = [rows(graph, part) for part in split.parts]
        call = graph.call_function(target, (parts, linear.weight, linear.bias))
        bias = linear.bias.meta["val"] if linear.bias is not None else None
        call.meta["val"] = target([p.meta["val"] for p in parts], linear.weight.meta["val"], bias)
        copy_origin(linear.node, call)
        result = reshaped(graph, call, linear, linear.node, set())
    linear.node.replace_all_uses_with(result)
    read_sizes_elsewhere(graph, split.chain, split.parts)
