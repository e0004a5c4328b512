"""Random tensors to test kernels with."""

from __future__ import annotations

import torch


def random(*size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed + sum(size))
    return torch.randn(size, device=device, generator=generator, dtype=torch.float64).to(dtype)
