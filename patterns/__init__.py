"""Pattern families of dkfuse, one per file: RMSNorm/LayerNorm with modulation, residual streams, plain modulation.

`RULES` lists the rules that contain a norm, widest first: where several explain one value, the first that passes its
checks takes it. `POINTWISE` lists the rules without a reduction.
"""

from . import modulate, residual, scale_shift, two_branches
from .heads import HEADS

_NORMS = two_branches.RULES + residual.RULES + modulate.RULES
RULES = tuple(sorted(_NORMS, key=lambda rule: not rule.name.endswith("modulate")))
POINTWISE = residual.POINTWISE + scale_shift.POINTWISE
ALL = HEADS + RULES + POINTWISE
NAMES = tuple(rule.name for rule in ALL)

__all__ = ["ALL", "HEADS", "NAMES", "POINTWISE", "RULES"]
