"""Norm, affine and modulation: the building blocks of every adaLN family.

    n = norm(x), or n * w + b           affine, w and b of shape [D]
    n * (1 + scale) + shift             adaLN of DiT (Peebles & Xie, arXiv:2212.09748): FLUX, SD3, Wan, LTX
    n * scale                           the factor 1 + scale computed on the row: Z-Image, Lumina2
    n * gate + residual                 a sandwich norm, whose `shift` is a full tensor: Z-Image, Lumina2

In place of the 1 any number will do; ``1 - scale`` is a factor computed on the row.
"""

from __future__ import annotations

from collections.abc import Callable

from dkfuse.matching.pattern import Add, Mul, Norm, Num, Pattern, R, Var, alt
from dkfuse.matching.rules import Candidate, NotThisRule, Rule
from dkfuse.matching.terms import Term, bare, same_size


def is_vector(term: Term) -> bool:
    """One row of D values, the shape of a norm's own weight."""
    return bool(term.shape) and not same_size(term.shape[-1], 1) and all(same_size(s, 1) for s in term.shape[:-1])


def is_factor(term: Term) -> bool:
    """Not itself ``c + s``: that spelling is matched with its constant. ``c - s`` is a factor: no node computes -s."""
    inner = term.args[0] if term.op == "round" else term
    while inner.op == "view":
        inner = inner.args[0]
    inner = inner.args[0] if inner.op == "round" else inner
    return not (inner.op == "add" and inner.args[0].op == "const" and bare(inner.args[1]).op != "neg")


def affine(x: Pattern, vector: Callable[[Term], bool] = is_vector) -> Pattern:
    """``norm(x)``, ``norm(x) * w``, ``norm(x) * (1 + w)``, each with and without ``+ b``; w and b are a `vector`."""
    n = R("NORM", Norm(x))
    weight = alt(Var("weight", vector), Add(Num(1.0, "weight_offset"), Var("weight", vector)))
    weighted = R("WEIGHTED", Mul(weight, n))
    return alt(R("AFFINE", Add(Var("bias", vector), weighted)), weighted, n)


def modulated(a: Pattern) -> Pattern:
    """``a * factor + shift``, ``a * factor``, ``a + shift``."""
    factor = alt(R("ONE_PLUS", Add(Num(name="offset"), Var("scale"))), Var("scale", is_factor))
    product = R("PRODUCT", Mul(factor, a))
    return alt(Add(Var("shift"), product), product, Add(Var("shift"), a))


def check_modulation(site: Candidate) -> None:
    """A norm's own affine is no modulation."""
    terms = site.binding.terms
    own = [terms[name] for name in ("scale", "shift") if name in terms]
    affine_only = "weight" not in terms or not terms.keys() & {"scale", "bias"}
    if "offset" not in site.binding.numbers and affine_only and all(is_vector(t) for t in own):
        raise NotThisRule("an affine norm")


X = Var("x")
RULES = (
    Rule("norm_modulate", "norm_modulate", "norm_modulate", modulated(affine(X)), check=check_modulation),
    Rule("norm", "norm", "norm_modulate", affine(X)),
)
