"""Modulation without a norm: ``x * (1 + scale) + shift`` with broadcast scale and shift (``a * (k + b) + c``, k = 1).

Found in AuraFlow's output layer and in LTX-2's key and value modulation. A region without a reduction: see
`dkfuse.pointwise`.
"""

from __future__ import annotations

from dkfuse.matching.pattern import Add, Mul, Num, R, Var
from dkfuse.matching.rules import Rule

FACTOR = R("ONE_PLUS", Add(Num(1.0, "offset"), Var("scale")))
POINTWISE = (
    Rule(
        "scale_shift",
        "scale_shift",
        "scale_shift",
        Add(Var("shift"), R("PRODUCT", Mul(FACTOR, Var("x")))),
        has_norm=False,
    ),
)
