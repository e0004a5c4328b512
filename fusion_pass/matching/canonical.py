"""The rules that make equal meanings equal terms.

`ALGEBRA` maps a term op to rules ``(view, args, attrs) -> Term | None``, tried in order whenever such a term is made.
Norms are recognised here:

    layer_norm(x) = (x - mean(x)) * rsqrt(var(x) + eps)          rms_norm(x) = x * rsqrt(mean(x * x) + eps)

over the last dim, eps bound and not matched. A unit vector is an RMSNorm and a constant, D values a row:

    x / max(|x|, e)  =  rms_norm(x, eps = e * e / D) / sqrt(D)

to the precision of fp32 for rows longer than 3000 e, and 0 for a row of zeros. Roundings between the pieces of a norm
are dropped: a kernel computes its statistics in fp32 whatever the model did.
"""

from __future__ import annotations

import math

import torch

from .terms import Term, TermView, bare
from .variances import centred, mean_from_sum, never_negative, variance_from_moments, variance_from_squares

LONGEST_CLAMP = 1e-8  # e of a unit vector: no row of an activation is so short that the formula above differs


def is_const(term: Term, value: float) -> bool:
    return term.op == "const" and term.value == value


def fold(op):
    def rule(view: TermView, args, attrs) -> Term | None:
        return view.const(op(*(a.value for a in args))) if all(a.op == "const" for a in args) else None

    return rule


def identity(value: float):
    def rule(view: TermView, args, attrs) -> Term | None:
        return args[1] if is_const(args[0], value) else None  # constants sort first

    return rule


def distribute_norm(view: TermView, args, attrs) -> Term | None:
    for n, product in (args, args[::-1]):
        p = bare(product)
        if n.norm_reach is not None and p.op == "mul" and n in p.args:
            other = p.args[1] if p.args[0] is n else p.args[0]
            total = view.make("mul", n, view.make("add", view.const(1.0), other))
            view.inexact.add(total)
            return total
    return None


def double_negation(view: TermView, args, attrs) -> Term | None:
    return args[0].args[0] if args[0].op == "neg" else None


def inverse_root(view: TermView, args, attrs) -> Term | None:
    root = bare(args[0])
    return view.make("rsqrt", root.args[0]) if root.op == "sqrt" else None


def inverse_length(view: TermView, args, attrs) -> Term | None:
    length = bare(args[0])
    while length.op == "view" and length.attrs[0] == "expand":
        length = bare(length.args[0])
    if length.op != "clamp_min" or not 0 < length.attrs[0] <= LONGEST_CLAMP:
        return None
    root = bare(length.args[0])
    if root.op != "sqrt" or bare(root.args[0]).op != "sum":
        return None
    total = bare(root.args[0])
    return view.make("rsqrt", view.make("add", view.const(length.attrs[0] ** 2), total))


def power(view: TermView, args, attrs) -> Term | None:
    match attrs[0]:
        case 2 | 2.0:
            return view.make("mul", args[0], args[0])
        case 0.5:
            return view.make("sqrt", args[0])
        case -0.5:
            return view.make("rsqrt", args[0])
        case -1 | -1.0:
            return view.make("reciprocal", args[0])
    return None


def _statistic(view: TermView, term: Term) -> tuple[Term, float, torch.dtype] | None:
    """``(reduction, eps, dtype)`` of ``rsqrt(reduction + eps)``; dtype is what ``reduction + eps`` was rounded to.

    Views in between, as in ``rsqrt(x.var(-1) + eps)[..., None]``, are moved down to the reduction.
    """
    root = bare(view.expose(bare(term)))
    if root.op != "rsqrt":
        return None
    rounded = view.expose(root.args[0])
    inside = bare(rounded)
    if inside.op == "add" and inside.args[0].op == "const":
        return bare(view.expose(inside.args[1])), inside.args[0].value, rounded.precision
    return inside, 0.0, torch.float32


def norm(view: TermView, args, attrs) -> Term | None:
    for x, factor in (args, args[::-1]):
        if (stat := _statistic(view, factor)) is None:
            continue
        reduction, eps, dtype = stat
        if reduction.op == "sum" and isinstance(reduction.args[0].shape[-1], int):
            return _unit_vector(view, x, reduction, eps)
        if reduction.op == "var" and centred(x) is reduction.args[0]:
            return make_norm(view, "layer_norm", reduction.args[0], eps, reduction, dtype)
        if reduction.op == "mean":
            square = bare(reduction.args[0])
            if square.op == "mul" and square.args[0] is square.args[1] and square.args[0] is x:
                return make_norm(view, "rms_norm", x, eps, reduction, dtype)
    return None


def _unit_vector(view: TermView, x: Term, total: Term, eps: float) -> Term | None:
    """``x * rsqrt(sum(q) + eps)``, a norm and a constant, where q is the squares of x."""
    d = total.args[0].shape[-1]
    mean = view.make("mean", total.args[0], shape=total.shape)
    n = norm(view, (x, view.make("rsqrt", view.make("add", view.const(eps / d), mean))), ())
    return None if n is None else view.make("mul", view.const(1 / math.sqrt(d)), n)


def inverse_constants(view: TermView, args, attrs) -> Term | None:
    """``sqrt(D) * (norm / sqrt(D))``, also with a weight between the constants, or one that has the first in it."""
    for first, second in (args, args[::-1]):
        product, own, weights = bare(first), bare(second), []
        if own.op == "mul" and own.norm_reach is None and own.args[0].op == "const":
            own, weight = own.args
            weights.append(weight)
        if product.op == "mul" and product.args[0].op != "const":
            weight, inner = product.args if bare(product.args[1]).norm_reach is not None else product.args[::-1]
            product = bare(inner)
            weights.append(weight)
        if own.op != "const" or product.op != "mul" or product.args[0].op != "const" or len(weights) > 1:
            continue
        n = product.args[1]
        if n.op in ("layer_norm", "rms_norm") and abs(own.value * product.args[0].value - 1.0) < 1e-6:
            view.inexact.add(n)
            return view.make("mul", n, *weights) if weights else n
    return None


def make_norm(
    view: TermView,
    kind: str,
    x: Term,
    eps: float,
    reduction: Term | None = None,
    dtype: torch.dtype = torch.float32,
) -> Term:
    unbiased = reduction is not None and reduction.op == "var" and reduction.attrs != (0,)
    term = view.intern(kind, (x,), (eps, "unbiased") if unbiased else (eps,), x.shape, torch.float32)
    view.reductions.setdefault(term, reduction if reduction is not None else term)
    view.statistics_dtype.setdefault(term, dtype)
    return term


def scale_the_statistic(view: TermView, args, attrs) -> Term | None:
    for x, product in (args, args[::-1]):
        if product.op == "mul":
            for stat, w in (product.args, product.args[::-1]):
                if stat.op == "rsqrt" and w.op != "const":
                    n = norm(view, (x, stat), ())
                    return view.make("mul", n, w) if n is not None else None
    return None


# one rule a line, each with the spelling it absorbs
ALGEBRA = {
    "add": [
        fold(lambda a, b: a + b),  # 1 + 0
        identity(0.0),  # x + 0
        distribute_norm,  # n + n * s
        variance_from_moments,  # (x ** 2).mean(-1) - x.mean(-1) ** 2
    ],
    "mul": [
        fold(lambda a, b: a * b),  # 0.5 * 2
        identity(1.0),  # x * 1
        mean_from_sum,  # x.sum(-1) / D
        norm,  # (x - mean) * rsqrt(var + eps), x * rsqrt(mean_square + eps)
        scale_the_statistic,  # x * (rstd * w)
        inverse_constants,  # x / |x| * w * sqrt(D)
    ],
    "neg": [fold(lambda a: -a), double_negation],
    "reciprocal": [
        fold(lambda a: 1.0 / a if a else float("inf")),
        inverse_root,  # 1 / sqrt(v)
        inverse_length,  # 1 / max(|x|, e)
    ],
    "pow": [power],  # x ** 2, v ** -0.5
    "mean": [variance_from_squares],  # ((x - mean) ** 2).mean(-1)
    "clamp_min": [never_negative],  # variance.clamp(min=0)
}
