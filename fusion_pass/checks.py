"""From a binding to a candidate: the checks that every rule shares.

A candidate is sound when replacing its outputs by the op keeps every other value of the graph: operands broadcast,
dtypes are ones the op takes, nothing outside reads an interior value, no operand depends on a result, and no operand
is an input that the graph writes to. Sizes are compared with `statically_known_true`, so no check adds a guard.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx

from . import picks
from .pattern import Binding
from .rules import Candidate, Code, Reject, Replaceable, Rule, Stage
from .terms import FLOATS, Term, TermView, broadcast_shape, same_shape, same_size, short_dtype
from .views import is_view_of_input

FULL = ("x", "residual")


def build(rule: Rule, view: TermView, root: Term, binding: Binding, roundings: str = "fused") -> Candidate:
    """The candidate for `binding`, or Reject."""
    node = view.nodes(root)[0]
    shape = tuple(node.meta["val"].shape)
    site = Candidate(rule, view, root, binding, shape, node.meta["val"].device, family=rule.family)
    site.outputs["out"] = root
    return _checked(site, roundings)


def build_dual(first: tuple[Term, Binding], second: tuple[Term, Binding], rule: Rule, view: TermView, roundings: str):
    """The candidate for two modulations of one norm (SD3.5's dual attention, LTX-2's cross-modal norms), or Reject."""
    (root, one), (other_root, two) = first, second
    names = set(one.terms) | set(two.terms)
    shared = names - {"scale", "shift"}
    if any(one.terms.get(n) is not two.terms.get(n) for n in shared) or one.numbers != two.numbers:
        raise Reject(Code.ESCAPES, "the norm feeds two modulations that differ in more than scale and shift")
    nodes = [view.nodes(r)[0].meta["val"] for r in (root, other_root)]
    if nodes[0].dtype != nodes[1].dtype or ("scale" in one.terms) != ("scale" in two.terms):
        raise Reject(Code.ESCAPES, "the norm feeds two modulations of different dtype or form")
    extra = {f"{n}2": two.terms[n] for n in ("scale", "shift") if n in two.terms}
    binding = Binding(
        {**one.terms, **extra}, one.numbers, {**two.roundings, **one.roundings}, one.interior + two.interior
    )
    site = Candidate(rule, view, root, binding, tuple(nodes[0].shape), nodes[0].device, family=rule.family, dual=True)
    site.outputs.update(out=root, out2=other_root)
    return _checked(site, roundings)


def _checked(site: Candidate, roundings: str) -> Candidate:
    rule = site.rule
    if rule.check is not None:
        rule.check(site)
    picks.resolve(site)
    _check_operands(site)
    _collect_interior(site)
    _check_escapes(site)
    check_mutation(site)
    check_layout(site)
    _set_attributes(site, roundings)
    return site


def _check_operands(site: Candidate) -> None:
    shape, operands = site.shape, site.operands
    if not shape or not isinstance(shape[-1], int):
        raise Reject(Code.SYMBOLIC, f"the row length {shape[-1] if shape else '()'} is not a known number")
    for name, term in operands.items():
        val = fake(site.view, term)
        if val.dtype not in FLOATS and name != "pick":
            raise Reject(Code.DTYPE, f"{name} is {short_dtype(val.dtype)}; bf16, fp16 and fp32 are supported")
        if val.device != site.device:
            raise Reject(Code.DEVICE, f"{name} is on {val.device}, the result on {site.device}")
        if name in FULL:
            if not same_shape(term.shape, shape):
                text = f"{name} has shape {text_shape(term.shape)}, the result {text_shape(shape)}"
                raise Reject(Code.BROADCAST, text + "; both must be the same")
        elif not same_shape(broadcast_shape([term.shape[picks.is_pair(site, name) :], shape]), shape):
            text = f"{name} of shape {text_shape(term.shape)} does not broadcast to {text_shape(shape)}"
            raise Reject(Code.BROADCAST, text)
    if (norm := site.norm) is not None:
        if not same_shape(norm.shape, shape):
            text = f"the norm has shape {text_shape(norm.shape)}, the result {text_shape(shape)}"
            raise Reject(Code.BROADCAST, text + "; the modulation must not enlarge it")
        for statistic in (norm, site.branch_norm):
            if statistic is not None:
                check_eps(site.view, statistic)
    elif site.rule.op == "gated_residual":
        if not (is_row_parameter(operands["gate"], shape) or is_cut(operands["gate"], shape)):
            raise Reject(Code.BROADCAST, "no factor is broadcast over the tokens: not a gate")
    elif not all(is_row_parameter(operands[name], shape) for name in ("scale", "shift")):
        raise Reject(Code.BROADCAST, "scale and shift are not broadcast over the tokens: not a modulation")


def is_row_parameter(term: Term, shape: tuple) -> bool:
    """Smaller than the site, and with a value for each of the D columns."""
    if not term.shape or not same_size(term.shape[-1], shape[-1]) or same_size(shape[-1], 1):
        return False
    return not same_shape(term.shape, shape)


def is_cut(term: Term, shape: tuple) -> bool:
    """A full tensor that is made of conditioning: a per-token gate.

    Either one slice of a bigger tensor across a dim that is not the last, or rows picked per token by `where`.
    """
    if not same_shape(term.shape, shape):
        return False
    if term.op == "leaf" and term.attrs[0].target is torch.ops.aten.where.self:
        rows = [a.meta["val"] for a in term.attrs[0].args[1:] if isinstance(a, fx.Node)]
        return all(not same_shape(row.shape, shape) for row in rows)
    last = len(term.shape)
    while term.op == "view":
        if term.attrs[0] == "slice" and term.attrs[1] < last - 1 + (len(term.shape) > last):
            return len(term.args[0].shape) > last
        term = term.args[0]
    return False


def check_eps(view: TermView, norm: Term) -> None:
    eps = norm.attrs[0]
    reduction = view.reductions[norm]
    if reduction.op == "var" and reduction.attrs != (0,):
        raise Reject(Code.VARIANCE, f"the variance has correction {reduction.attrs[0]}; a LayerNorm's is 0")
    dtype = view.statistics_dtype.get(norm, torch.float32)
    tiny = torch.finfo(dtype).smallest_normal
    if eps < 0 or 0 < eps < tiny:
        limit = f"the smallest normal {short_dtype(dtype)} number, {tiny:.3g}, in which the statistics are computed"
        raise Reject(Code.EPS, f"eps={eps:g} is below {limit}")


def _collect_interior(site: Candidate) -> None:
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
                    if term is not None and _below_norm_input(view, term, norm.args[0]):
                        continue
                    site.interior.add(source)
                    pending.append(source)
    site.interior -= site.roots


def _below_norm_input(view: TermView, term: Term, norm_input: Term) -> bool:
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


def _check_escapes(site: Candidate) -> None:
    view = site.view
    roots = site.roots
    if "sum" in site.binding.terms:
        total = site.binding.terms["sum"]
        own = set(view.nodes(total))
        site.interior -= own
        inside = site.interior | roots | own
        if any(user not in inside for node in own for user in node.users):
            site.outputs["sum"] = total
    owned = site.interior | roots | set(view.nodes(site.binding.terms["sum"]) if "sum" in site.binding.terms else ())
    last = max(view.order[node] for node in owned)
    operands = {base_node(view, term): name for name, term in site.operands.items()}

    for node in site.interior:
        val = node.meta.get("val")
        full = isinstance(val, torch.Tensor) and same_shape(val.shape, site.shape)
        statistic = view.term(node) is None or (bool(val.shape) and same_size(val.shape[-1], 1) and val.dim() > 1)
        if not (full or statistic):
            continue  # a row parameter such as 1 + scale: cheap to compute twice
        if node in operands:
            text = f"{node.name} ({node.target}) is computed inside the site and is its {operands[node]} too"
            raise Reject(Code.ESCAPES, text)
        for user in node.users:
            if not served(view, user, owned.__contains__, last, operands):
                raise Reject(Code.ESCAPES, f"{node.name} ({node.target}) inside the site is also read by {user.name}")


def check_mutation(site: Replaceable) -> None:
    """No operand is (a view of) an input that the graph writes to."""
    for name, term in site.operands.items():
        source = is_view_of_input(base_node(site.view, term))
        if source is not None and source in site.view.written_inputs:
            raise Reject(Code.MUTATED, f"{name} is a view of the input {source.name}, which the graph writes to")


def check_layout(site: Replaceable) -> None:
    """Results need not have the strides that the model's values had: nobody may read them by strides."""
    for name in site.outputs:
        for node in site.output_nodes(name):
            for user in node.users:
                if user.target is torch.ops.aten.as_strided.default:
                    raise Reject(Code.LAYOUT, f"{user.name} reads {node.name} by its strides (as_strided)")


def rounding_flags(labels: dict[str, torch.dtype], x_dtype: torch.dtype) -> int:
    """The recorded roundings as the kernels' flags; Reject where one is not to the dtype that kernels round to."""
    from dkfuse.kernels.rounding import Rounding

    flags = Rounding(0)
    for label, dtype in labels.items():
        if dtype != x_dtype:
            text = f"{label} is rounded to {short_dtype(dtype)}, the kernel rounds to {short_dtype(x_dtype)}"
            raise Reject(Code.ROUNDING, text, Stage.KERNEL)
        flags |= Rounding[label]
    return int(flags)


def _set_attributes(site: Candidate, roundings: str) -> None:
    """The op's keyword arguments, from the binding."""
    view, binding, terms = site.view, site.binding, site.binding.terms
    flags = rounding_flags(binding.roundings, fake(view, terms["x"]).dtype) if roundings == "eager" else 0
    attributes: dict[str, Any] = {}
    if site.norm is not None:
        attributes["norm"] = "layer" if site.norm.op == "layer_norm" else "rms"
        attributes["eps"] = site.norm.attrs[0]
        attributes["weight_offset"] = binding.numbers.get("weight_offset", 0.0)
    if (branch := site.branch_norm) is not None:
        attributes["branch_norm"] = "layer" if branch.op == "layer_norm" else "rms"
        attributes["branch_eps"] = branch.attrs[0]
        attributes["branch_weight_offset"] = binding.numbers.get("branch_weight_offset", 0.0)
    if site.rule.op != "gated_residual":
        attributes["scale_offset"] = binding.numbers.get("offset", 0.0)
    if site.rule.op.startswith("residual"):
        attributes["sum_dtype"] = site.output_nodes("sum")[0].meta["val"].dtype if "sum" in site.outputs else None
    attributes["out_dtype"] = site.output_nodes("out")[0].meta["val"].dtype
    attributes["roundings"] = flags
    site.attributes = attributes


# -- operands as tensors ---------------------------------------------------------------------------------------------


def base_node(view: TermView, term: Term) -> fx.Node:
    """The node under the views of an operand."""
    while not view.nodes(term):
        term = term.args[0]
    return view.nodes(term)[0]


def fake(view: TermView, term: Term) -> torch.Tensor:
    """The fake value of an operand, its views applied."""
    if nodes := view.nodes(term):
        return nodes[0].meta["val"]
    from .views import apply

    return apply(term, fake(view, term.args[0]))


def text_shape(shape: Any) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"
