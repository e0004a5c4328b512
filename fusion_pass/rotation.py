"""Rotations of pairs of columns, recognised in any spelling (RoPE, Su et al., arXiv:2104.09864).

    out0 = c0 * x0 - s0 * x1        x0, x1: columns 2i, 2i+1 ("interleaved") or i, i + r/2 ("half") of x
    out1 = c1 * x1 + s1 * x0

A value is split into its two components by selecting columns through the arithmetic that made it; each must be a sum of
two products of a column of one x with a table. ``x * cos + rotate_half(x) * sin``, stacks of halves, complex products,
2x2 matrices and slice writes all come out as these four products. What the tables are is seen from their terms:

    half      c0 = c1 and s0 = s1            tables [..., r/2]
    complex   as half, both columns of one   table [..., r], cosines and sines adjacent
    full      c0, c1 columns of one table    tables [..., r]
    matrix    four elements of one table     table [..., 2r], a 2x2 matrix for each pair
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .simplify import cat_terms, select_term
from .terms import Term, TermView, same_shape, same_size

STYLES = ("interleaved", "half")
NARROWEST = 4  # columns; a single pair is a complex number, not a head


@dataclass(frozen=True)
class Tables:
    """`cos` (and `sin`) as the op reads them in `form`."""

    form: str
    cos: Term
    sin: Term | None = None


@dataclass(frozen=True)
class Rotation:
    """`x` rotated on its first `width` columns in `style`."""

    x: Term
    style: str
    width: int
    tables: Tables
    roundings: tuple[torch.dtype, ...] = ()  # of the products
    double: bool = False  # x was cast to fp64


class NotARotation(Exception):
    """Columns are recombined, and the message says why it is no rotation."""


@dataclass(frozen=True)
class _Product:
    positive: bool
    factors: tuple[Term, Term]
    rounded: torch.dtype | None


def match(view: TermView, term: Term) -> Rotation | None:
    """The rotation that computes `term`; None where there is none. NotARotation where it only looks like one."""
    value = _stripped(term)
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
        tables = _tables(view, style, width, (t00, t01, t10, t11), (p00, p01, p10, p11))
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


def _stripped(term: Term) -> Term:
    """`term` without roundings and changes between fp32 and fp64."""
    while term.op in ("round", "double", "from_double"):
        term = term.args[0]
    return term


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
            a, b = seen.args
            if a.op == "const":  # constants sort first
                return _products(view, b, positive == (a.value > 0), rounded) if abs(a.value) == 1.0 else None
            return [_Product(*_signed(view, positive, a, b), rounded)]
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


def pair_base(view: TermView, term: Term, style: str, i: int) -> Term | None:
    """x of columns `i` of the pairs of x, [..., d/2] to [..., d]; None where `term` is not that."""
    if not term.shape:
        return None
    width, seen = 2 * term.shape[-1], _stripped(term)
    while seen.op == "view" and seen.attrs[0] == "squeeze":
        seen = seen.args[0]
    if seen.op != "view" or seen.attrs[0] != "slice":
        return None
    source, (dim, start, stop, step) = seen.args[0], seen.attrs[1:]
    last, shape = len(source.shape) - 1, (*term.shape[:-1], width)
    if dim == last and same_size(source.shape[last], width) and same_shape(source.shape, shape):
        strided = style == "interleaved" and step == 2 and start == i
        block = (
            style == "half" and step == 1 and same_size(start, i * width // 2) and same_size(stop - start, width // 2)
        )
        return source if strided or block else None
    if not same_size(source.shape[dim], 2) or step != 1 or start != i:
        return None
    pairs = (width // 2, 2) if style == "interleaved" else (2, width // 2)
    ones = [d for d in range(len(source.shape)) if not same_size(source.shape[d], 1) or d == dim]
    tail = tuple(source.shape[d] for d in ones[-2:])
    in_place = len(ones) >= 2 and ones[-1 if style == "interleaved" else -2] == dim and same_shape(tail, pairs)
    return view.view(source, ("reshape",), shape) if in_place else None


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


def _tables(view: TermView, style: str, width: int, t: tuple[Term, ...], signs: tuple[bool, ...]) -> Tables:
    """How the op reads the tables of out = [[t0, t1], [t2, t3]] x."""
    if signs == (True, True, True, True):
        elements = [_element(entry) for entry in t]
        base = elements[0][0] if elements[0] is not None else None
        if base is not None and elements == [(base, k) for k in range(4)]:
            return Tables("matrix", view.view(base, ("reshape",), (*base.shape[:-3], 2 * width)))
    if signs != (True, False, True, True):
        shown = " ".join("+" if s else "-" for s in signs)
        raise NotARotation(f"pairs are recombined with the signs {shown}; a rotation has + - + +, by row of its matrix")
    c0, s0, s1, c1 = t
    if c0 is c1 and s0 is s1:
        both = pair_base(view, c0, "interleaved", 0)
        if both is not None and pair_base(view, s0, "interleaved", 1) is both:
            return Tables("complex", both)
        return Tables("half", c0, s0)
    cos, sin = pair_base(view, c0, style, 0), pair_base(view, s0, style, 0)
    if (
        cos is not None
        and sin is not None
        and cos is pair_base(view, c1, style, 1)
        and sin is pair_base(view, s1, style, 1)
    ):
        return Tables("full", cos, sin)
    raise NotARotation("the two components of a pair are multiplied with tables that do not belong together")


def _element(term: Term) -> tuple[Term, int] | None:
    """``(f, 2 * row + column)`` of ``f[..., row, column]``, f of shape [..., 2, 2]."""
    picks: list[tuple[int, int]] = []  # (dim counted from the end of f, index), outermost view first
    seen, squeezed = term, []
    while seen.op == "view" and not (len(picks) == 2 and not squeezed):
        dim, rank = seen.attrs[1] if len(seen.attrs) > 1 else None, len(seen.args[0].shape)
        if seen.attrs[0] == "squeeze":
            squeezed.append(dim - rank)
        elif seen.attrs[0] == "slice" and seen.attrs[3] - seen.attrs[2] == 1:
            picks.append((dim - rank, seen.attrs[2]))
            if squeezed:
                squeezed.pop()
        else:
            return None
        seen = seen.args[0]
    if len(picks) != 2 or [int(same_size(s, 2)) for s in seen.shape[-2:]] != [1, 1]:
        return None
    (outer, i), (inner, j) = picks
    if outer != -1:
        return None  # the last pick is from a vector of 2
    return (seen, 2 * i + j) if inner == -1 else (seen, 2 * j + i) if inner == -2 else None
