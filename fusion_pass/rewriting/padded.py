"""Products that Inductor padded with zeros, whose result it cuts to size again.

    slice(mm(pad(a), pad(b)))                              mm(a, b), the same of addmm and bmm
    slice(addmm(cat([bias, zeros]), pad(a), pad(b)))       addmm(bias, a, b)

It does so where that took less time in a measurement of the compilation at hand (`torch._inductor.fx_passes.pad_mm`),
before our pass: rules that read products would find them in one process and not in the next. So they are taken as the
model has them, and one that no rule took is padded again, unless it now reads what a kernel of ours writes: Inductor
counted on filling the zeros in where it computes the operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..matching.gain import through_views
from ..matching.terms import broadcast_shape, same_shape
from .replace import emit, emit_like

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


@dataclass(frozen=True)
class Product:
    """A product as the model has it, and what Inductor made of it: pads of its operands, slices of its result."""

    node: fx.Node
    operands: tuple[fx.Node, ...]
    pads: tuple[tuple[Any, ...] | None, ...]  # what follows the operand in the call that pads it; None: it is not
    slices: tuple[tuple[Any, ...], ...]


def without_padding(graph: fx.Graph) -> list[Product]:
    """Take the padding of products off."""
    found = []
    for target in PRODUCTS:
        for node in graph.find_nodes(op="call_function", target=target):
            product = _unpadded(graph, node)
            found += [product] if product is not None else []
    if found:
        graph.eliminate_dead_code()
    return found


def pad_again(graph: fx.Graph, products: list[Product]) -> None:
    """Pad those of `products` that are in `graph` as they were made."""
    live = set(graph.nodes)
    for product in products:
        node = product.node
        if node not in live or not node.users or node.args != product.operands:
            continue
        if not any(_is_ours(through_views(operand)) for operand in product.operands):
            _pad(graph, product)


def _unpadded(graph: fx.Graph, node: fx.Node) -> Product | None:
    if not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    *addend, a, b = node.args
    sources = [_bias(n) for n in addend] + [_source(a), _source(b)]
    if all(rest is None for _, rest in sources):
        return None
    slices: list[tuple[Any, ...]] = []
    last = node
    while len(last.users) == 1 and _cuts_end(user := next(iter(last.users))):
        slices.append(user.args[1:])
        last = user
    if not slices:
        return None
    (x, _), (y, _) = sources[-2:]
    size = (*x.meta["val"].shape[:-1], y.meta["val"].shape[-1])
    fits = x.meta["val"].shape[-1] == y.meta["val"].shape[-2] and same_shape(size, last.meta["val"].shape)
    added = [tuple(n.meta["val"].shape) for n, _ in sources[:-2]]
    if not fits or not all(same_shape(broadcast_shape([shape, size]), size) for shape in added):
        return None
    operands = tuple(n for n, _ in sources)
    with graph.inserting_before(node):
        plain = emit_like(graph, node, *operands)
    last.replace_all_uses_with(plain)
    return Product(plain, operands, tuple(rest for _, rest in sources), tuple(slices))


def _pad(graph: fx.Graph, product: Product) -> None:
    node = product.node
    with graph.inserting_before(node):
        operands = []
        for operand, rest in zip(product.operands, product.pads, strict=True):
            whole = operand if rest is None else emit(graph, aten.constant_pad_nd.default, operand, *rest)
            operands.append(whole)
        last = emit_like(graph, node, *operands)
        for rest in product.slices:
            last = emit(graph, aten.slice.Tensor, last, *rest)
    node.replace_all_uses_with(last)
    graph.erase_node(node)


def _source(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...] | None]:
    """What `node` is with zeros behind it in some dims, and what else its call was given; or itself, and None."""
    if node.target is aten.constant_pad_nd.default and (len(node.args) == 2 or node.args[2] == 0) and not node.kwargs:
        widths = node.args[1]
        assert isinstance(widths, (list, tuple))
        if all(before == 0 for before in widths[::2]):
            return node.args[0], node.args[1:]  # type: ignore[return-value]
    return node, None


def _bias(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...] | None]:
    """The same of a vector that was lengthened by a cat with zeros."""
    if node.target is aten.cat.default and node.meta["val"].dim() == 1:
        parts = node.args[0]
        if isinstance(parts, (list, tuple)) and len(parts) == 2 and all(isinstance(p, fx.Node) for p in parts):
            bias, zeros = parts
            if zeros.target is aten.full.default and zeros.args[1] == 0:
                return bias, ([0, zeros.meta["val"].shape[0]],)
    return node, None


def _cuts_end(node: fx.Node) -> bool:
    return node.target is aten.slice.Tensor and node.args[2:3] == (0,) and len(node.args) == 4 and not node.kwargs


def _is_ours(node: fx.Node) -> bool:
    module = getattr(node.target, "namespace", "")
    return node.op == "call_function" and isinstance(module, str) and module.startswith("dkfuse")
