"""Linears by the GEMM that is measured to be the fastest: quack's in the place of cuBLAS's, where that gains.

    x @ weight.T [+ bias]                 what is left of linears after the other seams, packed projections too
    gelu_tanh(x @ weight.T + bias)        what `epilogue` gave to cublasLt

Both compute in fp32 and round once, so results differ by the order of sums alone. Small products, of fewer rows than
`gemm_table.MIN_ROWS` or as short as a call, stay cuBLAS's and are not recorded unless quack's is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

import dkfuse.kernels.gemm  # noqa: F401  (registers the op, also for compiled code that comes from a cache)
from dkfuse.kernels.gemm_kernels import QUACK

from .. import compat
from ..matching.rules import Reject
from ..rewriting.replace import copy_origin
from ..settings import Settings
from . import gemm_choice, gemm_table
from .common import aten, record
from .linear import TRANSPOSES, Linear, read
from .seam import Seam

FAMILY = "gemm_kernel"
OP = "dkfuse::linear"


@dataclass(frozen=True)
class Product:
    """One GEMM of a linear in the graph and what it computes besides, ``dkfuse::linear``'s act."""

    node: fx.Node
    linear: Linear
    act: str


def find(graph: fx.Graph, settings: Settings) -> Iterator[Seam]:
    """Every GEMM of a linear that is a matter of choice."""
    products = [p for p in _products(graph) if settings.gemm == QUACK or not _is_small(p.linear)]
    for product in products:
        gemm_choice.prepare(_values(product), product.act, FAMILY, settings)
    for product in products:
        reject, tiles = None, ""
        try:
            tiles = gemm_choice.choose(_values(product), product.act, FAMILY, settings)
        except Reject as error:
            reject = error
        site = record(FAMILY, OP, QUACK, product.node, product.linear, (None, None), reject)
        yield Seam(site, partial(_apply, graph, product, tiles) if reject is None else None)


def _products(graph: fx.Graph) -> Iterator[Product]:
    for node in graph.nodes:
        if node.op == "call_function" and (found := _read(node)) is not None:
            yield found


def _read(node: fx.Node) -> Product | None:
    args: Any = node.args
    if node.target in (aten.mm.default, aten.addmm.default) and (linear := read(node)) is not None:
        bias = linear.bias if node.target is aten.addmm.default else None  # else it is added afterwards
        return Product(node, Linear(node, node, linear.x, linear.weight, bias), "none")
    if node.target is torch.ops.dkfuse.linear_gelu.default:
        return Product(node, Linear(node, node, *args), "gelu")
    if node.target is aten._addmm_activation.default and node.kwargs == {"use_gelu": True}:
        bias, x, transposed = args
        if transposed.target in TRANSPOSES:
            return Product(node, Linear(node, node, x, transposed.args[0], bias), "gelu")
    return None


def _is_small(linear: Linear) -> bool:
    sizes = [compat.hint(size) for size in (*linear.x.meta["val"].shape, linear.weight.meta["val"].shape[0])]
    rows, k, columns = (size or 0 for size in sizes)
    return rows < gemm_table.MIN_ROWS or gemm_table.microseconds(rows, columns, k) < gemm_choice.shortest()


def _operands(product: Product) -> dict[str, fx.Node | None]:
    linear = product.linear
    return {"x": linear.x, "weight": linear.weight, "bias": linear.bias}


def _values(product: Product) -> dict[str, Any]:
    return {name: None if node is None else node.meta["val"] for name, node in _operands(product).items()}


def _apply(graph: fx.Graph, product: Product, tiles: str) -> None:
    old, target = product.node, torch.ops.dkfuse.linear.default
    again = _read(old)  # a seam before this one may have replaced what it reads
    assert again is not None
    args: tuple[Any, ...] = tuple(node for node in _operands(again).values() if node is not None)
    kwargs = {"act": product.act, "using": QUACK, "tiles": tiles}
    with graph.inserting_before(old):
        call = graph.call_function(target, args, kwargs)
        call.meta["val"] = target(*(a.meta["val"] for a in args), **kwargs)
        copy_origin(old, call)
    old.replace_all_uses_with(call)
    graph.erase_node(old)
