"""Finding the sites of queries and keys: values between a norm or rotation and attention, widest first.

The seeds are the rotations of the graph and the norms that attention reads. Every value that elementwise ops, views and
recombinations make of them is tried as a root, from the last one up, so that a joint tensor comes before its parts.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx

from dkfuse.patterns.heads import ROPE

from ..choosing import choose
from . import anchors, heads
from .cycles import check_cycles
from .gain import is_elementwise, is_view, only_read_in, readers, through_views, traffic
from .head_site import HeadSite, build, rule_of
from .operands import base_node
from .rotation import NotARotation
from .rules import Code, Reject, Rule, Stage
from .terms import Term, getitem_source

if TYPE_CHECKING:
    from ..planner import Planner, State


aten = torch.ops.aten


def match(planner: Planner) -> None:
    """Take every site of queries and keys; reasons go to the anchors that a failed attempt was about."""
    view = planner.view
    seeds = [s.anchor.node for s in planner.states.values() if s.anchor.kind == "rotation"]
    seeds += [s.anchor.node for s in planner.states.values() if s.anchor.node in planner.queries]
    inside = _reached(seeds)
    tried: set[Term] = set()
    for node in sorted(inside, key=view.order.__getitem__, reverse=True):
        term = view.term(node)
        if term is None or term in tried or node in planner.claimed:
            continue
        tried.add(term)
        _try(planner, term)
    for state in planner.states.values():
        width = _columns(state.anchor.node) if state.anchor.kind == "rotation" else 0
        if not isinstance(width, int):
            _record(state, Reject(Code.SYMBOLIC, f"the row length {width} is not a known number"), ROPE)


def _columns(node: fx.Node) -> object:
    shape = node.meta["val"].shape
    return shape[-1] if len(shape) else 0


def _reached(seeds: list[fx.Node]) -> set[fx.Node]:
    """What elementwise ops, views and recombinations make of the seeds."""
    found: set[fx.Node] = set()
    pending = list(seeds)
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        for user in node.users:
            carries = is_elementwise(user) or is_view(user) or getitem_source(user) or user.target in anchors.CARRIERS
            if user.op == "call_function" and carries:
                pending.append(user)
    return found


def _try(planner: Planner, term: Term, norms: bool = True, below: bool = True) -> None:
    """Try `term` as a root; where that fails, without the rotations below its norms, then without its norms."""
    view = planner.view
    try:
        parsed = heads.parse(view, term, norms, below)
    except NotARotation as error:
        for state in _rotations_below(planner, view.nodes(term)[0]):
            _record(state, Reject(Code.ROTATION, str(error)), ROPE)
        return
    if parsed is None:
        return
    try:
        site = build(view, term, parsed, planner.settings.roundings)
        owned = _states(planner, site)
        if not owned:
            return
        planner.take(owned[0], site)
        for state in owned[1:]:
            state.absorbed_by = owned[0]
    except Reject as reject:
        rotates = any(p.rotation is not None for p in parsed.parts)
        about = _rotations_below(planner, view.nodes(term)[0]) if rotates else _norms(planner, parsed)
        for state in about:
            _record(state, reject, rule_of(parsed))
        if any(p.norm_last for p in parsed.parts):
            _try(planner, term, below=False)
        elif rotates and any(p.norm is not None for p in parsed.parts):
            _try(planner, term, norms=False)


def _record(state: State, reject: Reject, rule: Rule) -> None:
    if state.site is None and state.absorbed_by is None and all(known is not rule for _, known in state.attempts):
        state.attempts.append((reject, rule))


def _states(planner: Planner, site: HeadSite) -> list[State]:
    """The anchors that the site explains, the first rotation first."""
    inside = site.interior | site.roots
    free = [s for s in planner.states.values() if s.site is None and s.absorbed_by is None]
    rotations = [s for s in free if s.anchor.kind == "rotation" and s.anchor.node in inside]
    keys = {anchors.key_of(planner.view, p.norm.term) for p in site.heads.parts if p.norm is not None}
    norms = [s for s in free if s.anchor.kind == "norm" and s.anchor.key in keys]
    return rotations + norms


def _norms(planner: Planner, parsed: heads.Heads) -> list[State]:
    keys = {anchors.key_of(planner.view, p.norm.term) for p in parsed.parts if p.norm is not None}
    return [s for s in planner.states.values() if s.anchor.key in keys and s.anchor.node in planner.queries]


def _rotations_below(planner: Planner, node: fx.Node) -> Iterator[State]:
    """The rotations that `node` was made from, itself included, not through other rotations."""
    by_node = {s.anchor.node: s for s in planner.states.values() if s.anchor.kind == "rotation"}
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        at = pending.pop()
        if at in seen or at.op != "call_function":
            continue
        seen.add(at)
        if at in by_node:
            yield by_node[at]
        elif is_elementwise(at) or is_view(at) or at.target in anchors.CARRIERS:
            pending.extend(at.all_input_nodes)


def choose_and_check(planner: Planner, site: HeadSite) -> None:
    """A provider for all parts, and a reason to have it."""
    check_cycles(site, planner.together)
    choice = choose.choose(site.calls, planner.settings)
    site.kernel, site.passed_over = choice.provider, choice.passed_over
    if not planner.settings.pointwise:
        check_gain(site, planner.claimed)
    site.bytes_before, site.bytes_after = traffic(site)


def check_gain(site: HeadSite, claimed: Container[fx.Node]) -> None:
    """Raise Reject(left=True) where Inductor would join the site with pointwise work that it must do anyway."""
    values = (n.meta.get("val") for n in site.interior)
    if any(isinstance(v, torch.Tensor) and v.is_complex() for v in values):
        return  # Inductor has no code for complex numbers: it calls one ATen op after the other
    users = [u for n in (site.casts or site.roots) for u in readers(n)]
    if users and all(is_elementwise(u) and u.target is not aten.clone.default and u not in claimed for u in users):
        names = ", ".join(sorted({str(u.target) for u in users})[:3])
        text = f"every reader of the result is pointwise ({names}): Inductor finishes them in one kernel with it"
        raise Reject(Code.FEEDS_POINTWISE, text, Stage.KERNEL, left=True)
    inside = site.interior | site.roots
    for call in site.calls:
        node = through_views(base_node(site.view, call.operands["x"]))
        if node in claimed or node.target is aten.clone.default or not is_elementwise(node):
            continue
        if only_read_in(node, inside):
            text = f"x is the result of {node.target}, which Inductor computes inside the same kernel"
            text += " and which would have to be written to memory here"
            raise Reject(Code.POINTWISE_PRODUCER, text, Stage.KERNEL, left=True)
