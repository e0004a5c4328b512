"""Gates, scales and shifts that are picked per token: ``where(mask, row0, row1)`` with one row of each per sample.

The op takes both rows as one operand and the mask as `pick`, so that the picked rows, one for every token, need not be
written to memory. The two rows must be neighbours in one tensor (``mod[:b]`` and ``mod[b:]``): then both together are a
view of it. Masks that every block computes anew are found equal by what computes them; the first one serves all sites.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dkfuse.kernels.picks import PICKED

from .pattern import Binding
from .rules import Candidate
from .terms import Term, TermView, same_shape, same_size

aten = torch.ops.aten


def resolve(site: Candidate) -> None:
    """Bind the pair of rows in place of each operand of the site that is picked by the mask of the first such one."""
    view, binding = site.view, site.binding
    found: dict[str, tuple[fx.Node, Term]] = {}
    for name in PICKED:
        if name in binding.terms and (choice := _choice(view, binding.terms[name], site.shape)) is not None:
            found[name] = choice
    if found:
        mask = next(iter(found.values()))[0]
        pairs = {name: rows for name, (own, rows) in found.items() if own is mask}
        terms = {**binding.terms, **pairs, "pick": view.leaf(mask)}
        site.binding = Binding(terms, binding.numbers, binding.roundings, binding.interior)


def is_pair(site: Candidate, name: str) -> bool:
    """The operand holds two rows."""
    operands = site.operands
    return "pick" in operands and name in PICKED and len(operands[name].shape) == len(site.shape) + 1


def _choice(view: TermView, term: Term, shape: tuple) -> tuple[fx.Node, Term] | None:
    """The mask and the rows of ``where(mask, row0, row1)``, or None."""
    node = term.attrs[0] if term.op == "leaf" else None
    if node is None or node.target is not aten.where.self or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    mask, *parts = node.args
    if not mask.meta["val"].shape or not same_size(mask.meta["val"].shape[-1], 1):
        return None
    if any(p.meta["val"].dtype != node.meta["val"].dtype or view.term(p) is None for p in parts):
        return None
    first, second = (_unexpanded(view.term(p)) for p in parts)
    if same_shape(first.shape, shape) or not first.shape or not same_size(first.shape[-1], shape[-1]):
        return None
    rows = _halves(view, *parts) or _together(view, first, second)
    while rows is not None and len(rows.shape) <= len(shape):
        rows = view.view(rows, ("unsqueeze", 1), (2, 1, *rows.shape[1:]))
    return (masks(view)[_meaning(mask)], rows) if rows is not None else None


def unexpanded(node: Any) -> fx.Node:
    """What `node` was expanded from."""
    while node.target is aten.expand.default and node.meta["val"].dim() == node.args[0].meta["val"].dim():
        node = node.args[0]
    return node


def _unexpanded(term: Term | None) -> Term:
    assert term is not None
    while term.op == "view" and term.attrs[0] == "expand" and len(term.shape) == len(term.args[0].shape):
        term = term.args[0]
    return term


def _halves(view: TermView, first: fx.Node, second: fx.Node) -> Term | None:
    """The two halves of one node in dim 0, as `rewriting.picked` cuts them, with a dim of 2 in front."""
    if not (first.target is second.target is aten.slice.Tensor and first.args[0] is second.args[0]):
        return None
    value, count = first.args[0].meta["val"], first.meta["val"].shape[0]  # type: ignore[union-attr]
    cuts = first.args[1:], second.args[1:]
    if cuts != ((0, 0, count), (0, count, 2 * count)) or not same_size(value.shape[0], 2 * count):
        return None
    whole = view.term(first.args[0])  # type: ignore[arg-type]
    return None if whole is None else view.view(whole, ("reshape",), (2, count, *value.shape[1:]))


def _together(view: TermView, first: Term, second: Term) -> Term | None:
    """``stack([first, second])`` as a view, where both are made alike of two slices that lie side by side."""
    above: list[tuple[tuple, tuple]] = []
    while first.op == second.op == "view" and first.args[0] is not second.args[0]:
        if first.attrs[0] not in ("slice", "squeeze", "unsqueeze", "permute") or not _alike(first, second):
            return None
        above.append((first.attrs, first.shape))
        first, second = first.args[0], second.args[0]
    if not (first.op == second.op == "view" and first.attrs[0] == second.attrs[0] == "slice"):
        return None
    (_, dim, start, middle, step), (_, other, begin, stop, stride) = first.attrs, second.attrs
    side_by_side = dim == other and step == stride == 1 and same_size(middle, begin)
    if not side_by_side or not same_size(middle - start, stop - middle):
        return None
    before, length, after = first.shape[:dim], middle - start, first.shape[dim + 1 :]
    both = view.view(first.args[0], ("slice", dim, start, stop, 1), (*before, 2 * length, *after))
    both = view.view(both, ("reshape",), (*before, 2, length, *after))
    order = (dim, *range(dim), *range(dim + 1, len(both.shape)))
    both = view.view(both, ("permute", order), (2, *first.shape))
    for attrs, shape in reversed(above):
        both = view.view(both, _behind_one_more_dim(attrs), (2, *shape))
    return both


def _alike(first: Term, second: Term) -> bool:
    """The same view of both; a dim of size 1 may have come before or behind another one."""
    if first.attrs == second.attrs:
        return True
    pairs = (first, second), (first.args[0], second.args[0])
    both = first.attrs[0] == second.attrs[0] == "unsqueeze"
    return both and all(same_shape(one.shape, other.shape) for one, other in pairs)


def _behind_one_more_dim(attrs: tuple) -> tuple:
    if attrs[0] == "permute":
        return ("permute", (0, *(d + 1 for d in attrs[1])))
    return (attrs[0], attrs[1] + 1, *attrs[2:])


def masks(view: TermView) -> dict[Any, fx.Node]:
    """What a mask computes -> the first node that computes it."""
    if view.masks is None:
        view.masks = {}
        for node in view.order:
            if node.target is aten.where.self and isinstance(node.args[0], fx.Node):
                view.masks.setdefault(_meaning(node.args[0]), node.args[0])
    return view.masks


def _meaning(node: Any, depth: int = 6) -> Any:
    """Equal for equal computations: a tree of ops down to what is no pointwise op or view, or is too deep."""
    from .gain import is_elementwise, is_view

    if isinstance(node, (tuple, list)):
        return tuple(_meaning(item, depth) for item in node)
    if not isinstance(node, fx.Node) or not depth or not (is_elementwise(node) or is_view(node)):
        return node if isinstance(node, fx.Node) else (type(node), str(node))
    kwargs = tuple((name, _meaning(value, depth - 1)) for name, value in sorted(node.kwargs.items()))
    return (node.target, _meaning(node.args, depth - 1), kwargs)
