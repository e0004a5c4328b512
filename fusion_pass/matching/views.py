"""Views as terms: one vocabulary for every spelling of a view, read from nodes and emitted as nodes.

    ("slice", dim, start, stop, step)   ("squeeze", dim)   ("unsqueeze", dim)   ("permute", dims)
    ("expand", *shape)   ("reshape", *shape)   ("clone",): a copy whose rows are dense and the source's are not

Dims are non-negative; the shape of the result is the term's. How a view moves below arithmetic is in `push`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compat import statically_known_true
from .simplify import select_term, slice_term
from .terms import Term, TermView, getitem_source, same_shape, same_size

aten = torch.ops.aten


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
    base = _base(view, node)
    if base is None or dense_rows or same_shape(source, out):
        return base
    return view.view(base, ("clone",), _shape(node))


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


def clamped(value: Any, size: Any, default: Any) -> Any:
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
    start, stop = clamped(args[2], size, 0), clamped(args[3], size, size)
    step = args[4] or 1
    if start is None or stop is None or not isinstance(step, int) or not statically_known_true(stop >= start):
        return None
    return slice_term(view, base, dim, start, stop, step)


def read_select(view: TermView, node: fx.Node) -> Term | None:
    base, index = _base(view, node), node.args[2]
    if base is None or not isinstance(index, int):
        return None
    dim = _dim(node)
    if index < 0:
        if not isinstance(base.shape[dim], int):
            return None
        index += base.shape[dim]
    return select_term(view, base, dim, index)


def read_split(view: TermView, node: fx.Node, producer: fx.Node, index: int) -> Term | None:
    """`getitem(split | split_with_sizes | chunk | unbind, index)` as the slice it is."""
    base = _base(view, producer)
    if base is None:
        return None
    if producer.target is aten.unbind.int:
        return select_term(view, base, _dim(producer), index)
    dim = _dim(producer, 2, producer.kwargs.get("dim", 0))
    start: Any = 0
    for sibling in range(index):
        start = start + producer.meta["val"][sibling].shape[dim]
    return slice_term(view, base, dim, start, start + node.meta["val"].shape[dim])


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
        case "clone":
            return aten.clone.default, ()
        case "real":
            return aten.view_as_real.default, ()
        case "expand":
            return aten.expand.default, (list(term.shape),)
    return aten.reshape.default, (list(term.shape),)


def apply(term: Term, value: torch.Tensor) -> torch.Tensor:
    """The ``view`` term `term` of a (fake) tensor."""
    target, args = _call(term)
    return target(value, *args)


def replay(graph: fx.Graph, node: fx.Node, term: Term) -> fx.Node:
    """Insert the view that `term` is over `node`; its ``meta["val"]`` is set from the fake value of `node`."""
    from ..rewriting.symbols import arguments

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
        elif (
            seen.target in VIEW_READERS
            or seen.target is aten.as_strided.default
            or str(seen.target).startswith("aten.split")
        ):
            seen = seen.args[0]
        else:
            return None
    return seen if seen.op == "placeholder" else None
