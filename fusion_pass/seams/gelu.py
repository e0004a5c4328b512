"""Finding tanh-GELUs: ``h/2 * (1 + tanh(sqrt(2/pi) * (h + 0.044715 h^3)))``, in whatever order it was written.

What stands between a linear's result h and the end of a GELU is read as a polynomial in h and t = tanh(...): products,
sums and powers of either, with casts and views passed through. A tanh whose argument is sqrt(2/pi) h + 0.0356774 h^3
belongs to a GELU, and the first node after it that equals h/2 + h t/2 is the GELU's result. Roundings inside do not
matter: the epilogue has none. The erf form never looks like this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..matching.gain import CASTS
from .common import is_tensor
from .linear import KEEP_ROWS, Linear, aten

Polynomial = dict[tuple[int, int], float]  # (power of h, power of t) -> factor

SLOPE = math.sqrt(2 / math.pi)
ARGUMENT: Polynomial = {(1, 0): SLOPE, (3, 0): SLOPE * 0.044715}
GELU: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
TOLERANCE = 1e-6  # relative: constants are written with 7 digits and more
MAX_DEGREE = 4
REACH = 8  # nodes from the tanh to the result

ADD = (aten.add.Tensor, aten.add.Scalar)
SUB = (aten.sub.Tensor, aten.sub.Scalar)
MUL = (aten.mul.Tensor, aten.mul.Scalar)
DIV = (aten.div.Tensor, aten.div.Scalar)


@dataclass
class Gelu:
    """One tanh-GELU of `linear`: `result` holds its values, `inside` are the nodes from the linear to the result."""

    linear: Linear
    result: fx.Node
    inside: set[fx.Node] = field(default_factory=set)

    def escape(self) -> fx.Node | None:
        """A node inside that somebody else reads too."""
        within = {*self.inside, self.result}
        between = {self.linear.node, self.linear.product, *self.linear.views, *self.inside}
        allowed = within | between
        return next((n for n in sorted(between) if any(u not in allowed and is_tensor(u) for u in n.users)), None)


def find(graph: fx.Graph, linears: dict[fx.Node, Linear]) -> Iterator[Gelu]:
    """Every tanh-GELU of one of `linears`, which are given by their results."""
    reader = _Reader(linears)
    for node in graph.nodes:
        if node.target is aten.gelu.default and node.kwargs.get("approximate") == "tanh":
            if (base := reader.base(node.args[0])) is not None:
                yield _finish(Gelu(linears[base], node))
        elif node.target is aten.tanh.default and (base := reader.base_of_tanh(node)) is not None:
            result = reader.result(node)
            if result is not None:
                yield _finish(Gelu(linears[base], result))


def _finish(gelu: Gelu) -> Gelu:
    """Take in the casts back to the linear's dtype, and collect what is inside."""
    while gelu.result.meta["val"].dtype != gelu.linear.dtype and len(gelu.result.users) == 1:
        (reader,) = gelu.result.users
        if reader.target not in CASTS and reader.target not in KEEP_ROWS:
            break
        gelu.result = reader
    pending = _tensors(gelu.result)
    while pending:
        node = pending.pop()
        if node is not gelu.linear.node and node not in gelu.inside:
            gelu.inside.add(node)
            pending += _tensors(node)
    return gelu


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The inputs that are tensors: a symbolic size has many readers."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


class _Reader:
    """Polynomials of nodes over one linear's result and one tanh."""

    def __init__(self, linears: dict[fx.Node, Linear]):
        self.linears = linears
        self.known: dict[fx.Node, tuple[Polynomial, fx.Node] | None] = {}

    def base(self, node: fx.Node) -> fx.Node | None:
        """The linear's result that `node` is, behind casts and views."""
        found = self.read(node)
        return found[1] if found is not None and _equal(found[0], {(1, 0): 1.0}) else None

    def base_of_tanh(self, node: fx.Node) -> fx.Node | None:
        found = self.read(node)
        return found[1] if found is not None else None

    def result(self, tanh: fx.Node) -> fx.Node | None:
        """The first node after `tanh` that is a GELU."""
        pending, seen = [tanh], 0
        while pending and seen < REACH:
            node, seen = pending.pop(0), seen + 1
            found = self.read(node)
            if found is None:
                continue
            if _equal(found[0], GELU):
                return node
            pending += list(node.users)
        return None

    def read(self, node: Any) -> tuple[Polynomial, fx.Node] | None:
        """``(polynomial, the linear's result)`` of a node; None for what is no polynomial of one of them."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self.known:
            self.known[node] = None  # a graph has no cycles; this stops nothing but a second visit
            self.known[node] = self._read(node)
        return self.known[node]

    def _read(self, node: fx.Node) -> tuple[Polynomial, fx.Node] | None:
        if node in self.linears:
            return {(1, 0): 1.0}, node
        target, args = node.target, node.args
        if target in CASTS or target in KEEP_ROWS or target is aten.clone.default:
            return self.read(args[0])
        if target is aten.tanh.default:
            inner = self.read(args[0])
            return ({(0, 1): 1.0}, inner[1]) if inner is not None and _equal(inner[0], ARGUMENT) else None
        if target in ADD or target in SUB:
            factor = float(node.kwargs.get("alpha", 1)) * (-1.0 if target in SUB else 1.0)  # type: ignore[arg-type]
            return self._combine(args[0], args[1], lambda a, b: _sum(a, b, factor))
        if target in MUL:
            return self._combine(args[0], args[1], _product)
        if target in DIV and isinstance(args[1], (int, float)) and args[1]:
            return self._combine(args[0], 1.0 / args[1], _product)
        if target is aten.neg.default:
            return self._combine(args[0], -1.0, _product)
        if target is aten.pow.Tensor_Scalar and args[1] in (2, 3):
            square = self._combine(args[0], args[0], _product)
            cube = self._combine(args[0], args[0], lambda a, b: _product(_product(a, b), b))
            return square if args[1] == 2 else cube
        return None

    def _combine(self, a: Any, b: Any, combine: Any) -> tuple[Polynomial, fx.Node] | None:
        polynomials: list[Polynomial] = []
        bases: set[fx.Node] = set()
        for side in (a, b):
            if isinstance(side, (int, float)):
                polynomials.append({(0, 0): float(side)})
            elif (found := self.read(side)) is not None:
                polynomials.append(found[0])
                bases.add(found[1])
            else:
                return None
        if len(bases) != 1:
            return None
        result: Polynomial = combine(*polynomials)
        return (result, bases.pop()) if max(sum(k) for k in result) <= MAX_DEGREE else None


def _sum(a: Polynomial, b: Polynomial, factor: float) -> Polynomial:
    return {k: a.get(k, 0.0) + factor * b.get(k, 0.0) for k in {**a, **b}}


def _product(a: Polynomial, b: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for (i, j), x in a.items():
        for (k, m), y in b.items():
            result[i + k, j + m] = result.get((i + k, j + m), 0.0) + x * y
    return result


def _equal(a: Polynomial, b: Polynomial) -> bool:
    return all(abs(a.get(k, 0.0) - b.get(k, 0.0)) <= TOLERANCE * max(abs(b.get(k, 0.0)), 0.01) for k in {**a, **b})
