"""Linears of several streams that are joined along the tokens, written into the joint tensor by their GEMMs.

    cat([view(x_1 @ w_1.T + b_1), view(x_2 @ w_2.T + b_2)], tokens)     becomes     view(joint_linear([x_1, x_2], ...))

Joint attention reads the values of image and text as one tensor. Queries and keys are normed or rotated on the way, and
the kernel that does it writes the joint tensor; values are not, and a cat copies them. Here the GEMMs write their rows
of one buffer instead (`dkfuse.kernels.joint_linear`). With packed projections that buffer has the columns of q and k as
well, which are read from it through its strides.

    bytes saved   2 * B * S * columns of the cat, at MEMORY
    cost          rows of one sample are one matrix, so B samples are B GEMMs a stream: EXTRA for each beyond the first

Measured on an H100, bf16, in a loop: FLUX.1's q, k, v (4096 + 512 tokens) 28 to 39 us saved, HunyuanVideo's
(25440 + 256) 110 to 170, SD3.5-Large's at batch 2 21 to 34; 1024 + 333 tokens of 1536 at batch 4 lose 6, and are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

import dkfuse.kernels.joint_linear  # noqa: F401  (registers the op, also for compiled code that comes from a cache)

from .. import compat
from ..matching.rules import Code, Reject, Stage
from ..matching.terms import same_size
from ..reporting.report import Site, Status
from ..rewriting.calls import cat_dim
from ..rewriting.replace import copy_origin, emit, retell
from ..rewriting.strides import copying_reader, propagate, read_by_strides, spread
from ..rewriting.symbols import arguments as with_symbols
from ..settings import Settings
from .common import aten, check_allowed, check_sizes, described, read_sizes_elsewhere
from .joint_views import VIEWS, Joint, NotThis, Stream, batch_of, first_reads, joint_value, read_again, replayed, reread
from .linear import Linear, read
from .seam import Seam

FAMILY = "joint_projection"
OP = "dkfuse::joint_linear"
MEMORY = 2.6e6  # bytes/us of a copy
LEAST = 5.0  # us: a copy that nobody would notice
EXTRA = 4.0  # us: one more GEMM, where one would do


def find(graph: fx.Graph, settings: Settings) -> Iterator[Seam]:
    """Every set of cats of linears along another dim than the last: one where several cats read the same products."""
    taken: dict[fx.Node, tuple[fx.Node, ...]] = {}  # a product: those of the call that computes it now
    by_strides = read_by_strides(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    together: dict[tuple[fx.Node, ...], list[Joint]] = {}
    for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
        if (joint := _read(cat)) is not None:
            together.setdefault(joint.products, []).append(joint)
    for found in together.values():
        members: list[Joint] = []
        readers: set[fx.Node] = set()
        for joint in found:
            try:
                members.append(_check(joint, settings, taken, by_strides, order, readers))
            except Reject as reject:
                yield Seam(_site([joint], reject))
        if not members:
            continue
        try:
            _check_gain(members)
        except Reject as reject:
            yield Seam(_site(members, reject))
            continue
        taken.update(dict.fromkeys(members[0].products, members[0].products))
        wholes: list[fx.Node] = []
        parts: list[fx.Node] = []
        apply = partial(_apply, graph, members, wholes, parts)
        yield Seam(_site(members, None), apply, partial(_finish, wholes, parts, readers))


def _read(cat: fx.Node) -> Joint | None:
    parts: Any = cat.args[0]
    dim = cat_dim(cat)
    if len(parts) < 2 or dim == cat.meta["val"].dim() - 1 or len(set(parts)) < len(parts):
        return None
    streams = [stream for part in parts if (stream := _stream(part)) is not None]
    if len({stream.product for stream in streams}) < len(parts):
        return None
    return Joint(cat, dim, tuple(streams), tuple(part.meta["val"].shape[dim] for part in parts))


def _stream(part: fx.Node) -> Stream | None:
    chain: list[fx.Node] = []
    node = part
    while node.op == "call_function" and node.target in VIEWS and isinstance(node.args[0], fx.Node):
        chain.insert(0, node)
        node = node.args[0]
    if node.target is torch.ops.dkfuse.linear.default and node.kwargs.get("act", "none") == "none":
        x, weight, *bias = node.args
        linear = Linear(node, node, x, weight, bias[0] if bias else None)  # type: ignore[arg-type]
        return Stream(node, linear, str(node.kwargs["tiles"]), tuple(chain))
    if node.target in (aten.mm.default, aten.addmm.default) and (found := read(node)) is not None:
        bias = found.bias if node.target is aten.addmm.default else None  # else it is added afterwards
        return Stream(node, Linear(node, node, found.x, found.weight, bias), "", tuple(chain))
    return None


def _check(
    joint: Joint,
    settings: Settings,
    taken: dict[fx.Node, tuple[fx.Node, ...]],
    by_strides: set[fx.Node],
    order: dict[fx.Node, int],
    readers: set[fx.Node],
) -> Joint:
    """`joint` with its batch, or Reject; who reads values that get other strides goes to `readers`."""
    for stream in joint.streams:
        check_allowed(FAMILY, stream.linear, settings)
        check_sizes(stream.linear)
    products = list(joint.products)
    if not taken.keys().isdisjoint(products):
        raise Reject(Code.CLAIMED, "a product of it already belongs to another joint tensor")
    if not all(same_size(p.meta["val"].shape[1], joint.columns) for p in products):
        found = ", ".join(str(p.meta["val"].shape[1]) for p in products)
        text = f"the products have {found} columns: those of one tensor have the same"
        raise Reject(Code.LAYOUT, text, Stage.KERNEL, left=True)
    if any(p in by_strides for p in (*products, joint.cat)):
        raise Reject(Code.LAYOUT, "an as_strided may read it by its strides", Stage.KERNEL, left=True)
    if (product := _waits_for_another(joint, taken, order)) is not None:
        raise Reject(Code.CYCLE, f"an operand of {product.name} is computed from another part of the cat")
    try:
        joint = replace(joint, batch=batch_of(joint))
        full = joint_value(joint)
        pending = [(joint.cat, full)] + (reread(joint) if joint.batch > 1 else [])
    except NotThis as error:
        raise Reject(Code.LAYOUT, str(error), Stage.KERNEL, left=True) from None
    if (copied := copying_reader(pending, readers)) is not None:
        text = f"{copied.target} would have to copy its part of the joint tensor"
        raise Reject(Code.LAYOUT, text, Stage.KERNEL, left=True)
    return joint


def _waits_for_another(
    joint: Joint, taken: dict[fx.Node, tuple[fx.Node, ...]], order: dict[fx.Node, int]
) -> fx.Node | None:
    """A product of which an operand needs a product of `joint`, also by way of a call that computes several."""
    lowest = min(order[product] for product in joint.products)
    spans = [(min(places), max(places)) for group in set(taken.values()) if (places := [order[p] for p in group])]
    while below := [low for low, high in spans if low < lowest < high]:  # a call that reaches around what is looked at
        lowest = min(below)
    for product in joint.products:
        pending, seen = list(product.all_input_nodes), set()
        while pending:
            node = pending.pop()
            if node in joint.products:
                return product
            if node not in seen and order[node] >= lowest:
                seen.add(node)
                pending += [source for member in taken.get(node, (node,)) for source in member.all_input_nodes]
    return None


def _check_gain(members: list[Joint]) -> None:
    joint = members[0]
    tokens, value = compat.hint(joint.tokens), joint.cat.meta["val"]
    if tokens is None:
        text = "the number of tokens depends on data: it may be small"
        raise Reject(Code.SYMBOLIC, text, Stage.KERNEL, left=True)
    row = joint.batch * value.itemsize * sum(map(_joined_columns, members))
    saved, cost = 2 * tokens * row / MEMORY, EXTRA * (joint.batch - 1) * len(joint.streams)
    if saved < max(LEAST, cost):
        text = f"the copy takes ~{saved:.1f} us, less than {LEAST:.0f}"
        if cost:
            text = f"the copy takes ~{saved:.1f} us, GEMMs for each of {joint.batch} samples ~{cost:.0f} us more"
        raise Reject(Code.NO_GAIN, text, Stage.KERNEL, left=True)


def _joined_columns(joint: Joint) -> int:
    shape = joint.cat.meta["val"].shape
    return math.prod(size for dim, size in enumerate(shape) if dim != joint.dim) // joint.batch


def _apply(graph: fx.Graph, members: list[Joint], wholes: list[fx.Node], parts: list[fx.Node]) -> None:
    """Rewrite the graph; what takes the place of the cats goes to `wholes`, of the products to `parts`."""
    joints = []
    for joint in members:
        again = _read(joint.cat)  # a seam before this one may have replaced what it reads
        assert again is not None
        joints.append(replace(again, batch=joint.batch))
    joint = joints[0]
    linears, tiles = [stream.linear for stream in joint.streams], [stream.tiles for stream in joint.streams]
    xs, weights, biases = ([getattr(n, name) for n in linears] for name in ("x", "weight", "bias"))

    def put(target: Any, value: fx.Node, *args: Any) -> fx.Node:
        node = graph.call_function(target, (value, *with_symbols(graph, args, [value, *xs])))
        node.meta["val"] = target(value.meta["val"], *args)
        return node

    with graph.inserting_before(max(joint.products).next):  # nodes compare by their place in the graph
        call = emit(graph, torch.ops.dkfuse.joint_linear.default, xs, weights, biases, joint.batch, tiles)
        copy_origin(joint.cat, call)
        wholes += [replayed(each, 0, call, joint.tokens, put) for each in joints]
        for i, (product, start, length) in enumerate(zip(joint.products, joint.starts, joint.lengths, strict=True)):
            part = put(aten.slice.Tensor, call, 1, start, start + length)
            if joint.batch == 1:
                parts.append(put(aten.reshape.default, part, [length, joint.columns]))
                product.replace_all_uses_with(parts[-1])
                continue
            for node, cuts in first_reads(joint, i):
                parts.append(read_again(node, cuts, part, put))
                node.replace_all_uses_with(parts[-1])
    for each, whole in zip(joints, wholes, strict=True):
        each.cat.replace_all_uses_with(whole)
    read_sizes_elsewhere(graph, joint.products, xs)


def _finish(wholes: list[fx.Node], parts: list[fx.Node], readers: set[fx.Node]) -> None:
    """Carry the new strides on."""
    for whole in wholes:
        spread(whole)
    for part in parts:
        propagate(part)
    retell(readers)


def _site(members: list[Joint], reject: Reject | None) -> Site:
    joint = members[0]
    shown = {f"x{i}": stream.linear.x for i, stream in enumerate(joint.streams)}
    site = described(FAMILY, joint.cat, {**shown, "weight": joint.streams[0].linear.weight}, Status.FUSED)
    site.op = OP
    if reject is not None:
        site.status = Status.LEFT_TO_INDUCTOR if reject.left else Status.REJECTED
        site.reason = reject.reason(FAMILY)
        site.attempts = [site.reason]
        return site
    site.kernel = "quack" if all(stream.tiles for stream in joint.streams) else "cublas"
    values = [member.cat.meta["val"] for member in members]
    if all(isinstance(size, int) for value in values for size in value.shape):
        site.bytes_after = sum(value.nbytes for value in values)
        site.bytes_before = 3 * site.bytes_after
    return site
