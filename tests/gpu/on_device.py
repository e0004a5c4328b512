"""What tests of attention on a GPU share: its compute capability, and random tensors on it."""

from __future__ import annotations

import torch


def capability() -> int:
    """90 for sm90."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)
