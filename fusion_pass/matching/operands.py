"""Operands, which are terms, as the nodes and tensors that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .terms import Term, TermView

RESHAPES = ("reshape", "unsqueeze", "squeeze")  # views that keep the order of the elements


def own_node(view: TermView, term: Term) -> fx.Node | None:
    """The node that computes `term`; None where it is read as a view of another one.

    So are views of a cast that only widened: the same view of what was cast has the same values in fewer bytes.
    """
    nodes = view.nodes(term)
    if not nodes or term.op != "view" or nodes[0].meta["val"].dtype == term.precision:
        return nodes[0] if nodes else None
    narrow = view.realizable(term.args[0]) and base_node(view, term.args[0]).meta["val"].dtype == term.precision
    return None if narrow else nodes[0]


def base_node(view: TermView, term: Term) -> fx.Node:
    """The node under the views of an operand."""
    while (node := own_node(view, term)) is None:
        term = term.args[0]
    return node


def computed(view: TermView, term: Term) -> Term:
    """What `term` is a reshape of, where a node computes that; `term` itself otherwise."""
    seen = term
    while seen.op == "view" and seen.attrs[0] in RESHAPES:
        seen = seen.args[0]
    return seen if view.nodes(seen) else term


def fake(view: TermView, term: Term) -> torch.Tensor:
    """The fake value of an operand, its views applied."""
    if (node := own_node(view, term)) is not None:
        return node.meta["val"]
    from .views import apply

    return apply(term, fake(view, term.args[0]))


def text_shape(shape: Any) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"
