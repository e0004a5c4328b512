"""Residual streams: a gated, plain or normed branch added to the stream, alone or with the norm that follows.

    r = residual + gate * x             blocks of adaLN-Zero: FLUX, SD3, Wan; both r and the norm of r are results
    r = residual + x                    without a gate: Wan's cross-attention, a ViT, a Llama
    r = residual + gate * norm_b(x)     a sandwich norm, two norms one after the other: Z-Image, Lumina2, Mochi
    norm(r) [* w + b] [* (1 + scale) + shift]           r may be clamped, as models in fp16 do: to [-65504, 65504]

x may be ``y + branch_bias``, which nothing but the site reads: a Linear on a slice of a batch is a `bmm` and then a
pointwise add of its bias, and where attention and MLP run side by side (FLUX.3) their results are added first, two
tensors of the stream's shape. A biased value that somebody else reads too is x as it is.

The operands of `add` and `mul` come in any order: which factor is the gate is decided by shape, in the checks.
"""

from __future__ import annotations

from dkfuse.matching.pattern import Add, Limited, Mul, Norm, Num, Pattern, R, Var, alt
from dkfuse.matching.rules import Rule
from dkfuse.matching.terms import Term

from .modulate import affine, check_modulation, is_vector, modulated


def is_plain(term: Term) -> bool:
    """Not made by a norm nearby: a normed branch is matched with its norm."""
    return term.norm_reach is None


def is_stream(term: Term) -> bool:
    """Not the normed branch itself, ``gate * norm_b(x)``, in the other operand's place."""
    inner = term
    while inner.op in ("round", "view"):
        inner = inner.args[0]
    return inner.op not in ("layer_norm", "rms_norm") and not (inner.op == "mul" and inner.norm_reach is not None)


def total(branch: Pattern, gated: bool, name: str = "sum") -> Pattern:
    """``residual + gate * branch`` or ``residual + branch``, bound as `name` too."""
    product = R("GATE_PRODUCT", Mul(Var("gate"), branch)) if gated else branch
    return R("SUM", Add(Var("residual", is_stream), product), name=name)


def limited(whole: Pattern, label: str = "SUM") -> Pattern:
    """`whole`, or that clamped, bound as ``sum`` in its place; rounded under `label`."""
    return Limited(whole, label, "sum")


def is_addend(term: Term) -> bool:
    """A bias, or another branch: the checks see that it has the stream's shape."""
    return is_vector(term) or (len(term.shape) > 1 and is_plain(term))


def biased(x: Pattern) -> Pattern:
    """``x + branch_bias`` or ``x``."""
    return alt(R("BRANCH_BIAS", Add(x, Var("branch_bias", is_addend))), x)


X = biased(Var("x", is_plain))
BRANCH = R("BRANCH", Norm(X, "branch_norm"))
WEIGHT = alt(Var("branch_weight", is_vector), Add(Num(1.0, "branch_weight_offset"), Var("branch_weight", is_vector)))
NORMED = alt(R("BRANCH_WEIGHTED", Mul(WEIGHT, BRANCH)), BRANCH)
ALONE = Add(Var("residual"), R("GATE_PRODUCT", Mul(Var("gate"), biased(Var("x")))))

BRANCHES = (
    ("sandwich_gate", limited(total(NORMED, gated=True))),
    ("sandwich", limited(total(NORMED, gated=False))),
    ("residual_gate", limited(total(X, gated=True))),
    ("residual", limited(total(X, gated=False))),
)
OP = "residual_norm_modulate"

RULES = (
    *(Rule(f"{n}_norm_modulate", OP, OP, modulated(affine(b)), check=check_modulation) for n, b in BRANCHES),
    *(Rule(f"{n}_norm", "residual_norm", OP, affine(b)) for n, b in BRANCHES),
)
POINTWISE = (Rule("gated_residual", "gated_residual", "gated_residual", ALONE, has_norm=False),)
