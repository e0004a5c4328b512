"""What each ATen op means as a term: `READERS` maps an op to ``(view, node) -> Term | None`` (None: leave it a leaf).

Casts read as their operand (the rounding that they may do is added by `TermView`); `sub`, `div` and `addcmul` are
written with `add`, `mul`, `neg` and `reciprocal`; reductions count only over the last dim.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import fx

from .canonical import make_norm
from .recombine import RECOMBINE_READERS, argument
from .simplify import select_term, slice_term
from .terms import NARROW, Term, TermView, broadcast_shape, getitem_source, same_shape, same_size, viewed
from .views import VIEW_READERS, read_split

aten = torch.ops.aten
prims = torch.ops.prims
OPERAND = "dkfuse_operand"  # in the meta of a tensor of one number that a rewrite made for kernels to read


def elementwise(op: str):
    def read(view: TermView, node: fx.Node) -> Term | None:
        args = [term for a in node.args if (term := view.operand(a)) is not None]
        if len(args) < len(node.args):
            return None
        args = _unexpanded(args)
        alpha = node.kwargs.get("alpha", 1)
        if op == "rsub":
            args = [args[1], args[0]]
        if op in ("add", "sub", "rsub") and alpha != 1:
            args[1] = view.make("mul", view.const(alpha), args[1])
            if node.meta["val"].dtype in NARROW:
                view.inexact.add(args[1])  # on a CPU torch rounds the factor
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


def _unexpanded(args: list[Term]) -> list[Term]:
    """Two operands, each before it was expanded to what broadcasting against the other gives anyway."""
    shape = broadcast_shape([a.shape for a in args])
    for i in range(len(args) if len(args) == 2 else 0):
        seen = args[i]
        while seen.op == "view" and seen.attrs[0] == "expand":
            seen = seen.args[0]
            if same_shape(broadcast_shape([seen.shape, args[1 - i].shape]), shape):
                args[i] = seen
    return args


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


def read_clamp(view: TermView, node: fx.Node) -> Term | None:
    x, low, high = view.operand(node.args[0]), argument(node, 1, "min", None), argument(node, 2, "max", None)
    if x is None or not isinstance(low, (int, float)) or not (high is None or isinstance(high, (int, float))):
        return None
    x = view.make("clamp_min", x, attrs=(float(low),))
    return x if high is None else _clamped(view, x, high)


def read_clamp_max(view: TermView, node: fx.Node) -> Term | None:
    x, high = view.operand(node.args[0]), node.args[1]
    return _clamped(view, x, high) if x is not None and isinstance(high, (int, float)) else None


def _clamped(view: TermView, low: Term, high: float) -> Term | None:
    """What is not above -high is not above high either: ``clamp(x, -high, high)``, else None."""
    if low.op != "clamp_min" or low.attrs != (-high,) or not 0 < high < math.inf:
        return None
    return view.make("clamp", low.args[0], attrs=(float(high),))


def read_repeat(view: TermView, node: fx.Node) -> Term | None:
    """Rows repeated along dims of size 1, as `expand` does without a copy."""
    x, shape = view.operand(node.args[0]), tuple(node.meta["val"].shape)
    if x is None or len(x.shape) != len(shape):
        return None
    spread = all(same_size(a, b) or same_size(a, 1) for a, b in zip(x.shape, shape, strict=True))
    return view.view(x, ("expand",), shape) if spread else None


def read_cast(view: TermView, node: fx.Node) -> Term | None:
    source = node.args[0]
    if source.meta["val"].device != node.meta["val"].device:
        return None
    term = view.operand(source)
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if term is not None and before != after and torch.float64 in (before, after):
        # never the same value to a norm, whose statistics kernels compute in fp32
        return view.make("double" if after == torch.float64 else "from_double", term, shape=term.shape)
    return term


def read_full(view: TermView, node: fx.Node) -> Term | None:
    if node.meta.get(OPERAND):
        return None
    fill = node.args[1] if len(node.args) > 1 else node.args[0]
    return view.const(fill) if isinstance(fill, (int, float)) and not isinstance(fill, bool) else None


def _last_dim_only(node: fx.Node, dims: Any) -> bool:
    rank = node.args[0].meta["val"].dim()
    dims = [dims] if isinstance(dims, int) else dims
    return dims is not None and len(dims) == 1 and dims[0] % rank == rank - 1


def _reduction(view: TermView, node: fx.Node, op: str, dims: Any, keepdim: bool, attrs: tuple = ()) -> Term | None:
    x = view.operand(node.args[0])
    if x is None or not x.shape:
        return None
    if not _last_dim_only(node, dims):
        return _sum_of_stack(view, node, x, dims, keepdim) if op == "sum" else None
    if op == "sum" and same_size(x.shape[-1], 2):  # a 2x2 matrix times a pair
        last = len(x.shape) - 1
        both = view.make("add", *(select_term(view, x, last, i) for i in (0, 1)))
        return view.view(both, ("unsqueeze", last), (*x.shape[:-1], 1)) if keepdim else both
    term = view.make(op, x, attrs=attrs, shape=(*x.shape[:-1], 1))
    return term if keepdim else view.view(term, ("squeeze", len(x.shape) - 1), x.shape[:-1])


def _sum_of_stack(view: TermView, node: fx.Node, x: Term, dims: Any, keepdim: bool) -> Term | None:
    """``stack([a, b], dim).sum(dim)`` as the sum that it is: like that one, it is added up in fp32 and rounded once."""
    joined = x.args[0] if x.op == "view" else x
    if joined.op != "cat" or not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    dim, count = dims[0] % len(x.shape), len(joined.args)
    parts = [select_term(view, x, dim, i) for i in range(count)] if x.shape[dim] == count else []
    if not parts or any(viewed(part) is joined for part in parts):
        return None
    total = functools.reduce(lambda a, b: view.make("add", a, b), parts)
    return view.view(total, ("unsqueeze", dim), tuple(node.meta["val"].shape)) if keepdim else total


def read_mean(view: TermView, node: fx.Node) -> Term | None:
    return _reduction(view, node, "mean", argument(node, 1, "dim", None), argument(node, 2, "keepdim", False))


def read_sum(view: TermView, node: fx.Node) -> Term | None:
    return _reduction(view, node, "sum", argument(node, 1, "dim", None), argument(node, 2, "keepdim", False))


def read_bmm(view: TermView, node: fx.Node) -> Term | None:
    """A product of 2x2 matrices and pairs, written out: what a rotation by matrices is made of."""
    a, b = (view.operand(factor) for factor in node.args)
    if a is None or b is None or not len(a.shape) == len(b.shape) == 3 or not same_size(a.shape[2], 2):
        return None  # of a constant, which has no shape, too
    if not any(same_size(m.shape[1], 2) and same_size(m.shape[2], 2) for m in (a, b)):
        return None
    products = [view.make("mul", slice_term(view, a, 2, k, k + 1), slice_term(view, b, 1, k, k + 1)) for k in (0, 1)]
    return view.make("add", *products)


def _correction(node: fx.Node) -> float:
    value = argument(node, 2, "correction", None)
    return 1 if value is None else value


def read_var(view: TermView, node: fx.Node) -> Term | None:
    dims, keepdim = argument(node, 1, "dim", None), argument(node, 3, "keepdim", False)
    return _reduction(view, node, "var", dims, keepdim, (_correction(node),))


def read_getitem(view: TermView, node: fx.Node) -> Term | None:
    if (source := getitem_source(node)) is None:
        return None
    producer, index = source
    if producer.target in SPLITS:
        return read_split(view, node, producer, index)
    if producer.target is aten.var_mean.correction:
        dims, keepdim = argument(producer, 1, "dim", None), argument(producer, 3, "keepdim", False)
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
    weight = argument(node, 2, "weight", None)
    bias = argument(node, 3, "bias", None) if kind == "layer_norm" else None
    eps = argument(node, 4, "eps", 1e-5) if kind == "layer_norm" else argument(node, 3, "eps", None)
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
    aten.clamp.default: read_clamp,
    aten.clamp_min.default: read_clamp,
    aten.clamp_max.default: read_clamp_max,
    aten.repeat.default: read_repeat,
    prims.convert_element_type.default: read_cast,
    aten._to_copy.default: read_cast,
    aten.to.dtype: read_cast,
    aten.full.default: read_full,
    aten.scalar_tensor.default: read_full,
    aten.mean.dim: read_mean,
    aten.sum.dim_IntList: read_sum,
    aten.bmm.default: read_bmm,
    aten.var.correction: read_var,
    operator.getitem: read_getitem,
    aten.layer_norm.default: read_native_norm,
    aten.rms_norm.default: read_native_norm,
    **RECOMBINE_READERS,
    **VIEW_READERS,
}
