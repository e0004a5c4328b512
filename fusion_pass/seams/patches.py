"""A patch embedding as a GEMM: a convolution whose patches do not overlap and whose result is read as rows.

    y[b, d, i, j] = sum_(c, u, v) w[d, c, u, v] * x[b, c, p*i + u, q*j + v] + bias[d]        stride = kernel = (p, q)
                  = (patches @ w.reshape(D, C*p*q).T + bias)[b*I*J + i*J + j, d]             patches [B*I*J, C*p*q]

A transformer reads the result as tokens: ``flatten(2).transpose(1, 2)``. cuDNN writes channels outermost, so that every
token is strided in memory, after copies of its own on the way in and out. The GEMM writes tokens, and its operand is a
copy of the input, which is much smaller than the result. On an H100, bf16, with a pointwise reader: 786 -> 358 us for
Wan2.1-14B's 32760 tokens of 5120, 410 -> 174 for HunyuanVideo's 25440 of 3072, 80 -> 46 for SD3.5-Large at batch 2, 115
-> 12 for a ViT-B/16 at batch 8. The bias is added before the one rounding, where cuDNN adds it after one.

A convolution that is read as an image (a U-Net's, a VAE's) is none, nor is one with a kernel of 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from ..matching.gain import is_view
from ..matching.rules import Code, Reject, Stage
from ..rewriting.replace import copy_origin, emit
from ..rewriting.strides import spread
from ..settings import Settings
from .common import aten, check_allowed, check_widths, record
from .linear import Linear
from .seam import Seam

FAMILY = "patch_embedding"


@dataclass(frozen=True)
class Patches:
    """One such convolution: x [B, C, *size], weight [D, C, *patch]."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def patch(self) -> list[Any]:
        return list(self.weight.meta["val"].shape[2:])

    @property
    def linear(self) -> Linear:
        return Linear(self.node, self.node, self.x, self.weight, self.bias)


def find(graph: fx.Graph, settings: Settings) -> Iterator[Seam]:
    """Every convolution of patches that do not overlap."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        if (patches := _read(node)) is None:
            continue
        reject: Reject | None = None
        try:
            _check(patches, settings)
        except Reject as error:
            reject = error
        op = "aten::mm" if patches.bias is None else "aten::addmm"
        site = record(FAMILY, op, "cublas", node, patches.linear, (None, None), reject)
        yield Seam(site, partial(_apply, graph, patches) if reject is None else None)


def _read(node: fx.Node) -> Patches | None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    patch = list(weight.meta["val"].shape[2:])  # type: ignore[union-attr]
    plain = not transposed and groups == 1 and not any(padding) and all(d == 1 for d in dilation)  # type: ignore[arg-type,union-attr]
    return Patches(node, x, weight, bias) if plain and list(stride) == patch and max(patch) > 1 else None  # type: ignore[arg-type]


def _check(patches: Patches, settings: Settings) -> None:
    check_allowed(FAMILY, patches.linear, settings)
    x, weight = patches.x.meta["val"], patches.weight.meta["val"]
    if settings.roundings == "eager" and patches.bias is not None:
        raise Reject(Code.ROUNDING, "roundings=eager: the GEMM does not round before it adds the bias")
    if not all(isinstance(size, int) for size in (*x.shape, *weight.shape)):
        text = f"an input of {list(x.shape)}: its sizes must be known, to be cut into patches"
        raise Reject(Code.SYMBOLIC, text, Stage.KERNEL, left=True)
    if rest := [s for s, p in zip(x.shape[2:], patches.patch, strict=True) if s % p]:
        text = f"a size of {rest[0]} is no multiple of the patch's"
        raise Reject(Code.LAYOUT, text, Stage.KERNEL, left=True)
    check_widths(weight.shape[0], math.prod(weight.shape[1:]))
    if not weight.is_contiguous():
        text = f"the weight has strides {list(weight.stride())}: it would be copied at each call"
        raise Reject(Code.LAYOUT, text, Stage.KERNEL, left=True)
    if (reader := _reads_an_image(patches)) is not None:
        text = f"{reader.name} ({reader.target}) reads the result as an image, not as rows"
        raise Reject(Code.LAYOUT, text, Stage.KERNEL, left=True)


def _reads_an_image(patches: Patches) -> fx.Node | None:
    """A reader, behind views, whose input has another last dim than the channels."""
    value = patches.node.meta["val"]
    apart, features = value.stride(1), value.shape[1]
    pending = [patches.node]
    while pending:
        node = pending.pop()
        for user in node.users:
            if is_view(user):
                pending.append(user)
                continue
            read = node.meta["val"]
            if user.op != "call_function" or read.shape[-1] != features or read.stride(-1) != apart:
                return user
    return None


def _apply(graph: fx.Graph, patches: Patches) -> None:
    node, x, patch = patches.node, patches.x, patches.patch
    batch, channels, *sizes = x.meta["val"].shape
    features, grid = patches.weight.meta["val"].shape[0], [s // p for s, p in zip(sizes, patch, strict=True)]
    dims = len(patch)
    with graph.inserting_before(node):
        cut = [size for pair in zip(grid, patch, strict=True) for size in pair]
        cut_up = emit(graph, aten.reshape.default, x, [batch, channels, *cut])
        order = [0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2)]
        ordered = emit(graph, aten.permute.default, cut_up, order)
        width = channels * math.prod(patch)
        rows = emit(graph, aten.reshape.default, ordered, [batch * math.prod(grid), width])
        matrix = emit(graph, aten.reshape.default, patches.weight, [features, width])
        transposed = emit(graph, aten.permute.default, matrix, [1, 0])
        if patches.bias is None:
            product = emit(graph, aten.mm.default, rows, transposed)
        else:
            product = emit(graph, aten.addmm.default, patches.bias, rows, transposed)
        copy_origin(node, product)
        tokens = emit(graph, aten.reshape.default, product, [batch, *grid, features])
        image = emit(graph, aten.permute.default, tokens, [0, dims + 1, *range(1, dims + 1)])
    assert image.meta["val"].shape == node.meta["val"].shape
    node.replace_all_uses_with(image)
    graph.erase_node(node)
    spread(image)
