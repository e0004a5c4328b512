"""No operand of a site may depend on a result of it, not even by way of other sites.

An op gives no result before it has every operand. A sum and the norm of the sum, made by one op, therefore both depend
on the norm's scale; where two such ops read each other's results there is no order to run them in.
"""

from __future__ import annotations

import bisect

from torch import fx

from .operands import base_node
from .rules import Code, Reject, Replaceable


class Together:
    """The dependencies that the sites taken so far add: of a result on operands that are computed after it."""

    def __init__(self) -> None:
        self.operands: dict[fx.Node, list[fx.Node]] = {}  # result -> operands of its op
        self.spans: list[tuple[int, int]] = []  # sorted: first result, last operand

    def add(self, site: Replaceable) -> None:
        order = site.view.order
        results, operands = _results(site), [base_node(site.view, t) for t in site.operands.values()]
        first, last = min(order[n] for n in results), max(order[n] for n in operands)
        if last > first:
            self.operands.update(dict.fromkeys(results, operands))
            bisect.insort(self.spans, (first, last))

    def earliest(self, start: int) -> int:
        """The first node that a path between nodes from `start` on can come through."""
        for first, last in reversed(self.spans[: bisect.bisect_left(self.spans, (start, start))]):
            start = first if last >= start else start
        return start


def check_cycles(site: Replaceable, together: Together) -> None:
    """Reject where an operand depends on a result: walk up from each, no further than a path to a result can lead."""
    order, results = site.view.order, _results(site)
    earliest = together.earliest(min(order[n] for n in results))
    seen: set[fx.Node] = set()
    pending = [(name, base_node(site.view, t)) for name, t in site.operands.items()]
    while pending:
        name, node = pending.pop()
        if node in results:
            raise Reject(Code.CYCLE, f"{name} depends on {node.name}, a result of the site")
        if node in seen or order[node] < earliest:
            continue
        seen.add(node)
        pending.extend((name, source) for source in (*node.all_input_nodes, *together.operands.get(node, ())))


def _results(site: Replaceable) -> set[fx.Node]:
    results = {n for name in site.outputs for n in site.output_nodes(name)}
    if "sum" in site.binding.terms:
        results.update(site.view.nodes(site.binding.terms["sum"]))
    return results
