"""What tests on a GPU share: its compute capability, and random tensors on it."""

from __future__ import annotations

import torch


def capability() -> int:
    """90 for sm90."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Normal numbers; other sizes and other seeds give others."""
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)
