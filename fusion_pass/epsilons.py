"""The eps of a norm, and factors of 1, that Dynamo made inputs of the graph.

With ``dynamic=True`` Dynamo takes every float for an input, also the attribute `eps` of a module that computes its norm
by hand, as diffusers' RMSNorm does. The graph has a tensor in its place, of a value that no kernel could be compiled
for. So it takes the number that a module divides its result by, which is 1 in diffusers' attention: the quotient would
be a value that Inductor computes between a linear and the gate. Such floats are made constants by torch's own means:
Dynamo traces the frame once more with the value and a guard, as it would without ``dynamic=True``. Other floats stay
what they are: a scale may be another one in each call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from . import compat_dynamo

ADDITIONS = (operator.add, torch.add, "add", "add_")
QUOTIENTS = (operator.truediv, torch.div, torch.true_divide, "div", "div_")
ROOTS = (torch.rsqrt, torch.sqrt, "rsqrt", "sqrt", "rsqrt_", "sqrt_")


def make_constants(gm: fx.GraphModule) -> None:
    """Have Dynamo trace the frame of `gm` again where an eps is an input; the exception that says so passes through."""
    if found := list(_inputs(gm.graph)):
        compat_dynamo.restart_with_constants(found)


def _inputs(graph: fx.Graph) -> Iterator[fx.Node]:
    """Placeholders of floats that modules have and that are only added to what a root is taken of, or 1 and divide."""
    for node in graph.find_nodes(op="placeholder"):
        if node.users and compat_dynamo.is_float_of_a_module(node):
            numbers = list(node.users)
            readers = [reader for number in numbers for reader in number.users]
            if not readers or any(n.target != "item" for n in numbers):
                continue
            divides = compat_dynamo.value_of(node) == 1.0 and all(_is_divided(r, numbers) for r in readers)
            if divides or all(map(_is_under_a_root, readers)):
                yield node


def _is_divided(quotient: fx.Node, numbers: list[fx.Node]) -> bool:
    return quotient.target in QUOTIENTS and len(quotient.args) == 2 and quotient.args[1] in numbers


def _is_under_a_root(total: fx.Node) -> bool:
    if total.target not in ADDITIONS or not total.users:
        return False
    return all(
        user.target in ROOTS or (user.target in ("pow", torch.pow, operator.pow) and user.args[1:] == (-0.5,))
        for user in total.users
    )
