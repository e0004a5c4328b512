"""Pattern families of dkfuse, one per file: RMSNorm/LayerNorm with modulation, residual streams, plain modulation.

`RULES` lists the rules that contain a norm, widest first: where several explain one value, the first that passes its
checks takes it. `POINTWISE` lists the rules without a reduction.
"""

from . import modulate, residual, scale_shift
from .heads import HEADS

_MODULATING = [r for r in residual.RULES + modulate.RULES if r.name.endswith("modulate")]
_PLAIN = [r for r in residual.RULES + modulate.RULES if not r.name.endswith("modulate")]

RULES = tuple(_MODULATING + _PLAIN)
POINTWISE = residual.POINTWISE + scale_shift.POINTWISE
ALL = HEADS + RULES + POINTWISE
NAMES = tuple(rule.name for rule in ALL)

__all__ = ["ALL", "HEADS", "NAMES", "POINTWISE", "RULES"]
