"""Rotations as sites of coverage, found without asking the rules: graph nodes at which pairs of columns recombine.

* a product of complex numbers, one of which is ``view_as_complex`` of a real tensor;
* a cat, scatter or reshape that puts together, along the last dim, what was computed from two complementary halves
  (even and odd, or first and second) of the columns of one tensor, or of its first columns where the cat has a third
  part, the others;
* a sum over a last dim of size 2 of a product with a tensor that was seen as pairs;
* a reshape to columns of a batched product with 2x2 matrices.

A swap of halves alone, without a product or a minus, is no rotation (the sine and cosine of a timestep embedding).
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import fx

from ..rewriting.strides import RESHAPES
from . import gain
from .gain import is_elementwise, is_view
from .readers import SPLITS
from .recombine import COMPLEX
from .rotation_tables import from_pairs
from .terms import TermView, getitem_source, same_size

aten = torch.ops.aten

SCATTERS = (aten.slice_scatter.default, aten.select_scatter.default)
PRODUCTS = (aten.mul.Tensor, aten.neg.default, aten.sub.Tensor, aten.addcmul.default)
CASTS = (*gain.CASTS, aten.copy.default)
REACH = 8  # elementwise ops between the halves and the place where they recombine


def find(view: TermView) -> dict[fx.Node, set[fx.Node]]:
    """The recombining nodes, in graph order, each with the nodes between the halves and it."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in view.order:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        between: set[fx.Node] | None = None
        if _complex_product(node):
            between = set()
        elif _recombines(node):
            between = _mixes_halves(view, node, found)
        elif _merges_pairs(node) and not _behind(node, found):
            whole = _sum_of_pairs(node) or product_of_matrices(node) is not None
            between = set() if whole else _mixes_halves(view, node, found)
        if between is not None:
            found[node] = between
    return found


def _complex_product(node: fx.Node) -> bool:
    if node.target is not aten.mul.Tensor or node.meta["val"].dtype not in COMPLEX:
        return False
    return any(_comes_from(a, aten.view_as_complex.default) for a in node.args)


def _comes_from(node: object, target: object) -> bool:
    while isinstance(node, fx.Node):
        if node.target is target:
            return True
        if not (is_view(node) or node.target in CASTS):
            return False
        node = node.args[0]
    return False


def _last_or_pair_dim(node: fx.Node, dim: int) -> bool:
    """The last dim, or the one before it where that has the two halves."""
    rank = node.meta["val"].dim()
    return dim % rank == rank - 1 or (dim % rank == rank - 2 and same_size(node.meta["val"].shape[dim], 2))


def _recombines(node: fx.Node) -> bool:
    """A cat of two parts and the rest, or the last of the scatters into one tensor, along the columns."""
    if node.target is aten.cat.default:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        parts = node.args[0]
        return len(parts) in (2, 3) and _last_or_pair_dim(node, dim) and _same_width(parts[:2], dim)
    if node.target in SCATTERS:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        written = any(u.target in SCATTERS and u.args[0] is node for u in node.users)
        return not written and _last_or_pair_dim(node, dim)
    return False


def _same_width(parts: object, dim: int) -> bool:
    a, b = (p.meta["val"].shape for p in parts)  # type: ignore[attr-defined]
    return same_size(a[dim], b[dim])


def _merges_pairs(node: fx.Node) -> bool:
    """``[..., n, 2]`` or ``[..., 2, n]`` to ``[..., 2n]``."""
    if node.target not in RESHAPES:
        return False
    before = [s for s in node.args[0].meta["val"].shape if not same_size(s, 1)]
    after = node.meta["val"].shape
    if len(before) < 2 or not after or not any(same_size(s, 2) for s in before[-2:]):  # of sizes that data decide
        return False
    return isinstance(after[-1], int) and after[-1] > 2 and same_size(before[-1] * before[-2], after[-1])


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """What a node was computed from by elementwise ops and recombinations; not through a product of matrices."""
    args = node.args[0] if node.target is aten.cat.default else node.all_input_nodes
    for source in args:
        if isinstance(source, fx.Node):
            yield source


def _behind(node: fx.Node, taken: Container[fx.Node]) -> bool:
    """`node` only reshapes what was counted already."""
    seen = node
    while seen.op == "call_function":
        if seen in taken or seen.target in (aten.cat.default, aten.view_as_real.default, *SCATTERS):
            return True
        if not (is_view(seen) or seen.target in CASTS):
            return False
        seen = seen.args[-1] if seen.target is aten.copy.default else seen.args[0]
    return False


def _sum_of_pairs(node: fx.Node) -> bool:
    source = node.args[0]
    while isinstance(source, fx.Node) and (is_view(source) or source.target in CASTS):
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.target is not aten.sum.dim_IntList:
        return False
    product = source.args[0]
    shape = product.meta["val"].shape
    return (
        product.target is aten.mul.Tensor
        and same_size(shape[-1], 2)
        and list(source.args[1]) in ([-1], [len(shape) - 1])
    )


def product_of_matrices(node: fx.Node) -> fx.Node | None:
    """The batched product of 2x2 matrices and pairs (`einsum`, `matmul`) that `node` only reshapes."""
    source = node.args[0]
    while isinstance(source, fx.Node) and (is_view(source) or source.target in (*CASTS, aten.clone.default)):
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.target is not aten.bmm.default:
        return None
    a, b = (factor.meta["val"].shape for factor in source.args)
    square = any(same_size(m[1], 2) and same_size(m[2], 2) for m in (a, b))
    return source if square and same_size(a[2], 2) else None


def _mixes_halves(view: TermView, node: fx.Node, taken: Container[fx.Node]) -> set[fx.Node] | None:
    """The nodes between `node` and both halves of the columns of one tensor, if it recombines them; else None.

    Each part of a cat comes from both halves, or they change places (``cat([-x2, x1])``); one with the rest of a tensor
    that is rotated in part does neither. At least one node is a product, a difference or a minus.
    """
    if node.target is aten.cat.default:
        parts = [_halves_below(view, [part], taken, len(node.args[0]) == 3) for part in node.args[0][:2]]
        (first, _, _), (second, _, _) = parts
        mixed = any((first[key], second[key]) in MIXED for key in first.keys() & second.keys())
    else:
        parts = [_halves_below(view, list(_sources(node)), taken)]
        mixed = any(len(found) == 2 for found in parts[0][0].values())
    if not mixed or not any(products for _, products, _ in parts):
        return None
    return {at for _, _, seen in parts for at in seen}


MIXED = (({0, 1}, {0, 1}), ({1}, {0}))


def _halves_below(
    view: TermView, start: list[fx.Node], taken: Container[fx.Node], partial: bool = False
) -> tuple[dict[object, set[int]], bool, set[fx.Node]]:
    """``(tensor -> halves reached, is there a product, the nodes in between)``, not through rotations taken."""
    halves: dict[object, set[int]] = {}
    products = False
    seen: set[fx.Node] = set()
    pending = [(source, 0) for source in start]
    while pending:
        at, depth = pending.pop()
        if at in seen or at in taken or at.op != "call_function" or depth > REACH:
            continue
        seen.add(at)
        if (half := _half(view, at, partial)) is not None:
            base, kind, i = half
            halves.setdefault((base, kind), set()).add(i)
        products |= at.target in PRODUCTS
        if half is None and (is_elementwise(at) or is_view(at) or at.target in (*CASTS, *SCATTERS)):
            pending.extend((source, depth + 1) for source in _sources(at))
    return halves, products, seen


def _half(view: TermView, node: fx.Node, partial: bool) -> tuple[object, str, int] | None:
    """``(tensor, kind, i)`` where `node` extracts half i of the columns of a tensor, or of its first ones."""
    if (found := _half_of_node(node, partial)) is not None:
        base, kind, i = found
        return view.term(base) or base, kind, i
    term = view.term(node)
    if term is None or (getitem_source(node) is None and node.target not in (aten.select.int, aten.slice.Tensor)):
        return None
    for style in ("interleaved", "half"):  # the two of a pair were moved away from the last dims
        for i in (0, 1):
            if (x := from_pairs(view, term, style, i)) is not None:
                return x, style, i
    return None


def _half_of_node(node: fx.Node, partial: bool) -> tuple[fx.Node, str, int] | None:
    if (source := getitem_source(node)) is not None:
        producer, index = source
        pieces = producer.meta["val"] if producer.target in SPLITS else ()
        if len(pieces) != 2 and not (partial and len(pieces) == 3 and index < 2):
            return None
        dim = producer.args[2] if len(producer.args) > 2 else producer.kwargs.get("dim", 0)
        if producer.target is aten.unbind.int:
            dim = producer.args[1] if len(producer.args) > 1 else producer.kwargs.get("dim", 0)
        return (producer.args[0], "split", index) if _last_or_pair_dim(producer.args[0], dim) else None
    if node.target not in (aten.select.int, aten.slice.Tensor) or not isinstance(node.args[0], fx.Node):
        return None
    base, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if not _last_or_pair_dim(base, dim):
        return None
    size = base.meta["val"].shape[dim]
    if node.target is aten.select.int:
        return (base, "select", node.args[2] % 2) if same_size(size, 2) else None
    start = (node.args[2] if len(node.args) > 2 else 0) or 0
    step = node.args[4] if len(node.args) > 4 else 1
    if step == 2:
        return (base, "even and odd", start) if start in (0, 1) else None
    if not isinstance(size, int) or not isinstance(start, int) or size % 2:
        return None
    length = node.meta["val"].shape[dim]
    half = length if partial and 2 * length <= size else size // 2
    return (base, f"halves of {2 * half}", 0 if start == 0 else 1) if length == half and start in (0, half) else None
