"""Moving a view below arithmetic: ``view(f(a, b))`` becomes ``f(view(a), view(b))``.

Each operand's view is adapted to what that operand broadcasts; a norm is crossed only when its last dim survives.
"""

from __future__ import annotations

import torch

from .terms import Term, TermView, broadcast_shape, same_shape, same_size

ARITHMETIC = ("add", "mul", "neg", "round", "rsqrt", "sqrt", "reciprocal", "pow", "clamp", "double", "from_double")
NORMS = ("layer_norm", "rms_norm")


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
    whole = same_shape(broadcast_shape([m.shape for m in moved]), shape)  # not where all operands were repeated
    return view.make(base.op, *moved, attrs=base.attrs, shape=shape if whole else None)


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
        moved = [d for i, d in enumerate(attrs[1]) if d != i]
        if missing and all(d >= missing for d in moved):
            dims = tuple(d - missing for d in attrs[1][missing:])
            return view.view(arg, ("permute", dims), tuple(arg.shape[d] for d in dims))
        if missing and all(d < missing for d in moved):
            return arg
        for _ in range(missing):  # a weight of each head, and heads that change places with tokens
            arg = view.view(arg, ("unsqueeze", 0), (1, *arg.shape))
        return view.view(arg, attrs, tuple(arg.shape[d] for d in attrs[1]))
    if kind == "reshape":
        shape = _reshaped(arg.shape, before, after)
        return None if shape is None else _unrepeated(view.view(arg, ("reshape",), shape))
    return None


def _unrepeated(term: Term) -> Term:
    """Rows before `repeat_interleave` repeated them in a dim of their own: broadcasting gives the same."""
    copied = term.args[0] if term.op == "view" and term.attrs[0] == "clone" else term
    spread = copied.op == "view" and copied.attrs[0] == "expand" and len(copied.args[0].shape) == len(term.shape)
    return copied.args[0] if spread else term


def _reshaped(operand: tuple, before: tuple, after: tuple) -> tuple | None:
    """Shape of a broadcast operand after ``reshape(before -> after)``: of dims that merge, all or none are 1."""
    if same_shape(operand, before):
        return after
    padded = (1,) * (len(before) - len(operand)) + tuple(operand)
    new: tuple = ()
    for old, made in _groups(before, after):
        part = padded[old]
        if same_shape(part, before[old]):
            new += tuple(after[made])
        elif all(same_size(m, 1) for m in part):
            new += (1,) * len(after[made])
        else:
            return None
    return new


def _groups(before: tuple, after: tuple) -> list[tuple[slice, slice]]:
    """The dims of `before` and of `after` that hold the same elements, in pairs as small as the sizes tell."""
    if not all(isinstance(s, int) for s in (*before, *after)):
        return _ends(before, after)
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        first, second, a, b = i, j, 1, 1
        while True:
            if (a <= b and i < len(before)) or j == len(after):
                a, i = a * before[i], i + 1
            else:
                b, j = b * after[j], j + 1
            if a == b and ((i > first and j > second) or i == len(before) or j == len(after)):
                break
            if i == len(before) and j == len(after):
                break
        groups.append((slice(first, i), slice(second, j)))
    return groups


def _ends(before: tuple, after: tuple) -> list[tuple[slice, slice]]:
    """As `_groups` where sizes are symbols: equal dims at both ends, and what is between them."""
    head = 0
    while head < min(len(before), len(after)) and same_size(before[head], after[head]):
        head += 1
    tail = 0
    while tail < min(len(before), len(after)) - head and same_size(before[-1 - tail], after[-1 - tail]):
        tail += 1
    middle = (slice(head, len(before) - tail), slice(head, len(after) - tail))
    first = [(slice(i, i + 1), slice(i, i + 1)) for i in range(head)]
    last = [tuple(slice(len(s) - t, len(s) - t + 1) for s in (before, after)) for t in range(tail, 0, -1)]
    return [*first, middle, *((old, made) for old, made in last)]
