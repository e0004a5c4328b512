"""One small block with a call for every provider: what adaLN, plain norms, QK norm and rotations look like together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH, TOKENS, WIDTH, HEADS = 2, 48, 256, 4

# provider -> who runs the sites where it is asked first and Triton second. One gated residual is left to Inductor, but
# not by `native`, which costs no kernel of its own.
RUNS = {
    "triton": {"triton": 12},
    "native": {"native": 13},
    "cute": {"cute": 8, "triton": 4},
    "cuda": {"cuda": 4, "triton": 8},
    "sgl": {"sgl": 1, "triton": 11},
    "flashinfer": {"flashinfer": 1, "triton": 11},
}


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pair = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return pair.flatten(-2).to(x.dtype)


def block(x: Tensor, c: Tensor, w: Tensor, heads: Tensor, row: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """adaLN, QK norm per head and rotation, a gated residual, norms across heads, and an RMSNorm before a linear."""
    shift, scale, gate, shift2, scale2, gate2 = c.chunk(6, -1)
    n = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    q, k, v = ((n @ w[i]).unflatten(-1, (HEADS, -1)).transpose(1, 2) for i in range(3))
    q, k = (rotated(F.rms_norm(t, (WIDTH // HEADS,), heads, 1e-6), cos, sin) for t in (q, k))
    x = x + gate[:, None] * (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ w[3])
    n = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale2[:, None]) + shift2[:, None]
    q, k = (F.rms_norm(n @ w[i], (WIDTH,), row, 1e-6).unflatten(-1, (HEADS, -1)).transpose(1, 2) for i in (4, 5))
    q, k = (rotated(t, cos, sin) for t in (q, k))
    x = x + gate2[:, None] * (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ w[6])
    return F.rms_norm(x @ w[7], (WIDTH,), row, 1e-6) @ w[0]


def inputs(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    angle = random(TOKENS, WIDTH // HEADS // 2)
    values = [
        random(BATCH, TOKENS, WIDTH),
        random(BATCH, 6 * WIDTH) / 4,
        random(8, WIDTH, WIDTH) / WIDTH**0.5,
        1 + random(WIDTH // HEADS) / 4,
        1 + random(WIDTH) / 4,
    ]
    return [*(v.to(device, dtype) for v in values), angle.cos().to(device), angle.sin().to(device)]
