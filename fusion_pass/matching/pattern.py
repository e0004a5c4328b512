"""A small commutative pattern algebra over terms.

    Mul(Norm(Var("x")), R("ONE_PLUS", Add(Num(1), Var("scale"))))

`Add` and `Mul` try both orders. `R(label, p)` lets an intermediate rounding pass and records it under `label`, so that
a kernel can reproduce it. `Var` binds any term that some node (or views of one) computes; a `Var` bound twice must be
the same term. Every pattern but `Var` looks through views by moving them down to the operands (`TermView.expose`).

`match(view, term)` yields one `Binding` per way to match, in the order the alternatives are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .terms import Term, TermView

ORDER = "the order of a sum"  # among the roundings of a binding: see `Reordered`


@dataclass(frozen=True, slots=True)
class Binding:
    """What a match bound: operands, constants, the norm, recorded roundings and the interior terms it walked over."""

    terms: dict[str, Term] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    roundings: dict[str, torch.dtype] = field(default_factory=dict)
    interior: tuple[Term, ...] = ()

    def bind(self, name: str, term: Term) -> Binding | None:
        known = self.terms.get(name)
        if known is not None:
            return self if known is term else None
        return self.rebind(name, term)

    def rebind(self, name: str, term: Term) -> Binding:
        return Binding({**self.terms, name: term}, self.numbers, self.roundings, self.interior)

    def number(self, name: str, value: float) -> Binding:
        return Binding(self.terms, {**self.numbers, name: value}, self.roundings, self.interior)

    def rounded(self, label: str, dtype: torch.dtype) -> Binding:
        return Binding(self.terms, self.numbers, {**self.roundings, label: dtype}, self.interior)

    def walk(self, *terms: Term) -> Binding:
        return Binding(self.terms, self.numbers, self.roundings, self.interior + terms)


class Pattern:
    def match(self, view: TermView, term: Term, binding: Binding) -> Iterator[Binding]:
        raise NotImplementedError


@dataclass(frozen=True)
class Var(Pattern):
    """Any value; `when(term)` narrows it."""

    name: str
    when: Callable[[Term], bool] | None = None

    def match(self, view, term, binding):
        if term.op == "const" or not view.realizable(term) or not (self.when is None or self.when(term)):
            return
        if (bound := binding.bind(self.name, term)) is not None:
            yield bound


@dataclass(frozen=True)
class Num(Pattern):
    """The constant `value`, or any constant, recorded under `name`."""

    value: float | None = None
    name: str | None = None

    def match(self, view, term, binding):
        if term.op == "const" and (self.value is None or term.value == self.value):
            yield binding.number(self.name, term.value) if self.name else binding


@dataclass(frozen=True)
class R(Pattern):
    """`inner`, rounded or not; a rounding is recorded under `label`. `name` also binds the (rounded) value itself."""

    label: str
    inner: Pattern
    name: str | None = None

    def match(self, view, term, binding):
        seen = view.expose(term)
        if self.name is not None:
            binding = binding.rebind(self.name, term)
        if seen.op == "round":
            binding = binding.rounded(self.label, seen.attrs[0]).walk(*_path(term), seen)
            yield from self.inner.match(view, seen.args[0], binding)
        else:
            yield from self.inner.match(view, term, binding)


@dataclass(frozen=True)
class Reordered(Pattern):
    """`inner`, a sum that kernels add up in another order: with ``roundings=eager`` none has its roundings."""

    inner: Pattern

    def match(self, view, term, binding):
        yield from self.inner.match(view, term, binding.rounded(ORDER, torch.float32))


@dataclass(frozen=True)
class Limited(Pattern):
    """`inner`, or ``clamp(inner, -limit, limit)``: bound as `name` and walked, the limit recorded.

    A clamped value that is rounded is clamped to a number of that dtype, so that it was as well rounded before.
    """

    inner: Pattern
    label: str
    name: str

    def match(self, view, term, binding):
        seen = view.expose(term)
        inside = view.expose(seen.args[0]) if seen.op == "round" else seen
        if inside.op == "clamp" and _fits(inside.attrs[0], seen.precision):
            binding = binding.number("limit", inside.attrs[0]).walk(*_path(term), seen, inside)
            if seen.op == "round":
                binding = binding.walk(*_path(seen.args[0])).rounded(self.label, seen.attrs[0])
            for found in self.inner.match(view, inside.args[0], binding):
                yield found.rebind(self.name, term)
        else:
            yield from self.inner.match(view, term, binding)


def _fits(value: float, dtype: torch.dtype) -> bool:
    return torch.tensor(value, dtype=dtype).item() == value


class _Commutative(Pattern):
    op = ""

    def __init__(self, left: Pattern, right: Pattern):
        self.left, self.right = left, right

    def match(self, view, term, binding):
        seen = view.expose(term)
        if seen.op != self.op:
            return
        binding = binding.walk(*_path(term), seen)
        a, b = seen.args
        for first, second in ((a, b), (b, a)) if a is not b else ((a, b),):
            for partial in self.left.match(view, first, binding):
                yield from self.right.match(view, second, partial)


class Add(_Commutative):
    op = "add"


class Mul(_Commutative):
    op = "mul"


@dataclass(frozen=True)
class Norm(Pattern):
    """A LayerNorm or RMSNorm over the last dim of `inner`; the norm term is bound as `name`."""

    inner: Pattern
    name: str = "norm"

    def match(self, view, term, binding):
        seen = view.expose(term)
        if seen.op in ("layer_norm", "rms_norm"):
            binding = binding.walk(*_path(term), seen)
            if (bound := binding.bind(self.name, seen)) is not None:
                yield from self.inner.match(view, seen.args[0], bound)


@dataclass(frozen=True)
class Alt(Pattern):
    """The first of `choices` comes first; all are tried."""

    choices: tuple[Pattern, ...]

    def match(self, view, term, binding):
        for choice in self.choices:
            yield from choice.match(view, term, binding)


def alt(*choices: Pattern) -> Alt:
    return Alt(choices)


def _path(term: Term) -> tuple[Term, ...]:
    """`term` and what lies under its views: the nodes a match replaces when it looks through them."""
    path = [term]
    while term.op == "view":
        term = term.args[0]
        path.append(term)
    return tuple(path)


def matches(pattern: Pattern, view: TermView, term: Term) -> Iterator[Binding]:
    """All bindings of `pattern` at `term`, ignoring the rounding of the result itself."""
    seen = view.expose(term)
    inner = seen.args[0] if seen.op == "round" else term
    start = Binding(interior=(term, seen) if seen.op == "round" else ())
    yield from pattern.match(view, inner, start)
