"""Gates, scales and shifts that are picked per token, from few rows that are the same for many tokens.

    where(mask, row0, row1)      one of two rows of each sample
    table[numbers]               one of the rows of a table; also index_select and embedding, and parts of what comes

The op takes the rows as one operand and the mask or the numbers as `pick`, so that the picked rows, one for each token,
need not be written to memory. The two rows must be neighbours in one tensor (``mod[:b]`` and ``mod[b:]``): then both
together are a view of it. Masks that every block computes anew are found equal by what computes them; the first one
serves all sites. Numbers reach the kernel through `rewriting.row_numbers`, where a wrong one is an error as before.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import fx

from dkfuse.kernels.picks import NUMBERS, PICKED

from .pattern import Binding
from .rules import Candidate, NotThisRule
from .terms import Term, TermView, same_shape, same_size

aten = torch.ops.aten
FEW = 64  # rows, beside a number of tokens that is a symbol


class Choice(NamedTuple):
    """What picks the rows, for whom it is the same where the keys are, and the rows, in dim 0."""

    key: Any
    pick: Term
    rows: Term


def resolve(site: Candidate) -> None:
    """Bind the rows in place of each operand of the site that is picked as the first such one is."""
    view, binding = site.view, site.binding
    found: dict[str, Choice] = {}
    for name in PICKED:
        if name in binding.terms and (choice := _choice(view, binding.terms[name], site.shape)) is not None:
            found[name] = choice
    if "gate" in binding.terms and "gate" not in found and _choice(view, binding.terms["x"], site.shape) is not None:
        raise NotThisRule("of two factors of one shape the rows that are picked are the gate")
    if found:
        first = next(iter(found.values()))
        rows = {name: choice.rows for name, choice in found.items() if _picks_alike(choice, first)}
        terms = {**binding.terms, **rows, "pick": first.pick}
        site.picked = [binding.terms[name] for name in rows]
        site.binding = Binding(terms, binding.numbers, binding.roundings, binding.interior)


def _picks_alike(one: Choice, other: Choice) -> bool:
    """The same numbers may be those of samples for one operand and those of tokens for another."""
    shapes = [choice.pick.shape for choice in (one, other)]
    rank = max(map(len, shapes))
    return one.key == other.key and same_shape(*((1,) * (rank - len(shape)) + shape for shape in shapes))


def has_rows(site: Candidate, name: str) -> bool:
    """The operand holds rows to pick from."""
    operands = site.operands
    return "pick" in operands and name in PICKED and len(operands[name].shape) == len(site.shape) + 1


def _choice(view: TermView, term: Term, shape: tuple) -> Choice | None:
    return _by_mask(view, term, shape) or _by_number(view, term, shape)


def _by_mask(view: TermView, term: Term, shape: tuple) -> Choice | None:
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
    if rows is None:
        return None
    known = masks(view)[_meaning(mask)]
    return Choice(known, view.leaf(known), _with_dims(view, rows, shape))


def _with_dims(view: TermView, rows: Term, shape: tuple) -> Term:
    """`rows` with one dim more than `shape`."""
    while len(rows.shape) <= len(shape):
        rows = view.view(rows, ("unsqueeze", 1), (rows.shape[0], 1, *rows.shape[1:]))
    return rows


# -- by number ---------------------------------------------------------------------------------------------------------


def _by_number(view: TermView, term: Term, shape: tuple) -> Choice | None:
    """The numbers and the rows of ``table[numbers]``, or of a view of it that leaves tokens as they are; or None."""
    above: list[tuple[tuple, tuple]] = []
    while term.op == "view" and term.attrs[0] in ("slice", "squeeze", "unsqueeze"):
        above.append((term.attrs, term.shape))
        term = term.args[0]
    source = table_and_numbers(term.attrs[0]) if term.op == "leaf" else None
    if source is None or (rows := view.term(source[0])) is None:
        return None
    numbers = masks(view)[_meaning(source[1])]
    pick, tokens = view.leaf(numbers), numbers.meta["val"].dim()
    for (kind, dim, *rest), seen in reversed(above):
        if kind == "unsqueeze" and dim <= tokens:
            pick = view.view(pick, (kind, dim), (*pick.shape[:dim], 1, *pick.shape[dim:]))
            tokens += 1
        elif dim < tokens:
            return None
        else:
            rows = view.view(rows, (kind, dim - tokens + 1, *rest), (rows.shape[0], *seen[tokens:]))
    for _ in rows.shape[1:]:
        pick = view.view(pick, ("unsqueeze", len(pick.shape)), (*pick.shape, 1))
    if len(rows.shape) < 2 or len(pick.shape) > len(shape) or not same_size(rows.shape[-1], shape[-1]):
        return None
    return Choice((numbers, rows.shape[0]), pick, _with_dims(view, rows, shape))


def table_and_numbers(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What rows are picked from and by, where there are fewer of them than tokens."""
    if node.target is aten.index.Tensor:
        table, picks = node.args
        numbers = picks[0] if len(picks) == 1 else None  # type: ignore[arg-type, index]
    elif node.target is aten.index_select.default and node.args[1] == 0:
        table, _, numbers = node.args
    elif node.target is aten.embedding.default:
        table, numbers = node.args[:2]
    else:
        return None
    if not isinstance(table, fx.Node) or not isinstance(numbers, fx.Node):
        return None
    rows, many = table.meta["val"], numbers.meta["val"]
    if many.dtype not in NUMBERS or rows.dim() < 2 or not isinstance(rows.shape[0], int) or not rows.shape[0]:
        return None
    few = rows.shape[0] < math.prod(many.shape) if all(isinstance(n, int) for n in many.shape) else rows.shape[0] <= FEW
    return (table, numbers) if few else None


# -- by a mask ---------------------------------------------------------------------------------------------------------


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
    """What a mask, or numbers of rows, computes -> the first node that computes it."""
    if view.masks is None:
        view.masks = {}
        for node in view.order:
            pick = node.args[0] if node.target is aten.where.self else (table_and_numbers(node) or (None, None))[1]
            if isinstance(pick, fx.Node):
                view.masks.setdefault(_meaning(pick), pick)
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
