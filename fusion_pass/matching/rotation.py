"""Rotations of pairs of columns, recognised in any spelling (RoPE, Su et al., arXiv:2104.09864).

    out0 = c0 * x0 - s0 * x1        x0, x1: columns 2i, 2i+1 ("interleaved") or i, i + r/2 ("half") of x
    out1 = c1 * x1 + s1 * x0

A value is split into its two components by selecting columns through the arithmetic that made it; each must be a sum of
two products of a column of one x with a table. ``x * cos + rotate_half(x) * sin``, stacks of halves, complex products,
2x2 matrices and slice writes all come out as these four products. What the tables are: `rotation_tables`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .rotation_tables import NotARotation, Tables, pair_base, stripped, tables_of
from .simplify import cat_terms, select_term
from .terms import Term, TermView, same_shape, same_size

STYLES = ("interleaved", "half")
NARROWEST = 4  # columns; a single pair is a complex number, not a head


@dataclass(frozen=True)
class Rotation:
    """`x` rotated on its first `width` columns in `style`."""

    x: Term
    style: str
    width: int
    tables: Tables
    roundings: tuple[torch.dtype, ...] = ()  # of the products
    double: bool = False  # x was cast to fp64


@dataclass(frozen=True)
class _Product:
    positive: bool
    factors: tuple[Term, Term]
    rounded: torch.dtype | None


def match(view: TermView, term: Term) -> Rotation | None:
    """The rotation that computes `term`; None where there is none. NotARotation where it only looks like one."""
    value = stripped(term)
    if not value.shape or not isinstance(value.shape[-1], int) or value.shape[-1] % 2 or value.shape[-1] < NARROWEST:
        return None
    if (partial := _partial(view, value)) is not None:
        return partial
    problem: NotARotation | None = None
    for style in STYLES:
        try:
            if (found := _whole(view, value, style)) is not None:
                return found
        except NotARotation as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def _partial(view: TermView, value: Term) -> Rotation | None:
    """``cat([rotated x[..., :r], x[..., r:]], -1)``."""
    last = len(value.shape) - 1
    if value.op != "cat" or value.attrs != (last,) or len(value.args) < 2:
        return None
    rotated, rest = cat_terms(view, list(value.args[:-1]), last), value.args[-1]
    if rest.op != "view" or rest.attrs[0] != "slice" or rest.attrs[1] != last or rest.attrs[4] != 1:
        return None
    width, x = rotated.shape[last], rest.args[0]
    whole = same_size(rest.attrs[2], width) and same_size(rest.attrs[3], x.shape[last])
    if not whole or (inner := match(view, rotated)) is None or inner.width != width:
        return None
    first = view.view(x, ("slice", last, 0, width, 1), (*x.shape[:-1], width))
    return replace(inner, x=x) if inner.x is first else None


def _whole(view: TermView, value: Term, style: str) -> Rotation | None:
    width = value.shape[-1]
    rows = []
    for i in (0, 1):
        products = _products(view, component(view, value, style, i), True)
        if products is None or len(products) != 2:
            return None
        rows.append(products)
    bases = [x for x in _bases(view, rows[0], style) if same_shape(x.shape, value.shape)]
    for x in sorted(bases, key=_table_like):
        entries = [_entries(view, row, x, style) for row in rows]
        if entries[0] is None or entries[1] is None:
            continue
        (p00, t00), (p01, t01) = entries[0][0], entries[0][1]
        (p10, t10), (p11, t11) = entries[1][0], entries[1][1]
        tables = tables_of(view, style, width, (t00, t01, t10, t11), (p00, p01, p10, p11))
        rounded = {p.rounded for row in rows for p in row} - {None}
        lifted = view.expose(x)
        double = lifted.op == "double"
        return Rotation(
            lifted.args[0] if double else x, style, width, tables, tuple(d for d in rounded if d is not None), double
        )
    return None


def component(view: TermView, value: Term, style: str, i: int) -> Term:
    """Columns `i` of the pairs of `value`, [..., d/2]."""
    half, last = value.shape[-1] // 2, len(value.shape) - 1
    tail, dim = ((half, 2), last + 1) if style == "interleaved" else ((2, half), last)
    return select_term(view, view.view(value, ("reshape",), (*value.shape[:-1], *tail)), dim, i)


def _products(view: TermView, term: Term, positive: bool, rounded: torch.dtype | None = None) -> list[_Product] | None:
    """`term` as a sum of signed products of two factors; None where it is not."""
    seen = view.expose(term)
    match seen.op:
        case "round":
            return _products(view, seen.args[0], positive, seen.attrs[0])
        case "double" | "from_double":
            return _products(view, seen.args[0], positive, rounded)
        case "neg":
            return _products(view, seen.args[0], not positive, rounded)
        case "add":
            a, b = (_products(view, arg, positive) for arg in seen.args)
            return None if a is None or b is None else a + b
        case "mul":
            left, right = seen.args
            if left.op == "const":  # constants sort first
                return _products(view, right, positive == (left.value > 0), rounded) if abs(left.value) == 1.0 else None
            return [_Product(*_signed(view, positive, left, right), rounded)]
    return None


def _signed(view: TermView, positive: bool, *factors: Term) -> tuple[bool, tuple[Term, Term]]:
    """Minus signs of the factors moved to the front."""
    plain = []
    for factor in factors:
        seen = factor
        while seen.op in ("double", "from_double"):
            seen = seen.args[0]
        lifted = view.expose(seen) if seen.op == "view" else seen
        if lifted.op == "neg":
            positive, seen = not positive, lifted.args[0]
        plain.append(seen)
    return positive, (plain[0], plain[1])


def _bases(view: TermView, row: list[_Product], style: str) -> Iterator[Term]:
    """What the first component may be made of: a tensor whose two columns are in its two products."""
    for product, other in (row, row[::-1]):
        for factor in product.factors:
            x = pair_base(view, factor, style, 0)
            if x is not None and any(pair_base(view, f, style, 1) is x for f in other.factors):
                yield x


def _table_like(x: Term) -> bool:
    """Where table and x have one shape, either could be the other: x is normed, or no view of a complex tensor."""
    seen, real = x, False
    while seen.op in ("view", "round", "double", "from_double"):
        real |= seen.op == "view" and seen.attrs[0] == "real"
        seen = seen.args[0]
    return real or seen.norm_reach is None


def _entries(view: TermView, row: list[_Product], x: Term, style: str) -> list[tuple[bool, Term]] | None:
    """``[(sign, table of x0), (sign, table of x1)]`` of one component, or None."""
    found: dict[int, tuple[bool, Term]] = {}
    for product in row:
        for factor, table in (product.factors, product.factors[::-1]):
            at = [i for i in (0, 1) if pair_base(view, factor, style, i) is x]
            if at and at[0] not in found:
                found[at[0]] = (product.positive, table)
                break
    return [found[0], found[1]] if len(found) == 2 else None
