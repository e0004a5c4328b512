"""Means and variances over the last dim, as rules of `dkfuse.canonical`.

    mean = sum(x) / D        var = mean((x - mean)^2) = mean(x^2) - mean^2

The last form is a difference of two numbers that may be large; kernels compute the first, which loses nothing.
"""

from __future__ import annotations

from .terms import Term, TermView, bare


def mean_from_sum(view: TermView, args, attrs) -> Term | None:
    c, s = args[0], bare(args[1])
    total = _kept(s)
    known = c.op == "const" and total.op == "sum" and isinstance(total.args[0].shape[-1], int)
    if known and abs(c.value * total.args[0].shape[-1] - 1.0) < 1e-6:
        mean = view.make("mean", total.args[0], shape=total.shape)
        return mean if total is s else view.view(mean, s.attrs, s.shape)
    return None


def centred(term: Term) -> Term | None:
    """x of ``x - mean(x)``."""
    t = bare(term)
    if t.op == "add":
        for a, b in (t.args, t.args[::-1]):
            m = bare(b)
            if m.op == "neg" and bare(m.args[0]).op == "mean" and bare(m.args[0]).args[0] is a:
                return a
    return None


def variance_from_squares(view: TermView, args, attrs) -> Term | None:
    square = bare(args[0])
    if square.op == "mul" and square.args[0] is square.args[1] and (x := centred(square.args[0])) is not None:
        return view.make("var", x, attrs=(0,), shape=(*x.shape[:-1], 1))
    return None


def variance_from_moments(view: TermView, args, attrs) -> Term | None:
    for first, second in (args, args[::-1]):
        squares, minus = bare(first), bare(second)
        if minus.op != "neg":
            continue
        product = bare(minus.args[0])
        if product.op != "mul" or product.args[0] is not product.args[1]:
            continue
        mean_of_squares, mean = (_kept(t) for t in (squares, bare(product.args[0])))
        if mean_of_squares.op != "mean" or mean.op != "mean":
            continue
        square, x = bare(mean_of_squares.args[0]), mean.args[0]
        if square.op == "mul" and square.args[0] is square.args[1] is x:
            var = view.make("var", x, attrs=(0,), shape=mean.shape)
            return var if squares is mean_of_squares else view.view(var, squares.attrs, squares.shape)
    return None


def _kept(term: Term) -> Term:
    """A reduction before its dim of size 1 was squeezed away."""
    return bare(term.args[0]) if term.op == "view" and term.attrs == ("squeeze", len(term.shape)) else term


def never_negative(view: TermView, args, attrs) -> Term | None:
    return args[0] if _kept(bare(args[0])).op == "var" and attrs[0] <= 0 else None
