"""Ops that put tensors together, as terms: `cat`, scatters, and arithmetic on pairs seen as complex numbers.

    cat([a, b], dim)                         cat(a, b)
    slice_scatter(x, s, dim, i, j)           cat(x[:i], s, x[j:])           in-place writes to a slice, functionalised
    slice_scatter(x, s, -1, i, None, 2)      even and odd columns, interleaved
    select_scatter(x, s, dim, i)             cat(x[:i], s[None], x[i+1:])
    view_as_real(a * b)                      cat(re, im) along a new last dim, by the rule of complex products

A complex tensor that is no product of such is a leaf; its parts are selected from ``view_as_real``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compat import statically_known_true
from .simplify import cat_terms, select_term, slice_term, unsqueeze_term
from .terms import Term, TermView, same_shape, same_size
from .views import clamped

aten = torch.ops.aten
COMPLEX = (torch.complex64, torch.complex128)
MAX_PARTS = 16  # of a cat that is looked into


def argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    """An argument of a node, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def read_cat(view: TermView, node: fx.Node) -> Term | None:
    parts = [view.operand(a) for a in node.args[0]]
    rank = node.meta["val"].dim()
    terms = [p for p in parts if p is not None and len(p.shape) == rank]
    if len(terms) < len(parts) or not 0 < len(parts) <= MAX_PARTS:
        return None
    return cat_terms(view, terms, argument(node, 1, "dim", 0) % rank)


def read_copy(view: TermView, node: fx.Node) -> Term | None:
    """`copy(destination, source)`: the source in the destination's dtype."""
    return view.operand(node.args[1])


def _replaced(view: TermView, base: Term, source: Term, dim: int, start: Any, stop: Any) -> Term:
    size = base.shape[dim]
    before = [] if same_size(start, 0) else [slice_term(view, base, dim, 0, start)]
    after = [] if same_size(stop, size) else [slice_term(view, base, dim, stop, size)]
    return cat_terms(view, [*before, source, *after], dim)


def read_slice_scatter(view: TermView, node: fx.Node) -> Term | None:
    base, source = view.term(node.args[0]), view.operand(node.args[1])
    if (
        base is None
        or source is None
        or len(base.shape) != node.meta["val"].dim()
        or len(source.shape) != len(base.shape)
    ):
        return None
    dim = argument(node, 2, "dim", 0) % len(base.shape)
    size = base.shape[dim]
    start = clamped(argument(node, 3, "start", None), size, 0)
    stop = clamped(argument(node, 4, "end", None), size, size)
    step = argument(node, 5, "step", 1)
    if start is None or stop is None:
        return None
    if step == 1:
        return _replaced(view, base, source, dim, start, stop) if statically_known_true(start < stop) else None
    last = dim == len(base.shape) - 1
    if step == 2 and last and start in (0, 1) and isinstance(size, int) and size % 2 == 0 and size - stop < 2 - start:
        columns = [select_term(view, as_pairs(view, base), dim + 1, i) for i in (0, 1)]
        columns[start] = source
        return interleave(view, *columns)
    return None


def read_select_scatter(view: TermView, node: fx.Node) -> Term | None:
    base, source = view.term(node.args[0]), view.operand(node.args[1])
    dim, index = node.args[2], node.args[3]
    if base is None or source is None or not isinstance(dim, int) or not isinstance(index, int):
        return None
    dim %= node.meta["val"].dim()
    if len(base.shape) != node.meta["val"].dim() or len(source.shape) != len(base.shape) - 1:
        return None
    if index < 0:
        index += base.shape[dim]
    return _replaced(view, base, unsqueeze_term(view, source, dim), dim, index, index + 1)


def as_pairs(view: TermView, base: Term) -> Term:
    """``[..., d]`` as ``[..., d/2, 2]``."""
    return view.view(base, ("reshape",), (*base.shape[:-1], base.shape[-1] // 2, 2))


def interleave(view: TermView, even: Term, odd: Term) -> Term:
    """``stack([even, odd], -1).flatten(-2)``."""
    rank = len(even.shape)
    pairs = cat_terms(view, [unsqueeze_term(view, t, rank) for t in (even, odd)], rank)
    return view.view(pairs, ("reshape",), (*even.shape[:-1], 2 * even.shape[-1]))


def read_view_as_real(view: TermView, node: fx.Node) -> Term | None:
    parts = complex_parts(view, node.args[0])
    shape = tuple(node.meta["val"].shape)
    if parts is None or not same_shape(parts[0].shape, shape[:-1]) or not same_shape(parts[1].shape, shape[:-1]):
        return None
    last = len(shape) - 1
    return cat_terms(view, [unsqueeze_term(view, t, last) for t in parts], last)


def complex_parts(view: TermView, node: Any) -> tuple[Term, Term] | None:
    """The real and the imaginary part of a complex node; None for anything else."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(val, torch.Tensor) or val.dtype not in COMPLEX:
        return None
    if node.target is aten.view_as_complex.default:
        term = view.operand(node.args[0])
        if term is None or not term.shape:
            return None
        last = len(term.shape) - 1
        return select_term(view, term, last, 0), select_term(view, term, last, 1)
    if node.target in (torch.ops.prims.convert_element_type.default, aten._to_copy.default):
        return complex_parts(view, node.args[0])
    if node.target is aten.mul.Tensor:
        a, b = (complex_parts(view, arg) for arg in node.args)
        if a is None or b is None:
            return None
        real = view.make("add", view.make("mul", a[0], b[0]), view.make("neg", view.make("mul", a[1], b[1])))
        imaginary = view.make("add", view.make("mul", a[0], b[1]), view.make("mul", a[1], b[0]))
        return real, imaginary
    if node.target is aten._conj.default and (parts := complex_parts(view, node.args[0])) is not None:
        return parts[0], view.make("neg", parts[1])
    if val.is_conj():
        return None  # only resolved tensors can be seen as real
    last = val.dim()
    real_view = view.view(view.leaf(node), ("real",), (*val.shape, 2))
    return select_term(view, real_view, last, 0), select_term(view, real_view, last, 1)


RECOMBINE_READERS = {
    aten.cat.default: read_cat,
    aten.copy.default: read_copy,
    aten.slice_scatter.default: read_slice_scatter,
    aten.select_scatter.default: read_select_scatter,
    aten.view_as_real.default: read_view_as_real,
}
