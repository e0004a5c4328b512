"""What each ATen op means as a term, and the rules that make equal meanings equal terms.

`READERS` maps an op to a function ``(view, node) -> Term | None`` (None: leave it a leaf). `ALGEBRA` maps a term op to
rules ``(view, args, attrs) -> Term | None``, tried in order whenever such a term is made. Norms are recognised here:

    layer_norm(x) = (x - mean(x)) * rsqrt(var(x) + eps)          rms_norm(x) = x * rsqrt(mean(x * x) + eps)

over the last dim, eps bound and not matched. Roundings between the pieces of a norm are dropped: a kernel computes its
statistics in fp32 whatever the model did.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .terms import Term, TermView, getitem_source, same_size
from .views import VIEW_READERS, read_cat, read_split

aten = torch.ops.aten
prims = torch.ops.prims


def bare(term: Term) -> Term:
    """`term` without its roundings."""
    while term.op == "round":
        term = term.args[0]
    return term


def is_const(term: Term, value: float) -> bool:
    return term.op == "const" and term.value == value


def is_norm(term: Term) -> bool:
    return term.op in ("layer_norm", "rms_norm")


# -- algebra: one rule a line in the tables at the end, each with the spelling it absorbs ----------------------------


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
            return view.make("mul", n, view.make("add", view.const(1.0), other))
    return None


def double_negation(view: TermView, args, attrs) -> Term | None:
    return args[0].args[0] if args[0].op == "neg" else None


def inverse_root(view: TermView, args, attrs) -> Term | None:
    return view.make("rsqrt", args[0].args[0]) if bare(args[0]).op == "sqrt" else None


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


def mean_from_sum(view: TermView, args, attrs) -> Term | None:
    c, s = args[0], bare(args[1])
    known = c.op == "const" and s.op == "sum" and isinstance(s.args[0].shape[-1], int)
    if known and abs(c.value * s.args[0].shape[-1] - 1.0) < 1e-6:
        return view.make("mean", s.args[0], shape=s.shape)
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
        if reduction.op == "var" and centred(x) is reduction.args[0]:
            return make_norm(view, "layer_norm", reduction.args[0], eps, reduction, dtype)
        if reduction.op == "mean":
            square = bare(reduction.args[0])
            if square.op == "mul" and square.args[0] is square.args[1] and square.args[0] is x:
                return make_norm(view, "rms_norm", x, eps, reduction, dtype)
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


ALGEBRA = {
    "add": [
        fold(lambda a, b: a + b),  # 1 + 0
        identity(0.0),  # x + 0
        distribute_norm,  # n + n * s
    ],
    "mul": [
        fold(lambda a, b: a * b),  # 0.5 * 2
        identity(1.0),  # x * 1
        mean_from_sum,  # x.sum(-1) / D
        norm,  # (x - mean) * rsqrt(var + eps), x * rsqrt(mean_square + eps)
        scale_the_statistic,  # x * (rstd * w)
    ],
    "neg": [fold(lambda a: -a), double_negation],
    "reciprocal": [fold(lambda a: 1.0 / a if a else float("inf")), inverse_root],  # 1 / sqrt(v)
    "pow": [power],  # x ** 2, v ** -0.5
    "mean": [variance_from_squares],  # ((x - mean) ** 2).mean(-1)
}


# -- readers ---------------------------------------------------------------------------------------------------------


def elementwise(op: str):
    def read(view: TermView, node: fx.Node) -> Term | None:
        args = [term for a in node.args if (term := view.operand(a)) is not None]
        if len(args) < len(node.args):
            return None
        alpha = node.kwargs.get("alpha", 1)
        if op == "rsub":
            args = [args[1], args[0]]
        if op in ("add", "sub", "rsub") and alpha != 1:
            args[1] = view.make("mul", view.const(alpha), args[1])
        if op in ("sub", "rsub"):
            return view.make("add", args[0], view.make("neg", args[1]))
        if op == "div":
            if node.kwargs.get("rounding_mode") is not None:
                return None
            return view.make("mul", args[0], view.make("reciprocal", args[1]))
        if op == "square":
            return view.make("mul", args[0], args[0])
        return view.make(op, *args)

    return read


def read_addcmul(view: TermView, node: fx.Node) -> Term | None:
    t, a, b = (view.operand(x) for x in node.args)
    if t is None or a is None or b is None:
        return None
    product = view.make("mul", view.const(node.kwargs.get("value", 1)), view.make("mul", a, b))
    return view.make("add", t, product)


def read_pow(view: TermView, node: fx.Node) -> Term | None:
    base = view.operand(node.args[0])
    exponent = node.args[1]
    return (
        view.make("pow", base, attrs=(exponent,)) if base is not None and isinstance(exponent, (int, float)) else None
    )


def read_cast(view: TermView, node: fx.Node) -> Term | None:
    source = node.args[0]
    if source.meta["val"].device != node.meta["val"].device:
        return None
    return view.operand(source)


def read_full(view: TermView, node: fx.Node) -> Term | None:
    fill = node.args[1] if len(node.args) > 1 else node.args[0]
    return view.const(fill) if isinstance(fill, (int, float)) and not isinstance(fill, bool) else None


def _last_dim_only(node: fx.Node, dims: Any) -> bool:
    rank = node.args[0].meta["val"].dim()
    dims = [dims] if isinstance(dims, int) else dims
    return dims is not None and len(dims) == 1 and dims[0] % rank == rank - 1


def _reduction(view: TermView, node: fx.Node, op: str, dims: Any, keepdim: bool, attrs: tuple = ()) -> Term | None:
    x = view.operand(node.args[0])
    if x is None or not x.shape or not _last_dim_only(node, dims):
        return None
    term = view.make(op, x, attrs=attrs, shape=(*x.shape[:-1], 1))
    return term if keepdim else view.view(term, ("squeeze", len(x.shape) - 1), x.shape[:-1])


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def read_mean(view: TermView, node: fx.Node) -> Term | None:
    return _reduction(view, node, "mean", _argument(node, 1, "dim", None), _argument(node, 2, "keepdim", False))


def read_sum(view: TermView, node: fx.Node) -> Term | None:
    return _reduction(view, node, "sum", _argument(node, 1, "dim", None), _argument(node, 2, "keepdim", False))


def _correction(node: fx.Node) -> float:
    value = _argument(node, 2, "correction", None)
    return 1 if value is None else value


def read_var(view: TermView, node: fx.Node) -> Term | None:
    dims, keepdim = _argument(node, 1, "dim", None), _argument(node, 3, "keepdim", False)
    return _reduction(view, node, "var", dims, keepdim, (_correction(node),))


def read_getitem(view: TermView, node: fx.Node) -> Term | None:
    if (source := getitem_source(node)) is None:
        return None
    producer, index = source
    if producer.target in SPLITS:
        return read_split(view, node, producer, index)
    if producer.target is aten.var_mean.correction:
        dims, keepdim = _argument(producer, 1, "dim", None), _argument(producer, 3, "keepdim", False)
        if index == 0:
            return _reduction(view, producer, "var", dims, keepdim, (_correction(producer),))
        return _reduction(view, producer, "mean", dims, keepdim)
    if index == 0 and producer.target in (aten.native_layer_norm.default, aten._fused_rms_norm.default):
        return read_native_norm(view, producer)
    return None


def read_native_norm(view: TermView, node: fx.Node) -> Term | None:
    kind = "layer_norm" if "layer_norm" in node.target.name() else "rms_norm"
    x, shape = view.operand(node.args[0]), node.args[1]
    if x is None or len(shape) != 1 or not same_size(shape[0], x.shape[-1]):
        return None
    weight = _argument(node, 2, "weight", None)
    bias = _argument(node, 3, "bias", None) if kind == "layer_norm" else None
    eps = _argument(node, 4, "eps", 1e-5) if kind == "layer_norm" else _argument(node, 3, "eps", None)
    # without eps ATen takes that of the accumulation type, not of the input
    term = make_norm(view, kind, x, torch.finfo(torch.float32).eps if eps is None else eps)
    for op, operand in (("mul", weight), ("add", bias)):
        if operand is not None:
            other = view.operand(operand)
            if other is None:
                return None
            term = view.make(op, term, other)
    return term


SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default)

READERS = {
    **{
        getattr(getattr(aten, name), overload): elementwise(name)
        for name in ("add", "sub", "mul", "div")
        for overload in ("Tensor", "Scalar")
    },
    aten.rsub.Scalar: elementwise("rsub"),
    aten.rsub.Tensor: elementwise("rsub"),
    aten.neg.default: elementwise("neg"),
    aten.square.default: elementwise("square"),
    aten.sqrt.default: elementwise("sqrt"),
    aten.rsqrt.default: elementwise("rsqrt"),
    aten.reciprocal.default: elementwise("reciprocal"),
    aten.addcmul.default: read_addcmul,
    aten.pow.Tensor_Scalar: read_pow,
    prims.convert_element_type.default: read_cast,
    aten._to_copy.default: read_cast,
    aten.to.dtype: read_cast,
    aten.full.default: read_full,
    aten.scalar_tensor.default: read_full,
    aten.mean.dim: read_mean,
    aten.sum.dim_IntList: read_sum,
    aten.var.correction: read_var,
    operator.getitem: read_getitem,
    aten.layer_norm.default: read_native_norm,
    aten.rms_norm.default: read_native_norm,
    aten.cat.default: read_cat,
    **VIEW_READERS,
}
