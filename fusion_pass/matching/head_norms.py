"""The norms of queries and keys: of each head, or of all heads of a token, seen through the split into heads.

norm(x) * (weight_offset + weight) + bias
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from dkfuse.patterns.modulate import affine

from .pattern import Binding, Var
from .push import adapt
from .terms import Term, TermView, same_size


def is_weight(term: Term) -> bool:
    """A value for each column, or for each column of each head, whichever dim the heads are."""
    wide = [s for s in term.shape[:-1] if not same_size(s, 1)]
    return len(term.shape) > 0 and len(wide) < 2 and not same_size(term.shape[-1], 1)


NORMED = affine(Var("x"), is_weight)


@dataclass(frozen=True)
class Normed:
    """``norm(x) * (weight_offset + weight) + bias`` with x as the op reads it; `across` is the dim of the heads."""

    term: Term  # the norm
    x: Term
    weight: Term | None
    bias: Term | None
    weight_offset: float
    across: int | None
    roundings: dict[str, torch.dtype] = field(default_factory=dict)


def norm_of(view: TermView, value: Term) -> Normed | None:
    """The norm that computes `value`; None where there is none."""
    for binding in NORMED.match(view, value, Binding()):
        return _bound(binding)
    views: list[Term] = []
    seen = value
    while seen.op == "view":
        views.append(seen)
        seen = seen.args[0]
        for binding in NORMED.match(view, seen, Binding()):
            return _across(view, _bound(binding), views[::-1])
    return None


def _bound(binding: Binding) -> Normed:
    terms = binding.terms
    offset = binding.numbers.get("weight_offset", 0.0)
    return Normed(
        terms["norm"], terms["x"], terms.get("weight"), terms.get("bias"), offset, None, dict(binding.roundings)
    )


def _across(view: TermView, norm: Normed, views: list[Term]) -> Normed | None:
    """A norm over [..., H*d] whose result is then seen as [..., H, d]: its operands through the same views."""
    probe = view.intern("probe", (), (norm.term.shape[-1],), (norm.term.shape[-1],), torch.float32)
    terms: dict[str, Term] = {"x": norm.x, "probe": probe}
    terms.update((name, t) for name, t in (("weight", norm.weight), ("bias", norm.bias)) if t is not None)
    for seen in views:
        before = seen.args[0].shape
        for name, operand in list(terms.items()):
            if (moved := adapt(view, seen.attrs, operand, before, seen.shape)) is None:
                return None
            terms[name] = moved
    shape = views[-1].shape
    spread = terms["probe"].shape
    dims = [len(shape) - len(spread) + i for i, size in enumerate(spread) if not same_size(size, 1)]
    if len(terms["x"].shape) != len(shape) or len(dims) != 2 or dims[-1] != len(shape) - 1:
        return None
    return replace(norm, x=terms["x"], weight=terms.get("weight"), bias=terms.get("bias"), across=dims[0])


def by_rows(norm: Normed, dim: int, rank: int) -> bool:
    """Whether the norm of a part of the rows along `dim` is that part of the norm of them all."""
    operands = [t for t in (norm.weight, norm.bias) if t is not None]
    flat = all(len(t.shape) < rank - dim or same_size(t.shape[dim - rank], 1) for t in operands)
    return flat and dim not in (norm.across, rank - 1)
