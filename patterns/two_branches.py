"""Two branches that are added to the stream before the norm that reads it: one op for the three, and the norm.

    r = (residual + gate * x) + gate2 * x2      SD3.5's dual attention
    r = (residual + gate * x) + x2              what ControlNets, VACE and IP-adapters add; also factor2 * x2, a number
    r = (residual + x) + gate2 * x2
    r = residual + (gate * x + gate2 * x2)      the same, added up in another order
    norm(r) [* w + b] [* (1 + scale) + shift]

x may be a normed branch, or biased, as in `residual`; two branches without gates are one that is added to another
there. A first sum that somebody else reads, as the norm of a block reads it, is a stream of its own.
"""

from __future__ import annotations

from dkfuse.matching.gain import readers
from dkfuse.matching.pattern import Add, Binding, Mul, Num, Pattern, R, Reordered, Var, alt
from dkfuse.matching.rules import Candidate, NotThisRule, Rule
from dkfuse.matching.terms import bare, viewed

from .modulate import affine, check_modulation, modulated
from .residual import NORMED, OP, X, is_plain, is_stream, limited, total


def second(gated: bool) -> Pattern:
    """``gate2 * x2``; or ``factor2 * x2``, where that is a number, or ``x2``."""
    x2 = Var("x2", is_plain)
    if gated:
        return R("GATE_PRODUCT2", Mul(Var("gate2"), x2))
    return alt(x2, R("GATE_PRODUCT2", Mul(Num(name="factor2"), x2)))


def in_turn(branch: Pattern, gated: bool, second_gated: bool) -> Pattern:
    """``total + second``, bound as ``sum``."""
    return R("SUM2", Add(total(branch, gated, name="first_sum"), second(second_gated)), name="sum")


def at_once(branch: Pattern) -> Pattern:
    """``residual + (gate * branch + second)``, bound as ``sum``; without a gate the second is the residual above."""
    both = Add(R("GATE_PRODUCT", Mul(Var("gate"), branch)), second(gated=True))
    return R("SUM", Add(Var("residual", is_stream), Reordered(R("BOTH", both))), name="sum")


def check_first_sum(site: Candidate) -> None:
    """The first sum becomes the whole one, and nothing else; it is no operand."""
    view, terms = site.view, dict(site.binding.terms)
    first, whole = terms.pop("first_sum", None), bare(view.expose(terms["sum"]))
    whole = bare(view.expose(whole.args[0])) if whole.op == "clamp" else whole
    first = viewed(first) if first is not None else None
    for term in (first, bare(first)) if first is not None else ():
        for reader in (reader for node in view.nodes(term) for reader in readers(node)):
            read = view.term(reader)
            if read is None or bare(view.expose(read)) not in (term, bare(term), whole):
                raise NotThisRule(f"{reader.name} reads the first of the two sums too")
    site.binding = Binding(terms, site.binding.numbers, site.binding.roundings, site.binding.interior)


def check_modulated(site: Candidate) -> None:
    check_first_sum(site)
    check_modulation(site)


GATES = ((True, True), (True, False), (False, True))
BRANCHES = (
    ("residual_pair", limited(at_once(X))),  # before one of its products is taken for the stream
    ("sandwich_two", limited(alt(*(in_turn(NORMED, *gates) for gates in (*GATES, (False, False)))), "SUM2")),
    ("residual_two", limited(alt(*(in_turn(X, *gates) for gates in GATES)), "SUM2")),
)
RULES = (
    *(Rule(f"{n}_norm_modulate", OP, OP, modulated(affine(b)), check=check_modulated) for n, b in BRANCHES),
    *(Rule(f"{n}_norm", "residual_norm", OP, affine(b), check=check_first_sum) for n, b in BRANCHES),
)
