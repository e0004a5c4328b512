"""Gates, scales and shifts that are a value of each token or sample plus a row that is the same for all of them.

    mod = scale_shift_table[None, None] + temb.unflatten(2, (6, -1))            [1, 1, 6, D] + [B, N or 1, 6, D]
    shift, scale, gate, ... = mod.unbind(2)

The op takes both addends, so that the sums need not be written to memory: one row for every token and part, or, of
samples, one launch for every part, where Inductor has none, as it adds inside of the norm's kernel. Values are read as
they were before a cast that only widened them. Views of the sum are moved down to the addends: one add for all parts,
or one for each. The sum's own rounding is dropped like those inside of a site; asked to keep it (``roundings=eager``),
a sum that is rounded stays outside, and so does one that must be written all the same, for a reader that Inductor does
not compute it in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dkfuse.kernels.tables import TABLED, table_of

from .gain import CASTS, is_elementwise, is_view
from .operands import base_node, fake
from .pattern import Binding
from .readers import SPLITS
from .rules import Candidate
from .terms import FLOATS, Term, TermView, bare, differ, getitem_source, same_shape, same_size
from .views import is_view_of_input


def resolve(site: Candidate, exact: bool) -> None:
    """Bind both addends in place of each operand of the site that is such a sum. exact: of sums not rounded only."""
    view, binding, shape = site.view, site.binding, site.shape
    terms = _gate_first(site, exact)
    found: dict[str, Term] = {}
    for name in TABLED:
        if name in terms and (parts := addends(view, terms[name], shape, exact)) is not None:
            site.sums[name] = terms[name]
            found[name], found[table_of(name)] = parts
    if found:
        site.binding = Binding({**terms, **found}, binding.numbers, binding.roundings, binding.interior)


def may_stay_whole(site: Candidate) -> bool:
    """Whether a kernel that adds no rows may read the site's sums from memory: not those that have a row per token."""
    return bool(site.sums) and not any(_per_token(total, site.shape) for total in site.sums.values())


def parts(view: TermView, terms: dict[str, Term], shape: tuple) -> Iterator[Term]:
    """The operands of a site, sums taken apart where that is possible."""
    for name, term in terms.items():
        apart = addends(view, term, shape, exact=False) if name in TABLED else None
        yield from (term,) if apart is None else apart


def addends(view: TermView, term: Term, shape: tuple, exact: bool) -> tuple[Term, Term] | None:
    """``(value of each token or sample, row)`` where `term` is their sum and broadcasts to `shape`, or None."""
    if not (_per_token(term, shape) or _is_row(term, shape)):
        return None
    total = view.expose(term)
    if total.op == "round" and not exact:
        total = view.expose(total.args[0])
    if total.op != "add":
        return None
    first, second = total.args
    for own, row in ((first, second), (second, first)):
        if _is_row(row, shape) and _extent(own) >= _extent(row) and _readable(view, own) and _readable(view, row):
            return None if _written_anyway(_origin(base_node(view, term))) else (own, row)
    return None


def _gate_first(site: Candidate, exact: bool) -> dict[str, Term]:
    """The site's operands, gate and branch exchanged where only the branch is such a sum: ``gate * x`` has no order."""
    terms = site.binding.terms
    if "gate" not in terms or terms.keys() & {"branch_norm", "branch_bias"}:
        return terms
    if not same_shape(terms["gate"].shape, site.shape):
        return terms  # a row of its own: the branch is the other one
    gate, x = (addends(site.view, terms[name], site.shape, exact) for name in ("gate", "x"))
    if gate is not None or x is None:
        return terms
    return {**terms, "gate": terms["x"], "x": terms["gate"]}


def has_other_parts(term: Term, shape: tuple) -> bool:
    """A sum of each token in which a tensor of `shape` is one part of several, side by side."""
    if bare(term).op != "add" or len(term.shape) < len(shape):
        return False
    outer = len(shape) - 1
    return same_shape(term.shape[:outer], shape[:outer]) and differ(term.shape, shape)


def _per_token(term: Term, shape: tuple) -> bool:
    """As big as the site, but for leading dims of 1."""
    own = list(term.shape)
    while own and same_size(own[0], 1):
        own.pop(0)
    return 2 <= len(own) <= len(shape) and same_shape(own, shape[-len(own) :])


def _is_row(term: Term, shape: tuple) -> bool:
    """The same for all tokens, one value for each column."""
    own = term.shape
    if term.op == "const" or not own or len(own) > len(shape) or not same_size(own[-1], shape[-1]):
        return False
    return len(own) == 1 or same_size(own[-2], 1)


def _extent(term: Term) -> int:
    """How many dims a term has a value for each element of."""
    return sum(not same_size(size, 1) for size in term.shape)


def _readable(view: TermView, term: Term) -> bool:
    if not view.realizable(term) or fake(view, term).dtype not in FLOATS:
        return False
    source = is_view_of_input(base_node(view, term))
    return source is None or source not in view.written_inputs  # else the sum is what it was before the write


def _origin(node: fx.Node) -> fx.Node:
    """What computes `node`: under views, parts and casts."""
    while True:
        source = getitem_source(node)
        if source is not None and source[0].target in SPLITS:
            node = source[0].args[0]  # type: ignore[assignment]
        elif is_view(node) or node.target in CASTS:
            node = node.args[0]  # type: ignore[assignment]
        else:
            return node


def _written_anyway(total: fx.Node) -> bool:
    """Whether somebody reads the sum who is no pointwise op: those a site does, or Inductor adds where it reads."""
    for user in total.users:
        if is_view(user) or user.target in CASTS or user.target in SPLITS or getitem_source(user) is not None:
            if _written_anyway(user):
                return True
        elif not is_elementwise(user) and not _is_size(user.meta.get("val")):
            return True
    return False


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt))
