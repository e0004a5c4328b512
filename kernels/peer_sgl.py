"""sgl-kernel's `rmsnorm` and `fused_add_rmsnorm` as norm_modulate and residual_norm_modulate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sgl_kernel  # noqa: F401  (registers torch.ops.sgl_kernel)
import torch

from .peer_norms import run_add_norm, run_norm

ALIGNMENT = 16


def norm(arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """out = x*rsqrt(mean(x^2) + eps)*weight."""
    run_norm(_norm, arguments, outputs, ALIGNMENT)


def add_norm(arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """sum = residual + x and out = its norm; two copies more than the kernel alone."""
    run_add_norm(_add_norm, arguments, outputs, ALIGNMENT)


def _norm(x: Any, weight: Any, eps: float, out: Any) -> None:
    torch.ops.sgl_kernel.rmsnorm.default(out, x, weight, eps, _dependent_launch(x))


def _add_norm(x: Any, residual: Any, weight: Any, eps: float) -> None:
    torch.ops.sgl_kernel.fused_add_rmsnorm.default(x, residual, weight, eps, _dependent_launch(x))


def _dependent_launch(x: Any) -> bool:
    """Programmatic dependent launch, which Hopper and later have and the package uses there."""
    return torch.cuda.get_device_capability(x.device)[0] >= 9
