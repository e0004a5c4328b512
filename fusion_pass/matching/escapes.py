"""What a site computes, and whether anybody else reads it.

A node inside a site goes with it, so nothing outside may read it, but for row parameters, which are cheap to compute
twice, and readers that die with the site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator

import torch
from torch import fx

from .operands import base_node, computed
from .rules import Candidate, Code, Reject
from .terms import Term, TermView, bare, same_shape, same_size


def collect_interior(site: Candidate) -> None:
    """Every node whose work the op takes over, roots excluded: the terms walked, and the inside of each norm."""
    view, stop = site.view, set(site.binding.terms.values()) - {site.norm, site.branch_norm}
    for walked in site.binding.interior:
        if walked not in stop and all(walked is not out for out in site.outputs.values()):
            site.interior.update(view.nodes(walked))
    below: set[fx.Node] = set()
    for operand in (site.binding.terms.get("x"), site.binding.terms.get("sum")):
        below.update(view.nodes(operand) if operand is not None else ())
    for norm in (t for t in site.binding.interior if t.op in ("layer_norm", "rms_norm")):
        pending = list(view.nodes(norm))
        while pending:
            for source in pending.pop().all_input_nodes:
                term = view.term(source)
                inside = term is None or (term is not norm.args[0] and term.op != "leaf" and term not in stop)
                if inside and source.op == "call_function" and source not in site.interior and source not in below:
                    if term is not None and _below_norm_input(term, norm.args[0]):
                        continue
                    site.interior.add(source)
                    pending.append(source)
    site.interior -= site.roots
    site.interior -= {node for node in site.interior if _shared_factor(site, node)}


def _shared_factor(site: Candidate, node: fx.Node) -> bool:
    """``1 + scale`` in full size that other sites read too: the op adds the number itself."""
    term = site.view.term(node)
    term = None if term is None else bare(term)
    if term is None or term.op != "add" or term.args[0].op != "const" or not same_shape(term.shape, site.shape):
        return False
    ours = site.interior | site.roots
    return term.args[1] in (*site.operands.values(), *site.picked) and any(user not in ours for user in node.users)


def _below_norm_input(term: Term, norm_input: Term) -> bool:
    """`term` is part of what the norm reads rather than of the norm."""
    seen = norm_input
    while seen.op in ("round", "view"):
        seen = seen.args[0]
        if seen is term:
            return True
    return False


def served(
    view: TermView, node: fx.Node, mine: Callable[[fx.Node], bool], last: int, kept: Container[fx.Node] = ()
) -> bool:
    """The site computes `node`, or all its readers (``n * s`` of ``n + n * s``): dead code once the site is replaced.

    `mine` says what the site computes, up to the node of order `last`; what is in `kept` is read by the op itself.
    """
    if mine(node):
        return True
    if node.op != "call_function" or node.is_impure() or node in kept:
        return False
    return not node.users or (
        view.order[node] <= last and all(served(view, user, mine, last, kept) for user in node.users)
    )


def _readers(view: TermView, node: fx.Node, reshaped: Container[Term]) -> Iterator[fx.Node]:
    """Users of a sum, and those of what is only a reshape of it."""
    for user in node.users:
        if view.term(user) in reshaped:
            yield from _readers(view, user, reshaped)
        else:
            yield user


def _has_rows(view: TermView, node: fx.Node, shape: tuple) -> bool:
    """Whether `node` has all elements of the site, in any shape, or belongs to a norm of more tokens than it has."""
    value, term = node.meta["val"], view.term(node)
    size, whole = value.numel(), math.prod(shape)
    if same_size(size, whole):
        return True
    if not (isinstance(size, int) and isinstance(whole, int) and value.shape) or size <= whole:
        return False
    return same_size(value.shape[-1], shape[-1]) and (term is None or term.norm_reach is not None)


def check_escapes(site: Candidate) -> None:
    """Raise Reject where a value inside the site is read outside of it; a sum that is becomes a result."""
    view = site.view
    roots = site.roots
    if "sum" in site.binding.terms:
        total = site.binding.terms["sum"]
        own = set(view.nodes(total))
        reshaped = {t for t in site.binding.interior if t is not total and computed(view, t) is total}
        site.interior -= own | {node for t in reshaped for node in view.nodes(t)}
        inside = site.interior | roots | own
        if any(user not in inside for node in own for user in _readers(view, node, reshaped)):
            site.outputs["sum"] = total
    owned = site.interior | roots | set(view.nodes(site.binding.terms["sum"]) if "sum" in site.binding.terms else ())
    last = max(view.order[node] for node in owned)
    operands = {base_node(view, term): name for name, term in site.operands.items()}

    for node in site.interior:
        val = node.meta.get("val")
        full = isinstance(val, torch.Tensor) and _has_rows(view, node, site.shape)
        statistic = view.term(node) is None or (bool(val.shape) and same_size(val.shape[-1], 1) and val.dim() > 1)
        if not (full or statistic):
            continue  # a row parameter such as 1 + scale: cheap to compute twice
        if node in operands:
            text = f"{node.name} ({node.target}) is computed inside the site and is its {operands[node]} too"
            raise Reject(Code.ESCAPES, text)
        for user in node.users:
            if not served(view, user, owned.__contains__, last, operands):
                raise Reject(Code.ESCAPES, f"{node.name} ({node.target}) inside the site is also read by {user.name}")
