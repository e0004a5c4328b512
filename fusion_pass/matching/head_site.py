"""A site of queries or keys: from parsed parts to calls of ``dkfuse::norm_rope`` that are sound to insert.

Sound means, as for every site (`checks`): shapes and dtypes are ones the op takes, nothing outside reads a value
in between, no operand depends on the result, no operand is an input that the graph writes to.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from dkfuse.patterns.heads import NORM_ROPE, QK_NORM, ROPE

from ..reporting.report import Reason
from .checks import check_eps, check_layout, check_mutation, check_statistics, rounding_flags
from .escapes import served
from .gain import CASTS, is_view, widens
from .heads import Heads, Part
from .operands import fake, text_shape
from .pattern import Binding
from .rules import Code, Reject, Rule
from .terms import FLOATS, NARROW, Term, TermView, same_shape, same_size, short_dtype

if TYPE_CHECKING:
    from ..choosing.tuning import Tuned

aten = torch.ops.aten


@dataclass
class Call:
    """One op call of a site: operands by argument name, and attributes."""

    op: str
    view: TermView
    device: torch.device
    operands: dict[str, Term]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class HeadSite:
    """`root` becomes the results of `calls`, joined along `dim` where there are several. Interface of `Candidate`."""

    view: TermView
    root: Term
    heads: Heads
    rule: Rule
    device: torch.device
    calls: list[Call] = field(default_factory=list)
    interior: set[fx.Node] = field(default_factory=set)
    outputs: dict[str, Term] = field(default_factory=dict)
    kernel: Any = None
    passed_over: tuple[Reason, ...] = ()
    bytes_before: int | None = None
    bytes_after: int | None = None
    launched: list[Tuned] = field(default_factory=list)  # as of `Candidate`
    binding: Binding = field(default_factory=Binding)
    casts: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)  # behind views of the root: the op rounds instead

    @property
    def name(self) -> str:
        return self.rule.name

    @property
    def family(self) -> str:
        return self.rule.family

    @property
    def op(self) -> str:
        return self.rule.op

    @property
    def shape(self) -> tuple:
        return self.root.shape

    @property
    def operands(self) -> dict[str, Term]:
        """Of every call; those of later parts end in ``.1``, ``.2``."""
        return {
            f"{name}.{i}" if i else name: term
            for i, call in enumerate(self.calls)
            for name, term in call.operands.items()
        }

    @property
    def roots(self) -> set[fx.Node]:
        return set(self.output_nodes("out"))

    def output_nodes(self, name: str) -> list[fx.Node]:
        nodes = self.view.nodes(self.outputs[name])
        return [n for n in nodes if n.meta["val"].dtype == nodes[0].meta["val"].dtype]


def rule_of(heads: Heads) -> Rule:
    if all(p.rotation is None for p in heads.parts):
        return QK_NORM
    return ROPE if all(p.norm is None for p in heads.parts) else NORM_ROPE


def build(view: TermView, root: Term, heads: Heads, roundings: str = "fused") -> HeadSite:
    """The site, or Reject."""
    value = view.nodes(root)[0].meta["val"]
    site = HeadSite(view, root, heads, rule_of(heads), value.device, outputs={"out": root})
    site.casts = _late_casts(site)
    dtype = next(iter(site.casts)).meta["val"].dtype if site.casts else value.dtype
    if dtype not in FLOATS:
        raise Reject(Code.DTYPE, f"the result is {short_dtype(dtype)}; bf16, fp16 and fp32 are supported")
    site.calls = [_call(site, part, dtype, roundings) for part in heads.parts]
    _collect_interior(site)
    _check_escapes(site)
    check_mutation(site)
    check_layout(site)
    return site


def _call(site: HeadSite, part: Part, out_dtype: torch.dtype, roundings: str) -> Call:
    view, norm, rotation = site.view, part.norm, part.rotation
    operands: dict[str, Term] = {"x": part.x}
    attributes: dict[str, Any] = {}
    labels: dict[str, torch.dtype] = {}
    if norm is not None:
        check_eps(view, norm.term)
        if roundings == "eager":
            check_statistics(view, norm.term)
        operands.update((n, t) for n, t in (("weight", norm.weight), ("bias", norm.bias)) if t is not None)
        attributes["norm"] = "layer" if norm.term.op == "layer_norm" else "rms"
        attributes.update(eps=norm.term.attrs[0], weight_offset=norm.weight_offset, across=norm.across)
        labels.update(norm.roundings)
    if rotation is not None:
        tables = rotation.tables
        operands.update((n, t) for n, t in (("cos", tables.cos), ("sin", tables.sin)) if t is not None)
        attributes.update(rotation=rotation.style, tables=tables.form)
        labels.update(("ROTATION", d) for d in rotation.roundings)
    if part.norm_last and norm is not None:
        attributes["norm_last"] = True
        if norm.x.precision in NARROW:
            labels["ROTATED"] = norm.x.precision
    _check_operands(site, part, operands, out_dtype)
    flags = rounding_flags(labels, fake(view, part.x).dtype) if roundings == "eager" else 0
    attributes.update(out_dtype=out_dtype, roundings=flags)
    return Call("norm_rope", view, site.device, operands, attributes)


def _check_operands(site: HeadSite, part: Part, operands: dict[str, Term], out_dtype: torch.dtype) -> None:
    view, shape = site.view, part.value.shape
    if not isinstance(shape[-1], int):
        raise Reject(Code.SYMBOLIC, f"the row length {shape[-1]} is not a known number")
    for name, term in operands.items():
        if not view.realizable(term):
            raise Reject(Code.OPERAND, f"{name} is computed inside the site: no tensor of the graph holds it")
        value = fake(view, term)
        table = name in ("cos", "sin")
        if value.dtype not in FLOATS and not (table and value.dtype == torch.float64):
            raise Reject(Code.DTYPE, f"{name} is {short_dtype(value.dtype)}; bf16, fp16 and fp32 are supported")
        if value.device != site.device:
            raise Reject(Code.DEVICE, f"{name} is on {value.device}, the result on {site.device}")
        if name == "x":
            fits = same_shape(value.shape, shape)
        else:
            wanted = (*shape[:-1], value.shape[-1]) if table else shape
            fits = len(value.shape) <= len(shape) and all(
                same_size(a, b) or same_size(a, 1)
                for a, b in zip(reversed(value.shape), reversed(wanted), strict=False)
            )
        if not fits:
            text = f"{name} of shape {text_shape(value.shape)} does not broadcast to {text_shape(shape)}"
            raise Reject(Code.BROADCAST, text)
    if part.rotation is not None and part.rotation.double and out_dtype not in NARROW:
        table = fake(view, part.rotation.tables.cos).dtype
        if table != torch.float64:
            text = f"the rotation is computed in fp64 with tables in {short_dtype(table)} and its result is not rounded"
            raise Reject(Code.DTYPE, text + "; the kernel rotates in fp64 only with fp64 tables")


def _chain(view: TermView, term: Term) -> set[fx.Node]:
    """The nodes of an operand and of what it is a view of."""
    nodes = set(view.nodes(term))
    while term.op == "view":
        term = term.args[0]
        nodes.update(view.nodes(term))
    return nodes


def _collect_interior(site: HeadSite) -> None:
    """The nodes between the x operands and the root: what depends on an x and is needed for the root."""
    view = site.view
    inputs = {n for call in site.calls for n in _chain(view, call.operands["x"])}
    stop = inputs | {n for call in site.calls for t in call.operands.values() for n in _chain(view, t)}
    first = min(view.order[n] for n in inputs)
    reached: set[fx.Node] = set()
    pending = list(site.roots)
    while pending:
        node = pending.pop()
        if node in reached or node in stop or view.order[node] < first:
            continue
        reached.add(node)
        pending.extend(node.all_input_nodes)
    for node in sorted(reached, key=view.order.__getitem__):
        if all(source in inputs for source in node.all_input_nodes) and (is_view(node) or widens(node)):
            inputs.add(node)  # no work: others may read it too
        elif isinstance(node.meta.get("val"), torch.SymInt):
            continue
        elif any(source in inputs or source in site.interior for source in node.all_input_nodes):
            site.interior.add(node)
    site.interior -= site.roots


def _check_escapes(site: HeadSite) -> None:
    view = site.view
    owned = site.interior | site.roots
    last = max(view.order[node] for node in owned)

    def mine(node: fx.Node) -> bool:
        return node in owned or reads_a_size(site, node)

    for node in site.interior:
        for user in node.users:
            if not served(view, user, mine, last):
                raise Reject(Code.ESCAPES, f"{node.name} ({node.target}) inside the site is also read by {user.name}")


def reads_a_size(site: HeadSite, node: fx.Node) -> bool:
    """`node` reads a size that the sizes of the operands tell as well."""
    if node.target is not aten.sym_size.int:
        return False
    size = node.meta["val"]
    shapes = [s for call in site.calls for s in call.operands["x"].shape if isinstance(s, torch.SymInt)]
    told = {s.node.expr for s in shapes}
    return not isinstance(size, torch.SymInt) or size.node.expr in told or size.node.expr.free_symbols <= told


def _late_casts(site: HeadSite) -> dict[fx.Node, list[fx.Node]]:
    """``{cast: views between the root and it}`` where every reader of a wide root casts it to one narrow dtype.

    A root in fp64 may be cast to fp32 on the way, or for good.
    """
    if site.root.precision in NARROW:
        return {}
    nodes = site.output_nodes("out")
    if nodes[0].meta["val"].dtype is not torch.float64:
        return _casts(nodes, NARROW)
    return _casts(nodes, NARROW, (torch.float32,)) or _casts(nodes, (torch.float32,))


def _casts(
    nodes: list[fx.Node], wanted: Container[torch.dtype], between: Container[torch.dtype] = ()
) -> dict[fx.Node, list[fx.Node]]:
    """The casts to one dtype of `wanted` behind views of `nodes`, and casts to dtypes `between`, if all readers are."""
    found: dict[fx.Node, list[fx.Node]] = {}
    pending: list[tuple[fx.Node, list[fx.Node], bool]] = [(node, [], False) for node in nodes]
    while pending:
        node, path, late = pending.pop()
        for user in node.users:
            dtype = user.meta["val"].dtype if user.target in CASTS else None
            if is_view(user):
                pending.append((user, [*path, user], True))
            elif dtype in wanted and late:
                found[user] = path
            elif dtype in between:
                pending.append((user, path, True))
            else:
                return {}
    return found if len({cast.meta["val"].dtype for cast in found}) == 1 else {}
