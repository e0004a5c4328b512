"""The anchors of one graph, and the rules tried on them: what is to be fused. The graph is not touched."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from dkfuse import patterns

from .choosing import choose
from .matching import anchors, frames, gain, heads, plan_heads, tables
from .matching.anchors import Anchor
from .matching.checks import FULL, build, build_dual, is_cut, is_row_parameter
from .matching.cycles import Together, check_cycles
from .matching.head_site import HeadSite
from .matching.operands import base_node
from .matching.pattern import Binding, matches
from .matching.rules import Candidate, Code, NotThisRule, Reject, Rule, Stage
from .matching.terms import Term, TermView
from .reporting import records
from .reporting.report import Graph
from .rewriting.padded import Product
from .settings import Settings

QK_NORM = (
    "norm of a query or key that is not fused with what follows it: Inductor joins the two, "
    "a norm of its own would add a pass over memory"
)


@dataclass
class Plan:
    """What was decided for one graph: the sites to replace, and the record of every anchor."""

    view: TermView
    taken: list[Candidate | HeadSite] = field(default_factory=list)
    record: Graph = field(default_factory=lambda: Graph(index=0, nodes=0, seconds=0.0))
    refused: list[fx.Node] = field(default_factory=list)
    states: list[State] = field(default_factory=list)  # of the record's sites, in their order
    products: list[Product] = field(default_factory=list)  # that Inductor had padded


@dataclass
class State:
    """One anchor while the rules are tried."""

    anchor: Anchor
    site: Candidate | HeadSite | None = None
    attempts: list[tuple[Reject, Rule]] = field(default_factory=list)
    absorbed_by: State | None = None


def plan(graph: fx.Graph, settings: Settings, spent: int = 0) -> Plan:
    """Decide what to fuse in `graph` after `spent` sites of it were; the graph is not touched."""
    started = time.perf_counter()
    planner = Planner(TermView(graph), settings, spent)
    plan_heads.match(planner)
    planner.match(patterns.RULES, lambda term: term.norm_reach is not None)
    planner.match(patterns.POINTWISE, lambda term: (term.args[0] if term.op == "round" else term).op == "add")
    return planner.finish(started)


class Planner:
    """The anchors of one graph while the rules are tried on it."""

    def __init__(self, view: TermView, settings: Settings, spent: int = 0):
        self.view, self.settings, self.spent = view, settings, spent
        self.states = {a.key: State(a) for a in anchors.find(view)}
        self.queries = anchors.qk_reductions(view)
        self.framed = frames.shapes(view)
        self.claimed: dict[fx.Node, Candidate | HeadSite] = {}
        self.taken: list[Candidate | HeadSite] = []
        self.together = Together()
        self.refused: list[fx.Node] = []  # operands of sites that no kernel takes because of their layout
        # modulations whose norm has another reader, by rule, norm and whether the branch's bias is a part of the site
        self.halves: dict[tuple[str, Term, bool], tuple[Term, Binding]] = {}

    def match(self, rules: tuple[Rule, ...], wanted: Callable[[Term], bool]) -> None:
        """Try `rules`, in order, on every wanted term, from the last node up: results before what they are made of."""
        for node in reversed(self.view.graph.nodes):
            term = self.view.term(node)
            if term is None or term.op == "view" or self.view.nodes(term)[0] is not node or not wanted(term):
                continue
            seen = frames.unflattened(self.view, term, self.framed)
            for rule in rules:
                if any(self._try(rule, term, shaped) for shaped in seen):
                    break

    def finish(self, started: float) -> Plan:
        self.taken.sort(key=lambda site: self.view.order[site.output_nodes("out")[0]])
        _absorb(self.states)
        record = Graph(index=0, nodes=len(self.view.order), seconds=0.0, sites=records.sites(self.states, self.view))
        record.seconds = time.perf_counter() - started
        return Plan(self.view, self.taken, record, self.refused, list(self.states.values()))

    def _try(self, rule: Rule, term: Term, shaped: Term) -> bool:
        """Try `rule` on `term`, seen as `shaped`."""
        best: tuple[tuple[bool, ...], State, Reject] | None = None
        assert rule.pattern is not None, f"{rule.name} has no pattern to match"
        for binding in matches(rule.pattern, self.view, shaped):
            if shaped is not term and not frames.has_frames(
                tables.parts(self.view, binding.terms, shaped.shape), shaped.shape
            ):
                continue  # what a frame has one of is elsewhere: no reason to see the site in frames
            norm = binding.terms.get("norm")
            inner = term.args[0] if term.op == "round" else term
            state = self.states.get(anchors.key_of(self.view, norm) if norm is not None else ("sum", inner))
            if state is None or state.site is not None or state.absorbed_by is not None:
                continue
            if state.anchor.node in self.claimed:
                continue
            branch = binding.terms.get("branch_norm")
            inner_state = self.states.get(anchors.key_of(self.view, branch)) if branch is not None else None
            if inner_state is not None and (inner_state.site is not None or inner_state.anchor.node in self.claimed):
                continue
            try:
                self._take(rule, term, binding, state, shaped.shape)
                if inner_state is not None:
                    inner_state.absorbed_by = state
                return True
            except NotThisRule:
                continue
            except Reject as reject:
                told = _told(reject, binding, shaped.shape)
                if best is None or told > best[0] or (told == best[0] and reject.stage is Stage.KERNEL):
                    best = (told, state, reject)
        if best is not None and all(known is not rule for _, known in best[1].attempts):
            best[1].attempts.append((best[2], rule))
        return False

    def _take(self, rule: Rule, term: Term, binding: Binding, state: State, shape: tuple) -> None:
        """Take the site, its sums whole where no kernel in use adds their rows; or Reject."""
        site = self._candidate(rule, term, binding, state, shape)
        try:
            self.take(state, site)
        except Reject as reject:
            if reject.stage is not Stage.KERNEL or reject.left or not tables.may_stay_whole(site):
                raise
            self.take(state, self._candidate(rule, term, binding, state, shape, apart=False))

    def _candidate(
        self, rule: Rule, term: Term, binding: Binding, state: State, shape: tuple, apart: bool = True
    ) -> Candidate:
        if not self.settings.allows(rule.name):
            raise Reject(Code.DISABLED, f"rule {rule.name} is switched off by dkfuse.rules", Stage.KERNEL)
        norm = binding.terms.get("norm")
        if state.anchor.node in self.queries and norm is not None and heads.is_head(norm):
            raise Reject(Code.QK_NORM, QK_NORM, Stage.KERNEL, left=True)
        try:
            return build(rule, self.view, term, binding, self.settings.roundings, shape, apart)
        except Reject as reject:
            if reject.code != Code.ESCAPES.value or "norm" not in binding.terms:
                raise
            key = (rule.name, binding.terms["norm"], "branch_bias" in binding.terms)
            half = self.halves.setdefault(key, (term, binding))
            if half[0] is term:
                raise
            return build_dual(half, (term, binding), rule, self.view, self.settings.roundings, apart)

    def take(self, state: State, site: Candidate | HeadSite) -> None:
        """Claim the site's nodes for `state`, or Reject."""
        settings = self.settings
        if not settings.allows(site.rule.name):
            raise Reject(Code.DISABLED, f"rule {site.rule.name} is switched off by dkfuse.rules", Stage.KERNEL)
        for node in _all_nodes(site):
            if node in self.claimed and not _is_parameter(node, site):
                raise Reject(Code.CLAIMED, f"{node.name} already belongs to a {self.claimed[node].name} site")
        if isinstance(site, HeadSite):
            plan_heads.choose_and_check(self, site)
        else:
            self._choose_and_check(site)
        if settings.fuel is not None and self.spent + len(self.taken) >= settings.fuel:
            raise Reject(Code.FUEL, f"dkfuse.fuel={settings.fuel} sites are fused already", Stage.KERNEL)
        state.site = site
        self.taken.append(site)
        self.together.add(site)
        self.claimed.update(dict.fromkeys(_all_nodes(site), site))

    def _choose_and_check(self, site: Candidate) -> None:
        check_cycles(site, self.together)
        try:
            choice = choose.choose([site], self.settings)
        except Reject as reject:
            if reject.code == Code.INNER_STRIDE.value:
                self.refused += [base_node(self.view, site.operands[name]) for name in FULL if name in site.operands]
                if not (self.settings.pointwise or site.rule.has_norm):
                    gain.check(site)  # nor would it be fused with dense rows
            raise
        site.kernel, site.passed_over = choice.provider, choice.passed_over
        if not (self.settings.pointwise or (site.kernel == "native" and not site.rule.has_norm)):
            gain.check(site, self.claimed)
        site.bytes_before, site.bytes_after = gain.traffic(site)


def _told(reject: Reject, binding: Binding, shape: tuple) -> tuple[bool, ...]:
    """How much a reason tells among those of one rule's readings of a value: the greater one is reported.

    A reading that came to the choice of a kernel was the right one. One whose shapes do not fit, or that takes the
    branch for the gate, which is made of conditioning, was not meant.
    """
    gate = binding.terms.get("gate")
    meant = gate is None or is_row_parameter(gate, shape) or is_cut(gate, shape)
    return (reject.stage is Stage.KERNEL, meant, reject.code != Code.BROADCAST.value)


def _all_nodes(site: Candidate | HeadSite) -> set[fx.Node]:
    nodes = site.interior | site.roots
    if "sum" in site.binding.terms:
        nodes.update(site.view.nodes(site.binding.terms["sum"]))
    return nodes


def _is_parameter(node: fx.Node, site: Candidate | HeadSite) -> bool:
    """A row parameter such as ``1 + scale`` may serve several sites."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dim() > 0 and tuple(val.shape) != site.shape and val.shape[-1] != 1


def _absorb(states: dict[object, State]) -> None:
    """A gated residual inside a taken norm site is that site's work."""
    owners = {node: s for s in states.values() if s.site is not None for node in _all_nodes(s.site)}
    for state in states.values():
        if state.site is None and state.absorbed_by is None and state.anchor.kind != "norm":
            owner = owners.get(state.anchor.node)
            if owner is not None and owner is not state:
                state.absorbed_by = owner
