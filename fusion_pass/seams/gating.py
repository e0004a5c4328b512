"""Finding SwiGLUs: ``silu(g) * u`` with ``silu(g) = g * sigmoid(g) = g / (1 + exp(-g))``, however it was written.

g and u are equally many columns of linears of one input: two linears, or the halves of one. A node is read as a
product; its factors are columns c, and sigmoids of columns. Casts, views and copies are passed through, a quotient by
1 + exp(-c) is a factor sigmoid(c). The first node behind a sigmoid whose factors are g, sigmoid(g) and u is the result
of a SwiGLU. Roundings inside do not matter, as long as they are to the linear's dtype or to a wider one
(`Gating.narrowed`): the epilogue has none.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..matching.gain import CASTS
from ..matching.terms import same_shape, same_size
from .common import is_tensor
from .gelu import ADD, DIV, MUL
from .linear import KEEP_ROWS, Linear, aten

REACH = 8  # nodes from the sigmoid to the result
SIGMOID, COLUMNS = "sigmoid", "columns"


@dataclass(frozen=True)
class Columns:
    """Columns start .. stop of the result of a linear."""

    linear: Linear
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


Factor = tuple[str, Columns]


@dataclass
class Gating:
    """``result = silu(gate) * up``; `inside` are the nodes from the linears to the result."""

    gate: Columns
    up: Columns
    result: fx.Node
    inside: set[fx.Node] = field(default_factory=set)

    @property
    def linears(self) -> list[Linear]:
        """The one linear, or that of the gate and that of the other factor."""
        return [self.gate.linear] if self.gate.linear == self.up.linear else [self.gate.linear, self.up.linear]

    def escape(self) -> fx.Node | None:
        """A node before the result that somebody else reads too."""
        own = {n for linear in self.linears for n in (linear.node, linear.product, *linear.views)}
        allowed = {*self.inside, self.result, *own}
        before = sorted(own | self.inside - {self.result})
        return next((n for n in before if any(u not in allowed and not _is_size(u) for u in n.users)), None)

    def narrowed(self) -> torch.dtype | None:
        """A dtype of a value inside that holds less than the linear's or other values."""
        allowed = (self.gate.linear.dtype, torch.float32, torch.float64)
        dtypes = [n.meta["val"].dtype for n in self.inside if is_tensor(n)]
        return next((dtype for dtype in dtypes if dtype not in allowed), None)


def find(graph: fx.Graph, linears: dict[fx.Node, Linear]) -> Iterator[Gating]:
    """Every SwiGLU of columns of `linears`, which are given by their results."""
    reader = _Reader(linears)
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if not reader.is_gate(node) or any(map(reader.is_gate, node.all_input_nodes)):
            continue  # what follows a sigmoid is found from there
        if (found := reader.result(node)) is not None and found.result not in seen:
            seen.add(found.result)
            yield _finish(found)


def _finish(gating: Gating) -> Gating:
    """Take in the casts back to the linears' dtype, and collect what is inside."""
    ends = {linear.node for linear in gating.linears}
    while gating.result.meta["val"].dtype != gating.gate.linear.dtype and len(gating.result.users) == 1:
        (reader,) = gating.result.users
        if reader.target not in CASTS and reader.target not in KEEP_ROWS:
            break
        gating.result = reader
    pending = [gating.result]
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in ends and node not in gating.inside and not _is_size(node):
                gating.inside.add(node)
                pending.append(node)
    return gating


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


class _Reader:
    """Columns and products of columns, by node."""

    def __init__(self, linears: dict[fx.Node, Linear]):
        self.linears = linears
        self.known: dict[fx.Node, tuple[Factor, ...] | None] = {}

    def is_gate(self, node: fx.Node) -> bool:
        """Whether a factor of `node` is a sigmoid."""
        return any(kind == SIGMOID for kind, _ in self.factors(node) or ())

    def result(self, sigmoid: fx.Node) -> Gating | None:
        """The SwiGLU that a node with the factor sigmoid(c) belongs to."""
        pending, seen = [sigmoid], 0
        while pending and seen < REACH:
            node, seen = pending.pop(0), seen + 1
            factors = self.factors(node)
            if factors is None:
                continue
            gates = [c for kind, c in factors if kind == SIGMOID]
            columns = [c for kind, c in factors if kind == COLUMNS]
            if len(gates) == 1 and len(columns) == 2 and gates[0] in columns:
                up = columns[1] if columns[0] == gates[0] else columns[0]
                return Gating(gates[0], up, node) if up != gates[0] else None
            pending += list(node.users)
        return None

    def factors(self, node: Any) -> tuple[Factor, ...] | None:
        """What `node` is a product of; None where it is none of columns and their sigmoids."""
        if not isinstance(node, fx.Node) or not (is_tensor(node) or node.target is operator.getitem):
            return None
        if node not in self.known:
            self.known[node] = self._factors(node)
        return self.known[node]

    def _factors(self, node: fx.Node) -> tuple[Factor, ...] | None:
        if (columns := self._columns(node)) is not None:
            return ((COLUMNS, columns),)
        target, args = node.target, node.args
        if _passes(node):
            return self.factors(args[0])
        if target is aten.sigmoid.default:
            return self._sigmoid(self.factors(args[0]))
        if target is aten.silu.default:
            inner = self.factors(args[0])
            return self._product(inner, self._sigmoid(inner))
        if target in MUL and _alike(*args):
            return self._product(self.factors(args[0]), self.factors(args[1]))
        if target in DIV and len(args) == 2 and not node.kwargs and (args[0] == 1 or _alike(*args)):
            sigmoid = self._of_denominator(args[1])
            return sigmoid if args[0] == 1 else self._product(self.factors(args[0]), sigmoid)
        if target is aten.reciprocal.default:
            return self._of_denominator(args[0])
        return None

    @staticmethod
    def _product(a: tuple[Factor, ...] | None, b: tuple[Factor, ...] | None) -> tuple[Factor, ...] | None:
        return (*a, *b) if a is not None and b is not None and len(a) + len(b) <= 3 else None

    @staticmethod
    def _sigmoid(factors: tuple[Factor, ...] | None) -> tuple[Factor, ...] | None:
        single = factors is not None and len(factors) == 1 and factors[0][0] == COLUMNS
        return ((SIGMOID, factors[0][1]),) if single else None  # type: ignore[index]

    def _of_denominator(self, node: Any) -> tuple[Factor, ...] | None:
        """sigmoid(c) for a node 1 + exp(-c)."""
        while isinstance(node, fx.Node) and _passes(node):
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.target not in ADD or node.kwargs or len(node.args) != 2:
            return None
        power, one = node.args if isinstance(node.args[0], fx.Node) else (node.args[1], node.args[0])
        while isinstance(power, fx.Node) and _passes(power):
            power = power.args[0]
        if one != 1 or not isinstance(power, fx.Node) or power.target is not aten.exp.default:
            return None
        negative = power.args[0]
        while isinstance(negative, fx.Node) and _passes(negative):
            negative = negative.args[0]
        if not isinstance(negative, fx.Node) or negative.target is not aten.neg.default:
            return None
        return self._sigmoid(self.factors(negative.args[0]))

    def _columns(self, node: fx.Node) -> Columns | None:
        if node in self.linears:
            n = self.linears[node].features[1]
            return Columns(self.linears[node], 0, n) if isinstance(n, int) else None
        place = _taken(node)
        if place is None:
            return None
        source, start, stop = place
        found = self.factors(source)
        if found is None or len(found) != 1 or found[0][0] != COLUMNS:
            return None
        whole = found[0][1]
        return Columns(whole.linear, whole.start + start, whole.start + stop)


def _alike(one: Any, other: Any) -> bool:
    """Whether two operands have one shape: a row is multiplied with its own row, nothing is broadcast."""
    return is_tensor(one) and is_tensor(other) and same_shape(one.meta["val"].shape, other.meta["val"].shape)


def _passes(node: fx.Node) -> bool:
    """A view that keeps rows, a copy, or a cast."""
    before = node.args[0] if node.args else None
    if not is_tensor(before) or not is_tensor(node):
        return False
    a, b = before.meta["val"], node.meta["val"]
    if node.target in CASTS:
        return a.dtype.is_floating_point and b.dtype.is_floating_point
    keeps = bool(a.dim() and b.dim()) and same_size(a.shape[-1], b.shape[-1])
    return keeps and (node.target in KEEP_ROWS or node.target is aten.clone.default)


def _taken(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(a value, start, stop) where `node` is columns start .. stop of it, and all of its rows."""
    args: list[Any] = list(node.args)
    if node.target is aten.slice.Tensor:
        source, dim, start, stop, step = args + [0, None, None, 1][len(args) - 1 :]
        size = source.meta["val"].shape[-1]
        last = dim in (-1, source.meta["val"].dim() - 1)
        if not last or step != 1 or node.kwargs or not isinstance(size, int):
            return None
        if not all(v is None or isinstance(v, int) for v in (start, stop)):
            return None
        start, stop, _ = slice(start, stop).indices(size)
        return source, start, stop
    if node.target is not operator.getitem:
        return None
    split, index = args
    if not isinstance(split, fx.Node) or split.target not in (aten.split.Tensor, aten.split_with_sizes.default):
        return None
    source = split.args[0]
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if not isinstance(source, fx.Node) or dim not in (-1, source.meta["val"].dim() - 1):
        return None
    widths = [part.shape[-1] for part in split.meta["val"]]
    if not all(isinstance(w, int) for w in widths):
        return None
    start = sum(widths[:index])
    return source, start, start + widths[index]
