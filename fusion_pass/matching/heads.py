"""Queries and keys on their way into attention: norms, rotations and the joint tensor of several streams, as one site.

    part  = rotate(norm(x) * w + b)        each step optional, x a stream's projection
          | norm(rotate(x)) * w + b        norm_last
    value = cat([part, ...], dim)          one part, or text and image

`parse` reads a value as its parts, wherever the model put the cat: before the norm, between norm and rotation, behind
the rotation, or as a write into a slice of the joint tensor; a norm of a joint tensor with a rotation in it is one of
each part. A norm over all heads that stands before the split into heads is seen through the split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from . import rotation
from .head_norms import Normed, by_rows, norm_of
from .rotation import NotARotation, Rotation, Tables
from .simplify import slice_term, unsqueeze_term
from .terms import Term, TermView, same_size

LONGEST_HEAD = 512


@dataclass(frozen=True)
class Part:
    """One stream: `value` is what reaches the joint tensor, `x` the tensor that the op reads."""

    value: Term
    x: Term
    norm: Normed | None = None
    rotation: Rotation | None = None
    norm_last: bool = False  # the norm is behind the rotation


@dataclass(frozen=True)
class Heads:
    """A value made of `parts`, joined along `dim` where there are several."""

    parts: tuple[Part, ...]
    dim: int | None = None


def parse(view: TermView, term: Term, norms: bool = True, below: bool = True) -> Heads | None:
    """`term` as normed and rotated parts; None where nothing is normed or rotated.

    `norms` False leaves the norms out: their results are what is rotated; `below` False the rotations below a norm.
    """
    if term.op == "view" and term.attrs[0] != "reshape":
        return None  # a view of a site, not a site
    joined = None if term.op == "view" else _cat_parts(view, term.args[0] if term.op == "round" else term)
    pieces = joined[1] if joined is not None else [term]
    along = joined[0] if joined is not None else None
    parts = [p for piece in pieces for p in _parts(view, piece, along, norms)]
    if below:
        parts = [p for part in parts for p in _rotated_below(view, part, along)]
    if len(parts) == 1 and term.op == "view" and parts[0].rotation is None:
        return None
    if all(p.rotation is None and (p.norm is None or not is_head(p.norm.term)) for p in parts):
        return None
    dim = joined[0] if joined is not None else _own_dim(parts, term)
    return Heads(tuple(parts), dim)


def is_head(norm: Term) -> bool:
    """A norm of one head: short rows, several to a program. Longer ones are norms like any other."""
    return not isinstance(norm.shape[-1], int) or norm.shape[-1] <= LONGEST_HEAD


def _own_dim(parts: list[Part], term: Term) -> int | None:
    """The dim along which the parts of one rotated joint tensor follow each other."""
    if len(parts) == 1:
        return None
    return next(d for d in range(len(term.shape)) if not same_size(parts[0].value.shape[d], term.shape[d]))


def _cat_parts(view: TermView, term: Term) -> tuple[int, list[Term]] | None:
    """``(dim, parts)`` of a joint tensor, also of one that was transposed or split into heads after the cat."""
    seen = term
    if seen.op == "cat":
        dim = seen.attrs[0]
        return (dim, list(seen.args)) if dim != len(seen.shape) - 1 else None
    if seen.op != "view" or seen.attrs[0] not in ("permute", "reshape"):
        return None
    inner = _cat_parts(view, seen.args[0])
    if inner is None:
        return None
    dim, parts = inner
    if seen.attrs[0] == "permute":
        dims = seen.attrs[1]
        return dims.index(dim), [view.view(p, seen.attrs, tuple(p.shape[d] for d in dims)) for p in parts]
    before, after = seen.args[0].shape, seen.shape
    kept = len(after) > dim and all(same_size(a, b) for a, b in zip(before[: dim + 1], after[: dim + 1], strict=True))
    if not kept:
        return None
    return dim, [view.view(p, ("reshape",), (*p.shape[: dim + 1], *after[dim + 1 :])) for p in parts]


def _parts(view: TermView, value: Term, dim: int | None, norms: bool) -> list[Part]:
    """One part, or those of a rotated joint tensor that the rotation is applied to as a whole."""
    found = _rotation(view, value)
    if found is None:
        return [_normed(view, Part(value, value), norms)]
    joined = _cat_parts(view, found.x) if dim is None else None
    if joined is None:
        return [_normed(view, Part(value, found.x, rotation=found), norms)]
    along, streams = joined
    parts, at = [], 0
    for stream in streams:
        end = at + stream.shape[along]
        own = replace(found, x=stream, tables=_cut(view, found.tables, along, at, end, value.shape))
        rows = slice_term(view, value, along, at, end)
        parts.append(_normed(view, Part(rows, stream, rotation=own), norms))
        at = end
    return parts


def _rotated_below(view: TermView, part: Part, dim: int | None) -> list[Part]:
    """A part that is normed and not rotated with the rotation that made the norm's x; `part` itself without one."""
    norm = part.norm
    if norm is None or part.rotation is not None:
        return [part]
    joined = _cat_parts(view, part.x) if dim is None else None
    pieces = [part.x] if joined is None else joined[1]
    try:
        found = [p for piece in pieces for p in _parts(view, piece, dim if joined is None else joined[0], False)]
    except NotARotation:
        return [part]  # its own attempt says why
    if all(p.rotation is None for p in found):
        return [part]
    if len(found) == 1:
        return [replace(part, x=found[0].x, rotation=found[0].rotation, norm_last=True)]
    rank = len(part.x.shape)
    along = next((d for d in range(rank) if not same_size(found[0].value.shape[d], part.x.shape[d])), rank - 1)
    if not by_rows(norm, along, rank):
        return [part]
    parts, at = [], 0
    for p in found:
        end = at + p.value.shape[along]
        rows = slice_term(view, part.value, along, at, end)
        parts.append(Part(rows, p.x, norm, p.rotation, p.rotation is not None))
        at = end
    return parts


def _rotation(view: TermView, value: Term) -> Rotation | None:
    """The rotation that made `value`, also where heads and tokens were exchanged after it."""
    found = rotation.match(view, value)
    if found is not None or value.op != "view" or value.attrs[0] != "permute":
        return found
    dims, rank = value.attrs[1], len(value.shape)
    inner = _rotation(view, value.args[0]) if dims[-1] == rank - 1 else None
    if inner is None:
        return None

    def permuted(term: Term | None) -> Term | None:
        while term is not None and len(term.shape) < rank:
            term = unsqueeze_term(view, term, 0)
        return None if term is None else view.view(term, value.attrs, tuple(term.shape[d] for d in dims))

    x, cos = permuted(inner.x), permuted(inner.tables.cos)
    assert x is not None and cos is not None
    return replace(inner, x=x, tables=Tables(inner.tables.form, cos, permuted(inner.tables.sin)))


def _cut(view: TermView, tables: Tables, dim: int, start: Any, stop: Any, shape: tuple) -> Tables:
    """The rows of `tables` for the rows [start, stop) of the joint tensor of `shape`."""

    def cut(table: Term | None) -> Term | None:
        at = dim - (len(shape) - len(table.shape)) if table is not None else -1
        if table is None or at < 0 or same_size(table.shape[at], 1):
            return table
        return slice_term(view, table, at, start, stop)

    cos = cut(tables.cos)
    assert cos is not None
    return Tables(tables.form, cos, cut(tables.sin))


def _normed(view: TermView, part: Part, norms: bool) -> Part:
    """`part` with the norm that made its x, if there is one."""
    found = norm_of(view, part.x) if norms else None
    return part if found is None else Part(part.value, found.x, found, part.rotation)
