"""From a binding to a candidate: the checks that every rule shares.

A candidate is sound when replacing its outputs by the op keeps every other value of the graph: operands broadcast,
dtypes are ones the op takes, nothing outside reads an interior value (`escapes`), no operand depends on a result
(`cycles`), and no operand is an input that the graph writes to. Sizes are compared with `statically_known_true`, so no
check adds a guard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import picks, tables
from .escapes import check_escapes, collect_interior
from .gain import PICKING
from .operands import base_node, computed, fake, text_shape
from .pattern import ORDER, Binding
from .rules import Candidate, Code, NotThisRule, Reject, Replaceable, Rule, Stage
from .terms import FLOATS, Term, TermView, bare, broadcast_shape, same_shape, same_size, short_dtype
from .views import is_view_of_input

PARTS = 3  # of the last dim of modulations per token, at least
FULL = ("x", "residual", "x2")


def build(
    rule: Rule, view: TermView, root: Term, binding: Binding, roundings: str, shape: tuple, apart: bool
) -> Candidate:
    """The candidate for `binding`, or Reject. shape: what the op sees `root` in; apart: sums are, see `tables`."""
    value = view.nodes(root)[0].meta["val"]
    if (total := binding.terms.get("sum")) is not None:
        binding = binding.rebind("sum", _stored(view, computed(view, total), exact=roundings == "eager"))
    site = Candidate(rule, view, root, binding, shape, value.device, family=rule.family)
    site.outputs["out"] = root
    return _checked(site, roundings, apart)


def _stored(view: TermView, total: Term, exact: bool) -> Term:
    """The sum that is a result: in fp32 where the stream goes on in fp32 and only the norm reads it rounded."""
    nodes = view.nodes(total.args[0]) if total.op == "round" and not exact else []
    rounded = set(view.nodes(total))
    return total.args[0] if any(user not in rounded for node in nodes for user in node.users) else total


def build_dual(
    first: tuple[Term, Binding], second: tuple[Term, Binding], rule: Rule, view: TermView, roundings: str, apart: bool
) -> Candidate:
    """The candidate for two modulations of one norm (SD3.5's dual attention, LTX-2's cross-modal norms), or Reject."""
    (root, one), (other_root, two) = first, second
    one, two = (b.rebind("sum", computed(view, b.terms["sum"])) if "sum" in b.terms else b for b in (one, two))
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
    return _checked(site, roundings, apart)


def _checked(site: Candidate, roundings: str, apart: bool) -> Candidate:
    rule = site.rule
    if rule.check is not None:
        rule.check(site)
    _check_bias(site)
    if apart:
        tables.resolve(site, exact=roundings == "eager")
    picks.resolve(site)
    _check_operands(site)
    collect_interior(site)
    check_escapes(site)
    check_mutation(site, max(site.view.order[node] for name in site.outputs for node in site.output_nodes(name)))
    check_layout(site)
    _set_attributes(site, roundings)
    return site


def _check_bias(site: Candidate) -> None:
    """A row that is added to conditioning is no bias of a branch, but a table of the gate."""
    terms = site.binding.terms
    if "branch_bias" not in terms:
        return
    shape = terms["branch_bias"].shape
    if not (same_shape(shape, site.shape) or all(same_size(size, 1) for size in shape[:-1])):
        raise NotThisRule("what is added is neither a bias nor another branch")
    one_of_many = any(tables.has_other_parts(walked, site.shape) for walked in site.binding.interior)
    gate = terms.get("gate")
    if one_of_many or (gate is not None and is_cut(terms["x"], site.shape) and same_shape(gate.shape, site.shape)):
        raise Reject(Code.BROADCAST, "branch_bias is added to a part of a bigger tensor: that is a gate and its table")


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
        elif not same_shape(broadcast_shape([term.shape[picks.has_rows(site, name) :], shape]), shape):
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
        gate = operands["gate"]
        if not (is_row_parameter(gate, shape) or is_cut(gate, shape) or "gate" in site.sums):
            raise Reject(Code.BROADCAST, "no factor is broadcast over the tokens: not a gate")
    elif not all(is_row_parameter(operands[name], shape) or name in site.sums for name in ("scale", "shift")):
        raise Reject(Code.BROADCAST, "scale and shift are not broadcast over the tokens: not a modulation")


def is_row_parameter(term: Term, shape: tuple) -> bool:
    """Smaller than the site, and with a value for each of the D columns."""
    if not term.shape or not same_size(term.shape[-1], shape[-1]) or same_size(shape[-1], 1):
        return False
    return not same_shape(term.shape, shape)


def is_cut(term: Term, shape: tuple) -> bool:
    """A full tensor that is made of conditioning: a per-token gate.

    One slice of a bigger tensor across a dim that is not the last, one of `PARTS` or more of its last dim, rows picked
    per token by `where` or by an index, or rows that were repeated for the tokens. Also with a row added that is the
    same for all tokens. One of two parts is as likely a half of a gated linear unit.
    """
    if not same_shape(term.shape, shape):
        return False
    if (total := bare(term)).op == "add":
        pairs = (total.args, total.args[::-1])
        return any(is_row_parameter(row, shape) and is_cut(own, shape) for own, row in pairs)
    last = len(term.shape)
    while term.op == "view":
        if term.attrs[0] == "slice" and term.attrs[1] < last - 1 + (len(term.shape) > last):
            return len(term.args[0].shape) > last
        if term.attrs[0] == "slice" and _is_one_of_many(term.args[0].shape[-1], shape[-1]):
            return term.attrs[1] == len(term.args[0].shape) - 1
        if term.attrs[0] == "expand":  # of columns: a rotary table, one column for each pair
            return all(same_size(t.shape[-1], shape[-1]) for t in (term, term.args[0]))
        term = term.args[0]
    if term.op == "leaf" and term.attrs[0].target is torch.ops.aten.where.self:
        rows = [picks.unexpanded(a).meta["val"] for a in term.attrs[0].args[1:] if isinstance(a, fx.Node)]
        return all(not same_shape(row.shape, shape) for row in rows)
    return term.op == "leaf" and term.attrs[0].target in PICKING


def is_repeated(term: Term) -> bool:
    """Rows that were repeated for the tokens: conditioning, and no stream. Not what is repeated for samples only."""
    while term.op == "view" and term.attrs[0] != "expand":
        term = term.args[0]
    if term.op != "view" or len(term.shape) != len(term.args[0].shape):
        return False
    *sizes, width = zip(term.shape, term.args[0].shape, strict=True)
    return same_size(*width) and not all(same_size(*size) for size in sizes[1:])


def _is_one_of_many(whole: Any, part: Any) -> bool:
    """Whether `whole` columns are so many times `part` columns that they are modulations."""
    return isinstance(whole, int) and isinstance(part, int) and part > 0 == whole % part and whole // part >= PARTS


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


def check_statistics(view: TermView, norm: Term) -> None:
    """For roundings=eager: a kernel computes the statistics in fp32, whatever they were rounded to."""
    check_exact(view, norm)
    dtype = view.statistics_dtype.get(norm, torch.float32)
    if dtype.itemsize < 4:
        text = f"the norm's statistics are rounded to {short_dtype(dtype)}, the kernel computes them in fp32"
        raise Reject(Code.ROUNDING, text, Stage.KERNEL)


def check_exact(view: TermView, *terms: Term) -> None:
    """For roundings=eager: what was factored out, or a unit vector times the root of D, was rounded in between."""
    if any(bare(term) in view.inexact for term in terms):
        text = "the same value was computed in steps, whose roundings a kernel does not have"
        raise Reject(Code.ROUNDING, text, Stage.KERNEL)


def check_mutation(site: Replaceable, last: int | None = None) -> None:
    """No operand is (a view of) an input that the graph writes to before it is read.

    last: the place in the graph where it is read at the latest; None where that is not known. AOTAutograd has a graph
    write to its inputs at its end (`copy_`), as for a block that adds to its stream in place.
    """
    for name, term in site.operands.items():
        source = is_view_of_input(base_node(site.view, term))
        writer = site.view.written_inputs.get(source) if source is not None else None
        if writer is not None and (last is None or site.view.order[writer] < last):
            raise Reject(Code.MUTATED, f"{name} is a view of the input {source}, which the graph writes to before")


def check_layout(site: Replaceable) -> None:
    """Results need not have the strides that the model's values had: nobody may read them by strides."""
    by_strides = site.view.read_by_strides
    for name in site.outputs:
        for node in site.output_nodes(name):
            if node in by_strides:
                raise Reject(Code.LAYOUT, f"{node.name} is read by its strides (as_strided)")


def rounding_flags(labels: dict[str, torch.dtype], x_dtype: torch.dtype) -> int:
    """The recorded roundings as the kernels' flags; Reject where one is not to the dtype that kernels round to."""
    from dkfuse.kernels.rounding import Rounding

    flags = Rounding(0)
    if ORDER in labels:
        text = "two branches are added to each other first; the kernel adds one after the other to the stream"
        raise Reject(Code.ROUNDING, text, Stage.KERNEL)
    for label, dtype in labels.items():
        if dtype != x_dtype:
            text = f"{label} is rounded to {short_dtype(dtype)}, the kernel rounds to {short_dtype(x_dtype)}"
            raise Reject(Code.ROUNDING, text, Stage.KERNEL)
        flags |= Rounding[label]
    return int(flags)


def _set_attributes(site: Candidate, roundings: str) -> None:
    """The op's keyword arguments, from the binding."""
    view, binding, terms = site.view, site.binding, site.binding.terms
    if roundings == "eager":
        check_exact(view, *binding.interior)
    for statistic in (site.norm, site.branch_norm) if roundings == "eager" else ():
        if statistic is not None:
            check_statistics(view, statistic)
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
        attributes["factor2"] = binding.numbers.get("factor2", 1.0)
        attributes["limit"] = binding.numbers.get("limit", 0.0)
        attributes["sum_dtype"] = site.output_nodes("sum")[0].meta["val"].dtype if "sum" in site.outputs else None
    attributes["out_dtype"] = site.output_nodes("out")[0].meta["val"].dtype
    attributes["roundings"] = flags
    site.attributes = attributes
