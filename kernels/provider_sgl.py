"""sgl-kernel's RMS norms. Tested: 0.4 (distributions `sglang-kernel` and `sgl-kernel`).

Its `rmsnorm` and `fused_add_rmsnorm` functions call FlashInfer where that is installed; the adapter calls the kernels
of the package itself.
"""

from __future__ import annotations

from .peer_norms import RMS_CONSTRAINTS
from .registry import Implementation

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("norm_modulate", "sgl", RMS_CONSTRAINTS, "dkfuse.kernels.peer_sgl:norm"),
    Implementation("residual_norm_modulate", "sgl", RMS_CONSTRAINTS, "dkfuse.kernels.peer_sgl:add_norm"),
)
