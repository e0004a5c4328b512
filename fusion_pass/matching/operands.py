"""Operands, which are terms, as the nodes and tensors that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .terms import Term, TermView

RESHAPES = ("reshape", "unsqueeze", "squeeze")  # views that keep the order of the elements


def base_node(view: TermView, term: Term) -> fx.Node:
    """The node under the views of an operand."""
    while not view.nodes(term):
        term = term.args[0]
    return view.nodes(term)[0]


def computed(view: TermView, term: Term) -> Term:
    """What `term` is a reshape of, where a node computes that; `term` itself otherwise."""
    seen = term
    while seen.op == "view" and seen.attrs[0] in RESHAPES:
        seen = seen.args[0]
    return seen if view.nodes(seen) else term


def fake(view: TermView, term: Term) -> torch.Tensor:
    """The fake value of an operand, its views applied."""
    if nodes := view.nodes(term):
        return nodes[0].meta["val"]
    from .views import apply

    return apply(term, fake(view, term.args[0]))


def text_shape(shape: Any) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"
