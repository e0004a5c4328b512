"""What coverage says of each anchor after planning: fused and by what, or why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..matching import rotation_anchors
from ..matching.head_site import HeadSite
from ..matching.operands import fake
from ..matching.rules import Code, Reject, Rule, Stage
from ..matching.terms import TermView, render, short_dtype
from ..rewriting import origin
from .report import Reason, Site, Status

if TYPE_CHECKING:
    from ..planner import State


def sites(states: dict[object, State], view: TermView) -> list[Site]:
    counts: Counter[str] = Counter()
    names: dict[int, str] = {}
    for state in states.values():
        where = origin.module(state.anchor.node) or "graph"
        counts[f"{where}:{state.anchor.kind}"] += 1
        names[id(state)] = f"{where}:{state.anchor.kind}#{counts[f'{where}:{state.anchor.kind}'] - 1}"
    return [_site(state, names, view) for state in states.values()]


def add_launches(sites: Iterable[Site], states: Iterable[State]) -> None:
    """Say of each of `sites`, the records of `states`, how the Triton kernels that compute it are launched."""
    for record, state in zip(sites, states, strict=True):
        launched = state.site.launched if state.site is not None else []
        if not launched:
            continue
        record.config = "; ".join(dict.fromkeys(best.launch.config_text for best in launched))
        gains = [best.gain for best in launched if best.gain is not None]
        record.config_by, record.config_gain = ("timing", max(gains)) if gains else ("table", None)


def _site(state: State, names: dict[int, str], view: TermView) -> Site:
    node = state.anchor.node
    record = Site(
        id=names[id(state)],
        family=_family(state),
        status=Status.UNMATCHED,
        source=origin.source(node),
        module=origin.module(node),
        attempts=[reject.reason(rule.name) for reject, rule in state.attempts],
    )
    value = node.meta["val"] if isinstance(node.meta.get("val"), torch.Tensor) else node.args[0].meta["val"]
    record.dtype = short_dtype(value.dtype)
    record.shapes = {"x": shape_of(value)}
    done = state.absorbed_by.site if state.absorbed_by is not None else state.site
    if done is not None:
        record.status, record.rule, record.op, record.kernel = (
            Status.FUSED,
            done.name,
            f"dkfuse::{done.op}",
            done.kernel,
        )
        values = {name: fake(view, t) for name, t in done.operands.items()}
        record.passed_over = list(done.passed_over)
        record.dtype = short_dtype(values["x"].dtype)
        record.shapes = {name: shape_of(v) for name, v in values.items()}
        if state.absorbed_by is not None:
            record.with_site = names[id(state.absorbed_by)]
        else:
            record.bytes_before, record.bytes_after = done.bytes_before, done.bytes_after
        return record
    if state.attempts:
        reject, rule = _deepest(state.attempts)
        record.status = Status.LEFT_TO_INDUCTOR if reject.left else Status.REJECTED
        record.rule, record.op, record.reason = rule.name, f"dkfuse::{rule.op}", reject.reason(rule.name)
        return record
    record.reason, record.term = _unexplained(state, view)
    return record


def _deepest(attempts: list[tuple[Reject, Rule]]) -> tuple[Reject, Rule]:
    """The attempt to show: a kernel that failed, a decision to leave the site, then the widest rule."""
    failed = (a for a in attempts if a[0].code == Code.KERNEL_FAILED.value)
    return next(failed, next((a for a in attempts if a[0].left), attempts[0]))


def _unexplained(state: State, view: TermView) -> tuple[Reason, str]:
    node = state.anchor.node
    term = view.term(node) or view.term(next(iter(node.users), node))
    text = render(term) if term is not None else str(node.target)
    by_node = state.anchor.key is state.anchor.node  # not a norm over the last dim
    if state.anchor.kind == "norm" and by_node:
        dims = node.args[1] if len(node.args) > 1 else None
        message = f"{node.target} over dims {dims}: only norms over the last dim are fused"
        return Reason(Stage.STRUCTURE.value, Code.NORM_DIM.value, message), text
    if state.anchor.kind == "rotation" and (product := rotation_anchors.product_of_matrices(node)) is not None:
        message = (
            f"pairs are multiplied with 2x2 matrices by {product.target}, in a form that is not read as a rotation"
        )
        return Reason(Stage.STRUCTURE.value, Code.ROTATION.value, message), text
    return Reason(Stage.STRUCTURE.value, Code.NO_RULE.value, f"no rule explains {node.name}"), text


def _family(state: State) -> str:
    done = state.site or (state.absorbed_by.site if state.absorbed_by else None)
    if state.anchor.kind != "norm":
        return state.anchor.kind
    if isinstance(done, HeadSite):
        return "qk_norm"
    if done is not None:
        return done.family if state.site is not None else "sandwich"
    if any(reject.code == Code.QK_NORM.value for reject, _ in state.attempts):
        return "qk_norm"
    if state.attempts:
        return state.attempts[0][1].family
    return "other_norm"


def shape_of(value: torch.Tensor) -> list[int | str]:
    """A shape as records keep it: symbols by name."""
    return [s if isinstance(s, int) else str(s) for s in value.shape]
