"""Residual streams: a gated or plain branch added to the stream, alone or with the norm that follows.

    r = residual + gate * x             G1, G4, G5, G6      both r and the norm of r are results
    r = residual + x                    G7
    norm(r) [* w + b] [* (1 + scale) + shift]

The operands of `add` and `mul` come in any order: which factor is the gate is decided by shape, in the checks.
"""

from __future__ import annotations

from dkfuse.pattern import Add, Mul, R, Var
from dkfuse.rules import Rule
from dkfuse.terms import Term

from .modulate import affine, check_modulation, modulated


def is_branch(term: Term) -> bool:
    """Not itself a norm's result: ``residual + gate * norm(y)`` is a sandwich norm, which belongs to that norm."""
    return term.norm_reach is None


BRANCH = Var("x", is_branch)
GATED = R("SUM", Add(Var("residual"), R("GATE_PRODUCT", Mul(Var("gate"), BRANCH))), name="sum")
PLAIN = R("SUM", Add(Var("residual"), BRANCH), name="sum")
ALONE = Add(Var("residual"), R("GATE_PRODUCT", Mul(Var("gate"), Var("x"))))

_MODULATE, _NORM = "residual_norm_modulate", "residual_norm"

RULES = (
    Rule("residual_gate_norm_modulate", _MODULATE, _MODULATE, modulated(affine(GATED)), check=check_modulation),
    Rule("residual_norm_modulate", _MODULATE, _MODULATE, modulated(affine(PLAIN)), check=check_modulation),
    Rule("residual_gate_norm", _NORM, _MODULATE, affine(GATED)),
    Rule("residual_norm", _NORM, _MODULATE, affine(PLAIN)),
)
POINTWISE = (Rule("gated_residual", "gated_residual", "gated_residual", ALONE, has_norm=False),)
