"""Reading linears, ``y = x @ weight.T + bias``, in a functional ATen graph.

    addmm(bias, x, permute(weight))
    mm(x, permute(weight))                        [+ bias, behind views]
    bmm(x, expand(permute(weight)))               [+ bias, behind views]    a batch of rows that do not lie together

x is [M, K], or [B, M, K] for the third, weight [N, K] and bias [N]. The bias add of the last two is a part of the
linear where the product has no other reader; the product is then rounded once more than in the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ..matching.gain import is_view
from ..matching.terms import same_shape, same_size
from ..rewriting.replace import copy_origin, emit_like
from ..rewriting.strides import RESHAPES

aten = torch.ops.aten
KEEP_ROWS = (*RESHAPES, aten.alias.default)
TRANSPOSES = (aten.permute.default, aten.t.default)
MATMULS = (aten.addmm.default, aten.mm.default, aten.bmm.default)


@dataclass(frozen=True)
class Linear:
    """One linear. `node` is its result [..., N] with the bias, `product` the matmul, `views` what lies between them."""

    node: fx.Node
    product: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    views: tuple[fx.Node, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.x.meta["val"].dtype

    @property
    def device(self) -> torch.device:
        return self.x.meta["val"].device

    @property
    def batched(self) -> bool:
        """Whether x is [B, M, K]: rows that no 2-D view covers."""
        return self.x.meta["val"].dim() == 3

    @property
    def features(self) -> tuple[int, int]:
        """``(K, N)``."""
        n, k = self.weight.meta["val"].shape
        return k, n


def linears(graph: fx.Graph) -> Iterator[Linear]:
    """Every linear of `graph`, in graph order of the matmuls."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in MATMULS and (found := read(node)) is not None:
            yield found


def read(product: fx.Node) -> Linear | None:
    """The linear whose matmul is `product`; None for a product of two activations, or a scaled one."""
    *addend, x, mat2 = product.args
    if not (isinstance(x, fx.Node) and isinstance(mat2, fx.Node)) or any(v != 1 for v in product.kwargs.values()):
        return None
    weight = _weight(mat2)
    if weight is None or not all(isinstance(n, fx.Node) for n in addend) or len(addend) > 1:
        return None
    x = _without_expand(x)
    if addend:
        (bias,) = addend
        return Linear(product, product, x, weight, bias) if _is_row(bias, product) else None
    if (behind := row_behind(product, aten.add.Tensor)) is not None:
        node, bias, views = behind
        return Linear(node, product, x, weight, bias, views)
    return Linear(product, product, x, weight, None)


def row_behind(product: fx.Node, op: object) -> tuple[fx.Node, fx.Node, tuple[fx.Node, ...]] | None:
    """What `op`, add or mul, makes of a matmul and a row [N], the row, the views between; None where others read it."""
    views = []
    node = product
    while len(node.users) == 1 and (reader := next(iter(node.users))).target in KEEP_ROWS:
        if not _keeps_rows(product, reader):
            break
        views.append(reader)
        node = reader
    if len(node.users) == 1:
        (reader,) = node.users
        if reader.target is op and not reader.kwargs and node in reader.args:
            other = reader.args[1] if reader.args[0] is node else reader.args[0]
            if _is_row(other, product) and same_shape(reader.meta["val"].shape, node.meta["val"].shape):
                return reader, other, tuple(views)  # type: ignore[return-value]
    return None


def replace_product(product: fx.Node, last: fx.Node, views: tuple[fx.Node, ...], make: Callable[[], fx.Node]) -> None:
    """Put what `make` emits in the place of `product` and of `last`, which reads it through `views` (`row_behind`)."""
    graph = product.graph
    with graph.inserting_before(last):
        found = make()
        copy_origin(product, found)
        for view in views:
            found = emit_like(graph, view, found, *view.args[1:])
    last.replace_all_uses_with(found)
    for node in (last, *reversed(views), product):
        graph.erase_node(node)


def source(node: fx.Node) -> fx.Node:
    """The node behind views of `node` that keep its last dim."""
    while node.target in KEEP_ROWS and isinstance(node.args[0], fx.Node) and _keeps_rows(node.args[0], node):
        node = node.args[0]
    return node


def _keeps_rows(before: fx.Node, after: fx.Node) -> bool:
    a, b = before.meta["val"], after.meta["val"]
    return bool(a.dim() and b.dim()) and same_size(a.shape[-1], b.shape[-1])


def _weight(mat2: fx.Node) -> fx.Node | None:
    """[N, K] of an operand that is its transpose, or that transpose for each of a batch."""
    node = mat2
    while is_view(node) and node.meta["val"].dim() > 2 and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    flat = node.meta.get("val")
    if not isinstance(flat, torch.Tensor) or flat.dim() != 2 or node.target not in TRANSPOSES:
        return None
    if node.target is aten.permute.default and [d % 2 for d in node.args[1]] != [1, 0]:  # type: ignore[union-attr]
        return None
    batch = mat2.meta["val"]
    broadcast = batch.dim() == 2 or (
        all(same_size(a, b) for a, b in zip(batch.shape[1:], flat.shape, strict=True))
        and (same_size(batch.shape[0], 1) or same_size(batch.stride(0), 0))
    )
    weight = node.args[0]
    return weight if broadcast and isinstance(weight, fx.Node) else None


def _without_expand(x: fx.Node) -> fx.Node:
    while x.target is aten.expand.default and isinstance(x.args[0], fx.Node):
        before, after = x.args[0].meta["val"].shape, x.meta["val"].shape
        if len(before) != len(after) or not all(same_size(a, b) for a, b in zip(before, after, strict=True)):
            break
        x = x.args[0]
    return x


def _is_row(node: object, product: fx.Node) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.dtype != product.meta["val"].dtype:
        return False
    return same_size(value.shape[0], product.meta["val"].shape[-1])
