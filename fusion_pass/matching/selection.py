"""A chain of slices, squeezes, unsqueezes and permutes as one selection from the tensor under it.

    f[..., 0, 1]                 base f, dims 0 to n - 3, element 0 of dim n - 2 and 1 of dim n - 1
    t.movedim(-2, -1)[..., 0]    base t, its dims but n - 2, of which element 0

Two spellings of one selection compare equal, whatever the order of their views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .simplify import slice_term
from .terms import Term, TermView, same_shape, same_size

CHAIN = ("slice", "squeeze", "unsqueeze", "permute")


@dataclass(frozen=True)
class Selection:
    """`dims` are those of `base`, in the order of the selected tensor; None is a dim of size 1 that was inserted."""

    base: Term
    dims: tuple[int | None, ...]
    ranges: dict[int, tuple[Any, Any, int]]  # start, stop and step of the dims of base that were sliced

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(d for d in self.dims if d is not None)

    def index(self, dim: int) -> int | None:
        """i where the selection is element i of `dim`, and `dim` is gone or of size 1."""
        start, stop, step = self.ranges.get(dim, (0, self.base.shape[dim], 1))
        single = isinstance(start, int) and step == 1 and same_size(stop - start, 1)
        return start if single else None

    def without(self, view: TermView, *dims: int) -> Term:
        """`base` with every range applied but those of `dims`."""
        term = self.base
        for dim, (start, stop, step) in self.ranges.items():
            if dim not in dims:
                term = slice_term(view, term, dim, start, stop, step)
        return term


def _adds_ones(term: Term) -> bool:
    """A reshape that only inserts or drops dims of size 1."""
    if term.attrs[0] != "reshape":
        return False
    before, after = ([s for s in shape if not same_size(s, 1)] for shape in (term.args[0].shape, term.shape))
    return same_shape(before, after)


def selection(term: Term) -> Selection:
    """What `term` selects, from the first term below it that is no such view."""
    chain = []
    while term.op == "view" and (term.attrs[0] in CHAIN or _adds_ones(term)):
        chain.append((*term.attrs[:1], term.args[0].shape, term.shape) if term.attrs[0] == "reshape" else term.attrs)
        term = term.args[0]
    dims: list[int | None] = list(range(len(term.shape)))
    ranges: dict[int, tuple[Any, Any, int]] = {}
    for attrs in reversed(chain):
        match attrs[0]:
            case "slice":
                at, start, stop, step = attrs[1:]
                if (dim := dims[at]) is not None:
                    first, _, stride = ranges.get(dim, (0, None, 1))
                    ranges[dim] = (first + start * stride, first + stop * stride, stride * step)
            case "squeeze":
                dims.pop(attrs[1])
            case "unsqueeze":
                dims.insert(attrs[1], None)
            case "permute":
                dims = [dims[d] for d in attrs[1]]
            case "reshape":
                wide = iter([d for d, size in zip(dims, attrs[1], strict=True) if not same_size(size, 1)])
                dims = [None if same_size(size, 1) else next(wide) for size in attrs[2]]
    return Selection(term, tuple(dims), ranges)
