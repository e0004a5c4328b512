"""A small diffusion transformer (DiT, arXiv:2212.09748), compiled with dkfuse.

    python examples/toy_dit.py

Prints what was fused and where, and how far the compiled output is from the uncompiled model's. Nothing in the model is
written for dkfuse: the backend finds the sites in the traced graph.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkfuse


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """adaLN-Zero: shift, scale and gate of both branches come from the conditioning vector."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class ToyDiT(nn.Module):
    def __init__(self, width: int = 128, heads: int = 4, depth: int = 4, channels: int = 16, tokens: int = 64):
        super().__init__()
        self.width = width
        self.embed = nn.Linear(channels, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, channels)

    def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """latent [B, tokens, channels], timestep [B] in [0, 1] -> [B, tokens, channels]."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(self.width // 2, device=latent.device) / self.width * 2)
        angles = 1000 * timestep[:, None].float() * frequencies
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=1).to(latent.dtype))
        x = self.embed(latent) + self.position
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        return self.out(modulate(self.norm(x), shift, scale))


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ToyDiT().to(device, torch.bfloat16).eval()
    latent = torch.randn(2, 64, 16, device=device, dtype=torch.bfloat16)
    timestep = torch.tensor([0.25, 0.75], device=device)

    with torch.no_grad(), dkfuse.record("ToyDiT") as coverage:
        expected = model(latent, timestep)
        actual = torch.compile(model, backend="dkfuse")(latent, timestep)

    print(coverage)
    error = (actual - expected).float().norm() / expected.float().norm()
    print(f"relative difference from the uncompiled model: {error:.1e}")


if __name__ == "__main__":
    main()
