"""The simplest form of a view of a term, or None: what lets two spellings of one slice be one term.

any view that changes nothing                          the base
reshape of reshape                                     one reshape, and a slice if there was one in between
unsqueeze of squeeze, squeeze of unsqueeze             the base
slice of cat, along its dim                            the part, or a slice of it; also where its dims were exchanged
slice of a copy (``repeat_interleave`` makes one)      slice of what was copied
one of several tensors that were stacked               that tensor
slice of an expanded dim                               the dim of size 1 that was expanded
"""

from __future__ import annotations

import math
from typing import Any

from ..compat import statically_known_true
from .terms import Term, TermView, bare, same_shape, same_size


def simplify(view: TermView, base: Term, attrs: tuple, shape: tuple) -> Term | None:
    """`base` seen through the view `attrs`, where that is a simpler term than a view of `base`."""
    kind = attrs[0]
    if same_shape(shape, base.shape) and _changes_nothing(attrs, len(shape)):
        return base
    inner = base.args[0] if base.op == "view" else None
    if inner is not None:
        if kind == "reshape" and base.attrs[0] == "reshape":
            return view.view(inner, attrs, shape)
        if kind == "reshape" and (sliced := _slice_behind(view, base, shape)) is not None:
            return sliced
        if (kind, base.attrs[0]) in (("unsqueeze", "squeeze"), ("squeeze", "unsqueeze")) and attrs[1] == base.attrs[1]:
            return inner
        if kind == "slice" and base.attrs[0] == "clone" and inner.op == "view" and inner.attrs[0] == "expand":
            return view.view(inner, attrs, shape)
        if kind == "slice" and base.attrs[0] == "expand" and len(inner.shape) == len(base.shape):
            dim = attrs[1]
            if same_size(inner.shape[dim], 1) and same_size(shape[dim], 1):
                rest = (*base.shape[:dim], 1, *base.shape[dim + 1 :])
                return view.view(inner, ("expand",), rest)
    if kind == "slice" and inner is not None and inner.op == "cat" and base.attrs[0] == "reshape":
        return _part_of_stack(view, inner, base, attrs, shape)
    if kind == "slice" and inner is not None and base.attrs[0] in ("permute", "clone"):
        return _slice_of_moved(view, base, attrs, shape)
    if kind == "slice" and base.op == "cat" and base.attrs[0] == attrs[1] and attrs[4] == 1:
        return _slice_of_cat(view, base, attrs[1], attrs[2], attrs[3])
    return None


def _changes_nothing(attrs: tuple, rank: int) -> bool:
    match attrs[0]:
        case "expand" | "reshape":
            return True
        case "slice":
            return attrs[2] == 0 and attrs[4] == 1
        case "permute":
            return attrs[1] == tuple(range(rank))
    return False


def _part_of_stack(view: TermView, cat: Term, parts: Term, attrs: tuple, shape: tuple) -> Term | None:
    """Part `i` of k parts of one size that were joined along `dim` and are seen as [..., k, size, ...]."""
    dim, i = attrs[1:3]
    if cat.attrs != (dim,) or not same_size(shape[dim], 1) or not isinstance(i, int):
        return None
    size = cat.args[0].shape[dim]
    apart = (*cat.shape[:dim], len(cat.args), size, *cat.shape[dim + 1 :])
    if not same_shape(parts.shape, apart) or not all(same_size(part.shape[dim], size) for part in cat.args):
        return None
    return unsqueeze_term(view, cat.args[i], dim)


def _slice_of_cat(view: TermView, cat: Term, dim: int, start: Any, stop: Any) -> Term | None:
    """Rows [start, stop) of a cat as (slices of) its parts; None where symbols do not tell which."""
    at: Any = 0
    found: list[Term] = []
    for part in cat.args:
        end = at + part.shape[dim]
        if statically_known_true(stop <= at) or statically_known_true(start >= end):
            at = end
            continue
        first = 0 if statically_known_true(start <= at) else start - at
        last = part.shape[dim] if statically_known_true(stop >= end) else stop - at
        known = statically_known_true(first >= 0) and statically_known_true(last <= part.shape[dim])
        if not known or not statically_known_true(first < last):
            return None
        found.append(slice_term(view, part, dim, first, last))
        at = end
    return cat_terms(view, found, dim) if found else None


def _slice_of_moved(view: TermView, moved: Term, attrs: tuple, shape: tuple) -> Term | None:
    """A slice of a result whose dims were exchanged, and that was perhaps copied then; of a cat along its dim."""
    seen = moved.args[0] if moved.attrs[0] == "clone" else moved
    if seen.op != "view" or seen.attrs[0] != "permute":
        return None
    if seen is not moved and bare(seen.args[0]).op in ("add", "mul", "neg"):
        return view.view(seen, attrs, shape)
    if seen.args[0].op != "cat":
        return None
    cat, dims, (dim, start, stop, step) = seen.args[0], seen.attrs[1], attrs[1:]
    if dims[dim] != cat.attrs[0] or step != 1:
        return None
    part = _slice_of_cat(view, cat, dims[dim], start, stop)
    return None if part is None else view.view(part, ("permute", dims), shape)


def _slice_behind(view: TermView, sliced: Term, shape: tuple) -> Term | None:
    """A reshape of a slice of a reshape as a slice of one reshape, where the last one leaves the sliced dim alone."""
    reshaped = sliced.args[0]
    if sliced.attrs[0] != "slice" or reshaped.op != "view" or reshaped.attrs[0] != "reshape":
        return None
    dim, size = sliced.attrs[1], sliced.shape[sliced.attrs[1]]
    if not all(isinstance(s, int) for s in (*reshaped.shape, *shape)):
        return None
    before = math.prod(reshaped.shape[:dim])
    places = [d for d in range(len(shape) + 1) if math.prod(shape[:d]) == before]
    own = [d for d in places if d < len(shape) and shape[d] == size]
    if not own and (size != 1 or not places):
        return None
    at, gone = (own[-1], False) if own else (places[-1], True)  # gone: the reshape drops the element's dim
    inner, rest = shape[:at], shape[at:] if gone else shape[at + 1 :]
    whole = view.view(reshaped.args[0], ("reshape",), (*inner, reshaped.shape[dim], *rest))
    part = view.view(whole, ("slice", at, *sliced.attrs[2:]), (*inner, size, *rest))
    return view.view(part, ("squeeze", at), shape) if gone else part


def slice_term(view: TermView, base: Term, dim: int, start: Any, stop: Any, step: int = 1) -> Term:
    """``base[start:stop:step]`` along `dim`, bounds in range."""
    size = base.shape[dim]
    length = (stop - start + step - 1) // step
    if same_size(length, size) and step == 1:
        return base
    shape = (*base.shape[:dim], length, *base.shape[dim + 1 :])
    return view.view(base, ("slice", dim, start, stop, step), shape)


def select_term(view: TermView, base: Term, dim: int, index: int) -> Term:
    """``base[index]`` along `dim`."""
    row = slice_term(view, base, dim, index, index + 1)
    return view.view(row, ("squeeze", dim), base.shape[:dim] + base.shape[dim + 1 :])


def unsqueeze_term(view: TermView, base: Term, dim: int) -> Term:
    return view.view(base, ("unsqueeze", dim), (*base.shape[:dim], 1, *base.shape[dim:]))


def cat_terms(view: TermView, parts: list[Term], dim: int) -> Term:
    """The parts one after the other along `dim`; slices that split a tensor and join it again are the tensor."""
    if len(parts) == 1:
        return parts[0]
    if (whole := _rejoined(parts, dim)) is not None:
        return whole
    flat = [inner for p in parts for inner in (p.args if p.op == "cat" and p.attrs == (dim,) else (p,))]
    length: Any = 0
    for p in flat:
        length = length + p.shape[dim]
    shape = (*flat[0].shape[:dim], length, *flat[0].shape[dim + 1 :])
    return view.make("cat", *flat, attrs=(dim,), shape=shape)


def _rejoined(parts: list[Term], dim: int) -> Term | None:
    """``cat([h[:, :t], h[:, t:]], 1)`` is h: blocks that split the stream and join it again."""
    if any(p.op != "view" or p.attrs[:2] != ("slice", dim) for p in parts):
        return None
    base: Term = parts[0].args[0]
    at: Any = 0
    for p in parts:
        if p.args[0] is not base or p.attrs[4] != 1 or not same_size(p.attrs[2], at):
            return None
        at = p.attrs[3]
    return base if same_size(at, base.shape[dim]) else None
