"""Views as terms: one vocabulary for every spelling, and how a view moves below arithmetic.

    ("slice", dim, start, stop, step)   ("squeeze", dim)   ("unsqueeze", dim)   ("permute", dims)
    ("expand", *shape)   ("reshape", *shape)

Dims are non-negative; the shape of the result is the term's. `push` rewrites ``view(f(a, b))`` to
``f(view(a), view(b))`` with each operand's view adapted to what that operand broadcasts. `replay` emits a view as
nodes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .compat import statically_known_true
from .terms import Term, TermView, getitem_source, same_shape, same_size

aten = torch.ops.aten

ARITHMETIC = ("add", "mul", "neg", "round", "rsqrt", "sqrt", "reciprocal", "pow")
NORMS = ("layer_norm", "rms_norm")


# -- reading ---------------------------------------------------------------------------------------------------------


def _base(view: TermView, node: fx.Node) -> Term | None:
    """The term of the viewed tensor; None for constants, whose shape a term does not keep."""
    term = view.term(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    return term if term is not None and len(term.shape) == node.args[0].meta["val"].dim() else None


def _shape(node: fx.Node) -> tuple:
    return tuple(node.meta["val"].shape)


def _dim(node: fx.Node, index: int = 1, default: int = 0) -> int:
    dim = node.args[index] if len(node.args) > index else default
    return dim % max(node.args[0].meta["val"].dim(), 1)


def read_same(view: TermView, node: fx.Node) -> Term | None:
    """alias, detach, and a clone that keeps rows dense: kernels read any outer strides, so that copy is not needed."""
    source, out = node.args[0].meta["val"].stride(), node.meta["val"].stride()
    dense_rows = bool(out) and same_size(source[-1], 1) and same_size(out[-1], 1)
    return _base(view, node) if dense_rows or same_shape(source, out) else None


def read_reshape(view: TermView, node: fx.Node) -> Term | None:
    base = _base(view, node)
    return view.view(base, ("reshape",), _shape(node)) if base else None


def read_expand(view: TermView, node: fx.Node) -> Term | None:
    base = _base(view, node)
    return view.view(base, ("expand",), _shape(node)) if base else None


def read_unsqueeze(view: TermView, node: fx.Node) -> Term | None:
    base = _base(view, node)
    if base is None:
        return None
    dim = node.args[1] % (len(base.shape) + 1)
    return view.view(base, ("unsqueeze", dim), _shape(node))


def read_squeeze(view: TermView, node: fx.Node) -> Term | None:
    term = _base(view, node)
    if term is None:
        return None
    rank = len(term.shape)
    dims = node.args[1] if len(node.args) > 1 else range(rank)
    wanted = [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    for dim in sorted((d for d in wanted if same_size(term.shape[d], 1)), reverse=True):
        term = view.view(term, ("squeeze", dim), term.shape[:dim] + term.shape[dim + 1 :])
    return term if len(term.shape) == len(_shape(node)) else None


def read_permute(view: TermView, node: fx.Node) -> Term | None:
    base = _base(view, node)
    if base is None:
        return None
    rank = len(base.shape)
    if node.target is aten.permute.default:
        dims = [d % rank for d in node.args[1]]
    else:
        dims = list(range(rank))
        a, b = (node.args[1] % rank, node.args[2] % rank) if node.target is aten.transpose.int else (0, rank - 1)
        dims[a], dims[b] = dims[b], dims[a]
    return view.view(base, ("permute", tuple(dims)), _shape(node))


def _slice(view: TermView, base: Term, dim: int, start: Any, stop: Any, step: int) -> Term:
    size = base.shape[dim]
    length = (stop - start + step - 1) // step
    shape = (*base.shape[:dim], length, *base.shape[dim + 1 :])
    if same_size(length, size) and step == 1:
        return base
    return view.view(base, ("slice", dim, start, stop, step), shape)


def _clamped(value: Any, size: Any, default: Any) -> Any:
    """A slice bound as a non-negative offset, or None where symbols do not tell."""
    if value is None:
        return default
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, int) and value >= 2**62:
        return size
    if statically_known_true(value < 0):
        value = value + size
    if statically_known_true(value >= size):
        return size
    return value if statically_known_true(value >= 0) and statically_known_true(value <= size) else None


def read_slice(view: TermView, node: fx.Node) -> Term | None:
    base = _base(view, node)
    if base is None:
        return None
    dim = _dim(node)
    args = [*node.args, *(None,) * (5 - len(node.args))]
    size = base.shape[dim]
    start, stop = _clamped(args[2], size, 0), _clamped(args[3], size, size)
    step = args[4] or 1
    if start is None or stop is None or not isinstance(step, int) or not statically_known_true(stop >= start):
        return None
    return _slice(view, base, dim, start, stop, step)


def _select(view: TermView, base: Term, dim: int, index: int) -> Term:
    row = _slice(view, base, dim, index, index + 1, 1)
    return view.view(row, ("squeeze", dim), base.shape[:dim] + base.shape[dim + 1 :])


def read_select(view: TermView, node: fx.Node) -> Term | None:
    base, index = _base(view, node), node.args[2]
    if base is None or not isinstance(index, int):
        return None
    dim = _dim(node)
    if index < 0:
        if not isinstance(base.shape[dim], int):
            return None
        index += base.shape[dim]
    return _select(view, base, dim, index)


def read_split(view: TermView, node: fx.Node, producer: fx.Node, index: int) -> Term | None:
    """`getitem(split | split_with_sizes | chunk | unbind, index)` as the slice it is."""
    base = _base(view, producer)
    if base is None:
        return None
    if producer.target is aten.unbind.int:
        return _select(view, base, _dim(producer), index)
    dim = _dim(producer, 2, producer.kwargs.get("dim", 0))
    start: Any = 0
    for sibling in range(index):
        start = start + producer.meta["val"][sibling].shape[dim]
    return _slice(view, base, dim, start, start + node.meta["val"].shape[dim], 1)


def read_cat(view: TermView, node: fx.Node) -> Term | None:
    """``cat([h[:, :t], h[:, t:]], 1)`` is h: blocks that split the stream and join it again."""
    parts = [term for a in node.args[0] if (term := view.term(a)) is not None]
    shape = _shape(node)
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % max(len(shape), 1)
    if len(parts) < len(node.args[0]) or any(p.op != "view" or p.attrs[:2] != ("slice", dim) for p in parts):
        return None
    base: Term = parts[0].args[0]
    at: Any = 0
    for p in parts:
        if p.args[0] is not base or p.attrs[4] != 1 or not same_size(p.attrs[2], at):
            return None
        at = p.attrs[3]
    return base if same_size(at, base.shape[dim]) and same_shape(base.shape, shape) else None


VIEW_READERS = {
    aten.reshape.default: read_reshape,
    aten.view.default: read_reshape,
    aten._unsafe_view.default: read_reshape,
    aten.expand.default: read_expand,
    aten.unsqueeze.default: read_unsqueeze,
    aten.squeeze.default: read_squeeze,
    aten.squeeze.dim: read_squeeze,
    aten.squeeze.dims: read_squeeze,
    aten.permute.default: read_permute,
    aten.transpose.int: read_permute,
    aten.t.default: read_permute,
    aten.slice.Tensor: read_slice,
    aten.select.int: read_select,
    aten.alias.default: read_same,
    aten.detach.default: read_same,
    aten.clone.default: read_same,
    aten.lift_fresh_copy.default: read_same,
}


# -- moving views below arithmetic -----------------------------------------------------------------------------------


def push(view: TermView, attrs: tuple, base: Term, shape: tuple) -> Term | None:
    """``f(view(a), view(b))`` for ``view(f(a, b))``, or None when the view cannot pass."""
    if base.op in NORMS:
        if not _last_dim_survives(attrs, base.shape, shape):
            return None
    elif base.op not in ARITHMETIC:
        return None
    moved = []
    for arg in base.args:
        operand = adapt(view, attrs, arg, base.shape, shape)
        if operand is None:
            return None
        moved.append(operand)
    if base.op in NORMS:
        term = view.intern(base.op, tuple(moved), base.attrs, shape, torch.float32)
        view.reductions.setdefault(term, view.reductions[base])
        view.statistics_dtype.setdefault(term, view.statistics_dtype[base])
        return term
    if base.op == "round":
        return view.round(moved[0], base.attrs[0])
    return view.make(base.op, *moved, attrs=base.attrs, shape=shape)


def _last_dim_survives(attrs: tuple, before: tuple, after: tuple) -> bool:
    last = len(before) - 1
    match attrs[0]:
        case "unsqueeze":
            return attrs[1] <= last
        case "squeeze" | "slice":
            return attrs[1] != last
        case "permute":
            return attrs[1][-1] == last
    return bool(after) and same_size(before[-1], after[-1])


def adapt(view: TermView, attrs: tuple, arg: Term, before: tuple, after: tuple) -> Term | None:
    """The view of one operand that yields what it contributes to ``view(f(...))``."""
    missing = len(before) - len(arg.shape)
    if arg.op == "const" or not arg.shape:
        return arg
    kind = attrs[0]
    if kind == "expand":
        return arg if len(after) == len(before) and same_size(before[-1], after[-1]) else None
    if kind in ("unsqueeze", "squeeze", "slice"):
        dim = attrs[1] - missing
        if kind == "unsqueeze":
            if dim <= 0 and missing:
                return arg
            return view.view(arg, ("unsqueeze", dim), (*arg.shape[:dim], 1, *arg.shape[dim:]))
        if dim < 0:
            return arg
        if kind == "squeeze":
            return view.view(arg, ("squeeze", dim), arg.shape[:dim] + arg.shape[dim + 1 :])
        if same_size(arg.shape[dim], 1) and not same_size(before[dim + missing], 1):
            return arg
        return view.view(arg, ("slice", dim, *attrs[2:]), (*arg.shape[:dim], after[attrs[1]], *arg.shape[dim + 1 :]))
    if kind == "permute":
        if not missing:
            return view.view(arg, attrs, tuple(arg.shape[d] for d in attrs[1]))
        moved = [d for i, d in enumerate(attrs[1]) if d != i]
        return arg if all(d < missing for d in moved) else None
    if kind == "reshape":
        shape = _reshaped(arg.shape, before, after)
        return None if shape is None else view.view(arg, ("reshape",), shape)
    return None


def _reshaped(operand: tuple, before: tuple, after: tuple) -> tuple | None:
    """Shape of a broadcast operand after ``reshape(before -> after)``: dims that differ must be all there or all 1."""
    if same_shape(operand, before):
        return after
    padded = (1,) * (len(before) - len(operand)) + tuple(operand)
    head = 0
    while head < min(len(before), len(after)) and same_size(before[head], after[head]):
        head += 1
    tail = 0
    while tail < min(len(before), len(after)) - head and same_size(before[-1 - tail], after[-1 - tail]):
        tail += 1
    middle = padded[head : len(padded) - tail]
    if all(same_size(m, 1) for m in middle):
        new: tuple = (1,) * (len(after) - head - tail)
    elif same_shape(middle, before[head : len(before) - tail]):
        new = after[head : len(after) - tail]
    else:
        return None
    return padded[:head] + new + (padded[len(padded) - tail :] if tail else ())


# -- emitting --------------------------------------------------------------------------------------------------------


def _call(term: Term) -> tuple[Any, tuple]:
    """The ATen op and arguments (after the tensor) that compute a ``view`` term."""
    attrs = term.attrs
    match attrs[0]:
        case "slice":
            return aten.slice.Tensor, attrs[1:]
        case "squeeze":
            return aten.squeeze.dim, attrs[1:]
        case "unsqueeze":
            return aten.unsqueeze.default, attrs[1:]
        case "permute":
            return aten.permute.default, (list(attrs[1]),)
        case "expand":
            return aten.expand.default, (list(term.shape),)
    return aten.reshape.default, (list(term.shape),)


def apply(term: Term, value: torch.Tensor) -> torch.Tensor:
    """The ``view`` term `term` of a (fake) tensor."""
    target, args = _call(term)
    return target(value, *args)


def replay(graph: fx.Graph, node: fx.Node, term: Term) -> fx.Node:
    """Insert the view that `term` is over `node`; its ``meta["val"]`` is set from the fake value of `node`."""
    from .symbols import arguments

    target, args = _call(term)
    out = graph.call_function(target, (node, *arguments(graph, args, [node])))
    out.meta["val"] = apply(term, node.meta["val"])
    return out


def is_view_of_input(node: fx.Node) -> fx.Node | None:
    """The placeholder that `node` is a view of, or None."""
    seen = node
    while seen.op == "call_function":
        if (source := getitem_source(seen)) is not None:
            seen = source[0]
        elif seen.target in VIEW_READERS or seen.target is aten.as_strided.default or "split" in str(seen.target):
            seen = seen.args[0]
        else:
            return None
    return seen if seen.op == "placeholder" else None
