"""Unit vectors as queries and keys, which attention by the cosine has (VAR, HDiT), as norms with a weight.

    x / |x|                    rms_norm(x) * w            w = full([D], 1 / sqrt(D))
    x / |x| * s                rms_norm(x) * (w * s)      s a number, one of each head, or a weight
    x * (s * rsqrt(x.x + e))   rms_norm(x) * (w * s)

Kernels multiply a normed row by a weight and by nothing else. Everything is computed in fp32 and rounded to what the
value was, so that what is not fused in the end has eager's value but for the last bit. Kept if sites are gained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dkfuse.kernels.support import MAX_ROW

from ..matching import anchors
from ..matching.gain import CASTS
from ..matching.heads import LONGEST_HEAD
from ..matching.readers import OPERAND
from ..matching.terms import FLOATS, Term, TermView, bare, broadcast_shape, same_size
from .picked import Picks
from .replace import copy_origin, emit

aten = torch.ops.aten
cast = torch.ops.prims.convert_element_type.default


@dataclass
class Product:
    """What a value is: ``number * small[0] * ... * unit``; `unit`, a node or two factors, is `constant` * a norm."""

    unit: fx.Node | tuple[fx.Node, fx.Node]
    constant: float = 1.0
    number: float = 1.0
    small: list[fx.Node] = field(default_factory=list)
    between: list[fx.Node] = field(default_factory=list)


def weighted(graph: fx.Graph, view: TermView) -> Picks:
    """Rewrite every unit vector of `graph`, which `view` reads, that becomes a query or a key; for `picked.undo`."""
    if not graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        return []
    squares = {s for node in anchors.qk_reductions(view) if (s := _squares(view, node)) is not None}
    found: list[tuple[fx.Node, Product]] = []
    inside: set[fx.Node] = set()
    for node in reversed(list(view.order)) if squares else ():  # the whole product before its factors
        if node not in inside and (product := _product(view, node, squares)) is not None and _fits(node, product):
            found.append((node, product))
            inside.update(product.between)
    return [_swap(graph, node, product) for node, product in reversed(found)]


def _squares(view: TermView, node: fx.Node) -> Term | None:
    """The squares that `node` adds up along the last dim."""
    term = view.term(node) if node.target is aten.sum.dim_IntList else None
    total = None if term is None else bare(term)
    return total.args[0] if total is not None and total.op == "sum" else None


def _constant(view: TermView, term: Term | None, squares: set[Term]) -> float | None:
    """The number that `term` is a norm times of, where its squares are some of `squares`."""
    product = None if term is None else bare(term)
    if product is None or product.op != "mul" or product.args[0].op != "const":
        return None
    norm = bare(product.args[1])
    known = norm.op == "rms_norm" and bare(view.reductions[norm]).args[0] in squares
    return product.args[0].value if known else None


def _product(view: TermView, node: fx.Node, squares: set[Term]) -> Product | None:
    """`node` as a unit vector and its factors."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dtype not in FLOATS:
        return None
    found, seen = Product(node), node
    while True:
        constant = _constant(view, view.term(seen), squares)
        if constant is None and (split := _split(view, seen, squares)) is not None:
            found.unit, found.constant, small = split
            found.small.append(small)
            return found
        if seen.target in CASTS:
            following = seen.args[0]
        elif seen.target is aten.mul.Tensor and (constant is None or _is_scaled(seen)):
            following, factor = seen.args if _is_full(seen.args[0], value) else seen.args[::-1]
            if isinstance(factor, (int, float)):
                found.number *= factor
            elif _is_small(factor, value):
                found.small.append(factor)
            else:
                return None
        elif constant is not None:
            found.unit, found.constant = seen, constant
            return found
        else:
            return None
        if not _is_full(following, value):
            return None
        found.between.append(following)
        seen = following


def _is_scaled(node: fx.Node) -> bool:
    return node.target is aten.mul.Tensor and any(isinstance(a, (int, float)) for a in node.args)


def _split(view: TermView, node: fx.Node, squares: set[Term]) -> tuple[tuple[fx.Node, fx.Node], float, fx.Node] | None:
    """``((x, rstd), constant, s)`` of ``x * (s * rstd)``."""
    for x, factor in (node.args, node.args[::-1]) if node.target is aten.mul.Tensor else ():
        while isinstance(factor, fx.Node) and factor.target in CASTS:
            factor = factor.args[0]
        if not (_is_full(x, node.meta["val"]) and isinstance(factor, fx.Node) and factor.target is aten.mul.Tensor):
            continue
        for small, rstd in (factor.args, factor.args[::-1]):
            full, rows = view.term(x), view.term(rstd) if isinstance(rstd, fx.Node) else None
            if full is None or rows is None or not _is_small(small, node.meta["val"]):
                continue
            if (constant := _constant(view, view.make("mul", full, rows), squares)) is not None:
                return (x, rstd), constant, small
    return None


def _is_full(node: Any, like: torch.Tensor) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.shape == like.shape


def _is_small(node: Any, like: torch.Tensor) -> bool:
    """A number, a weight, or a number of each head: one dim before the last at most."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dtype not in FLOATS or value.dim() > like.dim():
        return False
    return sum(not same_size(size, 1) for size in value.shape[:-1]) < 2


def _fits(node: fx.Node, product: Product) -> bool:
    """Whether the weight is one: a value for each column, of each head at most."""
    value = node.meta["val"]
    columns = value.shape[-1] if value.dim() > 1 else None
    if not isinstance(columns, int) or not 1 < columns <= LONGEST_HEAD:
        return False
    shape = broadcast_shape([(columns,), *(tuple(s.meta["val"].shape) for s in product.small)])
    if not all(isinstance(size, int) for size in shape) or sum(size != 1 for size in shape[:-1]) > 1:
        return False
    return math.prod(shape) <= MAX_ROW


def _swap(graph: fx.Graph, node: fx.Node, product: Product) -> tuple[fx.Node, fx.Node]:
    """`node`, and what took its place."""
    value, new = node.meta["val"], []

    def made(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new.append(emit(graph, target, *args, **kwargs))
        copy_origin(node, new[-1])
        return new[-1]

    def wide(source: fx.Node) -> fx.Node:
        return source if source.meta["val"].dtype == torch.float32 else made(cast, source, torch.float32)

    with graph.inserting_after(node):
        place = graph.call_function(aten.mul.Tensor)
    with graph.inserting_before(place):
        if isinstance(product.unit, tuple):
            x, rstd = product.unit
            unit = made(aten.mul.Tensor, wide(x), wide(rstd))
        else:
            unit = wide(product.unit)
        normed = made(aten.mul.Tensor, unit, 1 / product.constant)
        number = product.constant * product.number
        how = {"dtype": torch.float32, "device": value.device}
        weight = made(aten.full.default, [value.shape[-1]], number, **how)
        weight.meta[OPERAND] = True
        for factor in product.small:
            weight = made(aten.mul.Tensor, weight, wide(factor))
        result = made(aten.mul.Tensor, normed, weight)
        if value.dtype != torch.float32:
            result = made(cast, result, value.dtype)
    graph.erase_node(place)
    own = set(new)
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in own)
    return node, result
