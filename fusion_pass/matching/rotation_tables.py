"""The tables of a rotation, and how pairs of columns are picked from a tensor.

What the four products of a rotation multiply with is one of

    half      c0 = c1 and s0 = s1            tables [..., r/2]
    complex   as half, both columns of one   table [..., r], cosines and sines adjacent
    full      c0, c1 columns of one table    tables [..., r]
    matrix    four elements of one table     table [..., 2r], a 2x2 matrix for each pair
"""

from __future__ import annotations

from dataclasses import dataclass

from .selection import selection
from .terms import Term, TermView, same_shape, same_size


@dataclass(frozen=True)
class Tables:
    """`cos` (and `sin`) as the op reads them in `form`."""

    form: str
    cos: Term
    sin: Term | None = None


class NotARotation(Exception):
    """Columns are recombined, and the message says why it is no rotation."""


def stripped(term: Term) -> Term:
    """`term` without roundings and changes between fp32 and fp64."""
    while term.op in ("round", "double", "from_double"):
        term = term.args[0]
    return term


def pair_base(view: TermView, term: Term, style: str, i: int) -> Term | None:
    """x of columns `i` of the pairs of x, [..., d/2] to [..., d]; None where `term` is not that."""
    if not term.shape:
        return None
    width, seen = 2 * term.shape[-1], stripped(term)
    while seen.op == "view" and seen.attrs[0] == "squeeze":
        seen = seen.args[0]
    if seen.op != "view" or seen.attrs[0] != "slice":
        return from_pairs(view, stripped(term), style, i)
    source, (dim, start, stop, step) = seen.args[0], seen.attrs[1:]
    last, shape = len(source.shape) - 1, (*term.shape[:-1], width)
    if (
        dim == last
        and style == "half"
        and step == 1
        and same_shape(source.shape[:-1], shape[:-1])
        and _wider(source, width)
    ):
        block = same_size(start, i * width // 2) and same_size(stop, (i + 1) * width // 2)
        return view.view(source, ("slice", last, 0, width, 1), shape) if block else None
    if dim == last and same_size(source.shape[last], width) and same_shape(source.shape, shape):
        strided = style == "interleaved" and step == 2 and start == i
        block = (
            style == "half" and step == 1 and same_size(start, i * width // 2) and same_size(stop - start, width // 2)
        )
        return source if strided or block else None
    return from_pairs(view, stripped(term), style, i)


def from_pairs(view: TermView, term: Term, style: str, i: int) -> Term | None:
    """x of ``x.reshape(..., n, 2)[..., i]`` or ``x.reshape(..., 2, n)[..., i, :]``, dims moved in between or not."""
    found = selection(term)
    if not found.dims or (columns := found.dims[-1]) is None:
        return None
    step = 1 if style == "interleaved" else -1
    pair = columns + step
    while 0 <= pair < len(found.base.shape) and same_size(found.base.shape[pair], 1):
        pair += step
    if not 0 <= pair < len(found.base.shape) or pair in found.dims or not same_size(found.base.shape[pair], 2):
        return None
    if found.index(pair) != i or columns in found.ranges:
        return None
    last = (columns, pair) if style == "interleaved" else (pair, columns)
    gone = tuple(d for d in range(len(found.base.shape)) if d not in found.dims and d != pair)
    source, dims = found.without(view, pair), (*gone, *found.kept[:-1], *last)
    wide = [d for d in dims if not same_size(source.shape[d], 1)]
    if wide != sorted(wide):
        source = view.view(source, ("permute", dims), tuple(source.shape[d] for d in dims))
    return view.view(source, ("reshape",), (*term.shape[:-1], 2 * term.shape[-1]))


def _wider(source: Term, width: int) -> bool:
    """Has columns behind those that are rotated."""
    return isinstance(source.shape[-1], int) and source.shape[-1] > width


def tables_of(view: TermView, style: str, width: int, t: tuple[Term, ...], signs: tuple[bool, ...]) -> Tables:
    """How the op reads the tables of out = [[t0, t1], [t2, t3]] x."""
    if signs == (True, True, True, True):
        elements = [_element(view, entry) for entry in t]
        if (table := _matrices(view, elements, width)) is not None:
            return Tables("matrix", table)
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


def _matrices(view: TermView, elements: list[tuple[Term, tuple, int] | None], width: int) -> Term | None:
    """The table [..., 2 * width] whose elements 0 to 3 are `elements`, or 0, 2, 1, 3 of: then it is transposed."""
    if elements[0] is None:
        return None
    table, outer, _ = elements[0]
    order = [e[2] for e in elements if e is not None and e[0] is table and same_shape(e[1], outer)]
    if order == [0, 2, 1, 3]:
        rank = len(table.shape)
        dims = (*range(rank - 2), rank - 1, rank - 2)
        table = view.view(table, ("permute", dims), table.shape)
    elif order != [0, 1, 2, 3]:
        return None
    return view.view(table, ("reshape",), (*outer, 2 * width))


def _element(view: TermView, term: Term) -> tuple[Term, tuple, int] | None:
    """``f[..., row, column]`` of f [..., n, 2, 2]: f, the outer dims to read it in, and 2 * row + column."""
    found = selection(term)
    rank = len(found.base.shape)
    if rank < 3 or found.kept != tuple(d for d in range(rank - 2) if d in found.dims):
        return None
    row, column = found.index(rank - 2), found.index(rank - 1)
    square = same_size(found.base.shape[-2], 2) and same_size(found.base.shape[-1], 2)
    if row is None or column is None or not square or found.dims[-1] != rank - 3:
        return None
    matrices, outer = found.without(view, rank - 2, rank - 1), term.shape[:-1]
    if matrices.op == "view" and matrices.attrs[0] == "expand" and found.dims == tuple(range(rank - 2)):
        matrices = matrices.args[0]  # `matmul` expands what it multiplies
        outer = matrices.shape[:-3]
    return matrices, outer, 2 * row + column
