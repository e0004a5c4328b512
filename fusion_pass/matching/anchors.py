"""The denominator of coverage: places that could be fused, found without asking the rules.

* every norm reduction: `var_mean`, a mean of squares that goes to `rsqrt` or a division, a native norm op;
* every gated residual: ``stream + gate * branch`` with a gate that is broadcast over the tokens, all or those of a
  frame, cut from a bigger tensor, or picked or repeated for every token;
* every rotation of pairs of columns (`rotation_anchors`);
* every modulation without a norm: ``x * (1 + scale) + shift`` with broadcast scale and shift.

Anchors of one value (duplicates that CSE would join) are one anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from . import rotation_anchors, stream_anchors
from .terms import Term, TermView, bare, getitem_source, same_size
from .variances import centred

aten = torch.ops.aten

NATIVE_NORMS = (
    aten.native_layer_norm.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten._fused_rms_norm.default,
    aten.native_group_norm.default,
    aten.group_norm.default,
)
STATISTICS = (aten.var_mean.correction, aten.var.correction)
MEANS = (aten.mean.dim, aten.sum.dim_IntList)
SQUARES = (aten.pow.Tensor_Scalar, aten.square.default, aten.mul.Tensor)
ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default)
ATTENTION = ("scaled_dot_product", "flash_attention", "flash_attn", "attention", "sdpa", "sage")


@dataclass
class Anchor:
    """One site of the denominator, at `node`; `key` is what a match is found by."""

    kind: str  # "norm", "rotation", "gated_residual", "scale_shift"
    node: fx.Node
    key: object


def find(view: TermView) -> list[Anchor]:
    """All anchors of the graph, in graph order."""
    found: dict[object, Anchor] = {}
    rotations = rotation_anchors.find(view)
    rotating = {node for between in rotations.values() for node in between}
    for node in rotations:
        key = ("rotation", view.term(node) or node)
        found.setdefault(key, Anchor("rotation", node, key))
    for node in view.order:
        if node.op != "call_function":
            continue
        anchor = _norm_anchor(view, node)
        if anchor is None and node not in rotating and (stream := stream_anchors.find(view, node)) is not None:
            anchor = Anchor(stream[0], node, ("sum", stream[1]))
        if anchor is not None and anchor.key not in found:
            found[anchor.key] = anchor
    return sorted(found.values(), key=lambda anchor: view.order[anchor.node])


def _norm_anchor(view: TermView, node: fx.Node) -> Anchor | None:
    if node.target in NATIVE_NORMS:
        outs = [u for u in node.users if getitem_source(u) == (node, 0)] or [node]
        return Anchor("norm", node, _norm_below(view, outs[0]) or node)
    if node.target in STATISTICS:
        x = view.term(node.args[0])
        if not node.users:
            return None
        last = x is not None and _over_last_dim(node)
        return Anchor("norm", node, ("var", x, _correction(node)) if last else node)
    if node.target in MEANS and _is_square(node.args[0]) and _reaches_root(node):
        term = view.term(node)
        while term is not None and term.op in ("view", "round"):
            term = term.args[0]
        if term is not None and (var := term if term.op == "var" else _variance_of(view, node)) is not None:
            return Anchor("norm", node, ("var", var.args[0], var.attrs[0]))
        if term is not None and term.op == "sum" and (x := centred(bare(term.args[0]).args[0])) is not None:
            return Anchor("norm", node, ("var", x, 0))
        last = term is not None and term.op in ("mean", "sum")
        return Anchor("norm", node, ("mean", term.args[0]) if term is not None and last else node)
    return None


def _variance_of(view: TermView, node: fx.Node) -> Term | None:
    """The variance that a mean of squares becomes when the square of the mean is subtracted."""
    for user in node.users:
        seen = view.term(user)
        while seen is not None and seen.op in ("view", "round"):
            seen = seen.args[0]
        if seen is not None and seen.op == "var":
            return seen
        if seen is not None and seen.op in ("mean", "sum") and (found := _variance_of(view, user)) is not None:
            return found
    return None


def key_of(view: TermView, norm: Term) -> object:
    """The anchor key of a norm term that a rule matched."""
    reduction = view.reductions[norm]
    if reduction is norm:
        return norm
    if reduction.op == "var":
        return ("var", reduction.args[0], reduction.attrs[0])
    return ("mean", reduction.args[0])


def _norm_below(view: TermView, node: fx.Node) -> Term | None:
    pending: list[Term] = []
    term = view.term(node)
    while term is not None:
        if term.op in ("layer_norm", "rms_norm"):
            return term
        pending.extend(term.args)
        term = pending.pop(0) if pending and term.norm_reach is not None else None
    return None


def _correction(node: fx.Node) -> float:
    value = node.args[2] if len(node.args) > 2 else node.kwargs.get("correction")
    return 1 if value is None else value


def _over_last_dim(node: fx.Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    rank = node.args[0].meta["val"].dim()
    return dims is not None and [d % rank for d in dims] == [rank - 1]


def _is_square(node: object) -> bool:
    """``x**2`` or ``x*x``, through casts."""
    while isinstance(node, fx.Node) and node.target in (
        torch.ops.prims.convert_element_type.default,
        aten._to_copy.default,
    ):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in SQUARES:
        return False
    if node.target is aten.mul.Tensor:
        return node.args[0] is node.args[1]
    return node.target is aten.square.default or node.args[1] == 2


def _reaches_root(node: fx.Node, depth: int = 6) -> bool:
    """A root, a reciprocal or a division by the value follows within a few elementwise ops on the [..., 1] result."""
    for user in node.users:
        if user.target is aten.div.Tensor:
            found = len(user.args) > 1 and user.args[1] is node
        elif user.target is aten.pow.Tensor_Scalar:
            found = user.args[1] < 1
        else:
            found = user.target in ROOTS
        if found:
            return True
        val = user.meta.get("val")
        small = isinstance(val, torch.Tensor) and same_size(val.numel(), node.meta["val"].numel())
        if depth and small and _reaches_root(user, depth - 1):
            return True
    return False


def qk_reductions(view: TermView) -> set[fx.Node]:
    """Norm reductions whose result becomes a query or key: walk up from attention through elementwise ops and views."""
    from .gain import is_elementwise, is_view

    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending: list[fx.Node] = []
    for node in view.order:
        if node.op == "call_function" and any(name in str(node.target) for name in ATTENTION):
            pending += [a for a in node.args[:2] if isinstance(a, fx.Node)]
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target in STATISTICS or node.target in MEANS or node.target in NATIVE_NORMS:
            found.add(node)
        elif is_elementwise(node) or is_view(node) or getitem_source(node) or node.target in CARRIERS:
            pending += node.all_input_nodes
    return found


CARRIERS = (
    aten.cat.default,
    aten.clone.default,
    aten.stack.default,
    aten.slice_scatter.default,
    aten.copy.default,
    aten.view_as_complex.default,
    aten.view_as_real.default,
    aten.constant_pad_nd.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
)
