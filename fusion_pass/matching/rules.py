"""What a rule is, what it binds, and how it says no.

A `Rule` is a pattern plus the op it becomes. The checks that every rule shares (shapes, dtypes, escapes) are in
`checks`, those for cycles in `cycles`; a family adds its own through `Rule.check`. A check that fails
raises `Reject(code, message)`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

from ..reporting.report import Reason
from .pattern import Binding, Pattern
from .terms import Term, TermView

if TYPE_CHECKING:
    from ..choosing.tuning import Tuned


class Stage(str, enum.Enum):
    """Where an attempt ended."""

    STRUCTURE = "structure"
    SEMANTICS = "semantics"
    KERNEL = "kernel"


class Code(str, enum.Enum):
    """Why an attempt ended: aggregates in the report. The message names the value."""

    NO_RULE = "no_rule"  # no rule has this shape
    NORM_DIM = "norm_dim"  # the norm is not over the last dim
    VARIANCE = "variance"  # unbiased variance, or another statistic
    BROADCAST = "broadcast"  # an operand or the result does not broadcast as the op expects
    DTYPE = "dtype"
    DEVICE = "device"
    EPS = "eps"
    ESCAPES = "escapes"  # an interior value is used elsewhere
    CYCLE = "cycle"  # an operand depends on a result
    MUTATED = "mutated"  # an operand is (a view of) an input that the graph writes to
    SYMBOLIC = "symbolic"  # a size that must be known is a symbol
    ROUNDING = "rounding"  # roundings=eager asked for a rounding the kernel cannot reproduce
    DISABLED = "disabled"  # switched off by an option
    FUEL = "fuel"
    CLAIMED = "claimed"  # the value already belongs to another site
    QK_NORM = "qk_norm"
    ROTATION = "rotation"  # pairs are recombined, but not as a rotation
    OPERAND = "operand"  # an operand is no tensor of the graph
    POINTWISE = "pointwise"  # no reduction, no removed copy
    FEEDS_POINTWISE = "feeds_pointwise"
    POINTWISE_PRODUCER = "pointwise_producer"
    SHORT_ROWS = "short_rows"  # very many short ones
    NO_BIAS = "no_bias"
    NO_GAIN = "no_gain"  # moves no less memory than what Inductor makes of it
    NO_KERNEL = "no_kernel"
    NOT_INSTALLED = "not_installed"  # the provider's package
    UNTESTED_VERSION = "untested_version"
    NOT_FASTER = "not_faster"  # another kernel was measured to be, or this one was not measured
    KERNEL_FAILED = "kernel_failed"  # to build or to launch, in this process
    INNER_STRIDE = "inner_stride"
    ROW_TOO_LONG = "row_too_long"
    EMPTY = "empty"
    LAYOUT = "layout"


class Reject(Exception):
    """An attempt failed. `left` marks a site that Inductor is expected to serve better."""

    def __init__(self, code: Code | str, message: str, stage: Stage = Stage.SEMANTICS, left: bool = False):
        super().__init__(message)
        self.code, self.message, self.stage, self.left = str(getattr(code, "value", code)), message, stage, left

    def reason(self, rule: str | None) -> Reason:
        return Reason(self.stage.value, self.code, self.message, rule)


class NotThisRule(Exception):
    """The binding is another rule's business: nothing to report."""


@dataclass(frozen=True)
class Rule:
    """``pattern`` at a root term becomes ``dkfuse::op``. Variables are named like the op's arguments."""

    name: str
    family: str
    op: str
    pattern: Pattern | None = None  # None: found by a reader of its own (`heads`)
    has_norm: bool = True
    check: Callable[[Candidate], None] | None = None


class OpCall(Protocol):
    """What a kernel is chosen for: one call of an op."""

    @property
    def op(self) -> str: ...
    @property
    def view(self) -> TermView: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def operands(self) -> dict[str, Term]: ...
    @property
    def attributes(self) -> dict[str, Any]: ...


class Replaceable(Protocol):
    """What becomes calls of ops: operands, results, and the nodes whose work the calls take over."""

    @property
    def view(self) -> TermView: ...
    @property
    def binding(self) -> Binding: ...
    @property
    def operands(self) -> dict[str, Term]: ...
    @property
    def outputs(self) -> dict[str, Term]: ...
    @property
    def interior(self) -> set[fx.Node]: ...
    def output_nodes(self, name: str) -> list[fx.Node]: ...


@dataclass
class Candidate:
    """One way in which one rule explains one value."""

    rule: Rule
    view: TermView
    root: Term
    binding: Binding
    shape: tuple  # of the full tensors of the site, [..., D]
    device: torch.device
    interior: set[fx.Node] = field(default_factory=set)  # nodes whose work the op does, roots excluded
    outputs: dict[str, Term] = field(default_factory=dict)  # "out", "sum": what the op returns and somebody reads
    attributes: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the op
    sums: dict[str, Term] = field(default_factory=dict)  # operands that were taken apart, by name, see `tables`
    picked: list[Term] = field(default_factory=list)  # operands in place of which rows are read, see `picks`
    dual: bool = False  # a second modulation of the same norm is a result too ("out2")
    kernel: Any = None  # the provider of the implementation, once chosen
    passed_over: tuple[Reason, ...] = ()  # why the providers before it, and those not measured, were not
    family: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None
    launched: list[Tuned] = field(default_factory=list)  # the Triton launches that compute it, once lowered

    @property
    def operands(self) -> dict[str, Term]:
        """The tensor arguments of the op that are present, by argument name."""
        return {name: t for name, t in self.binding.terms.items() if name not in ("norm", "branch_norm", "sum")}

    @property
    def name(self) -> str:
        return self.rule.name + ("_dual" if self.dual else "")

    @property
    def op(self) -> str:
        """The op of namespace ``dkfuse`` that computes the site."""
        return self.rule.op + ("_dual" if self.dual else "")

    @property
    def roots(self) -> set[fx.Node]:
        """The nodes of every result but the sum."""
        return {n for name in self.outputs if name != "sum" for n in self.output_nodes(name)}

    @property
    def norm(self) -> Term | None:
        return self.binding.terms.get("norm")

    @property
    def branch_norm(self) -> Term | None:
        """The norm of the branch that is added to the stream, where the site has one."""
        return self.binding.terms.get("branch_norm")

    def output_nodes(self, name: str) -> list[fx.Node]:
        """The nodes that output `name` replaces: every node of that value, in its own dtype."""
        term = self.outputs[name]
        nodes = self.view.nodes(term)
        return [n for n in nodes if n.meta["val"].dtype == nodes[0].meta["val"].dtype]
