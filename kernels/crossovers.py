"""Where a provider's kernel was measured to be faster than Triton's: what the automatic choice goes by.

    ratio    time of the Triton kernel / time of the provider's, cold inputs, of one measured region

A region is an op, an architecture, a range of widths (D, head_dim, or columns normalised jointly) and of rows; `only`
names arguments that the call must have: (("norm", "rms"), ("out_dtype", torch.bfloat16)). What lies in no region was
not measured and is not chosen unless it is asked for by name. A row count that is a symbol lies only in regions without
limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

MARGIN = 1.02  # measurements differ by as much from run to run


@dataclass(frozen=True)
class Crossover:
    """One measured region; limits are inclusive, None is none. `source`: the command, device and versions."""

    op: str
    provider: str
    ratio: float
    source: str
    arch: str = "sm90"
    widths: tuple[int | None, int | None] = (None, None)
    rows: tuple[int | None, int | None] = (None, None)
    only: tuple[tuple[str, Any], ...] = ()

    def holds(self, op: str, target: str, arguments: Mapping[str, Any]) -> bool:
        """Whether a call lies in the region."""
        x = arguments["x"]
        count: Any = 1
        for size in x.shape[:-1]:
            count = count * size
        width = x.shape[-1]
        if (across := arguments.get("across")) is not None:
            width = width * x.shape[across]
        return (
            (self.op, self.arch) == (op, target)
            and _within(width, self.widths)
            and _within(count, self.rows)
            and all(arguments.get(name) == value for name, value in self.only)
        )


_CUTE = "H100, torch 2.11, nvidia-cutlass-dsl 4.6.0: dkfuse bench kernels --provider triton,cute"
# q and k are two launches of this kernel and one of Triton's
_CUDA = "H100, torch 2.11, NVRTC 13.0: dkfuse bench kernels --op norm_rope --provider triton,cuda"
_SGL = "H100, torch 2.11, sglang-kernel 0.4.5: RMSNorm with weight, before dkfuse bench kernels had such cases"
_FLASHINFER = "H100, torch 2.11, flashinfer-python 0.6.14: RMSNorm with weight, and rotations by half tables"
_LONG = (4096, 32760)

# The worst ratio measured in each region: no provider is ahead of Triton by the margin in all of one.
CROSSOVERS: tuple[Crossover, ...] = (
    Crossover("norm_modulate", "cute", 0.97, _CUTE, widths=(1536, 5120), rows=_LONG),
    Crossover("norm_modulate", "cute", 0.68, _CUTE, widths=(1152, 1152), rows=(256, 256)),
    Crossover("residual_norm_modulate", "cute", 0.99, _CUTE, widths=(1536, 5120), rows=_LONG),
    Crossover("residual_norm_modulate", "cute", 0.91, _CUTE, widths=(1152, 1152), rows=(256, 256)),
    Crossover("norm_rope", "cute", 1.00, _CUTE, widths=(1536, 5120), rows=(4096 * 12, 32760 * 40)),
    Crossover("norm_rope", "cuda", 0.94, _CUDA, widths=(64, 128), rows=(4096 * 24, 32760 * 40)),
    Crossover("norm_modulate", "sgl", 0.90, _SGL, widths=(3072, 5120), rows=_LONG),
    Crossover("residual_norm_modulate", "sgl", 0.50, _SGL, widths=(3072, 5120), rows=_LONG),
    Crossover("norm_modulate", "flashinfer", 0.96, _FLASHINFER, widths=(3072, 5120), rows=_LONG),
    Crossover("residual_norm_modulate", "flashinfer", 0.50, _FLASHINFER, widths=(3072, 5120), rows=_LONG),
    Crossover("norm_rope", "flashinfer", 0.68, _FLASHINFER, widths=(128, 128), rows=(4096 * 24, 32760 * 40)),
)


def ratio(provider: str, op: str, target: str, calls: Iterable[Mapping[str, Any]]) -> float | None:
    """How much faster than Triton's the provider's kernel was measured to be, at the worst of `calls`.

    None where one of them was not measured. Of regions that overlap the first one counts.
    """
    found = []
    for arguments in calls:
        regions = (c.ratio for c in CROSSOVERS if c.provider == provider and c.holds(op, target, arguments))
        if (value := next(regions, None)) is None:
            return None
        found.append(value)
    return min(found, default=None)


def _within(size: Any, limits: tuple[int | None, int | None]) -> bool:
    low, high = limits
    return (low is None or statically_known_true(size >= low)) and (high is None or statically_known_true(size <= high))
