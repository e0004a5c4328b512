"""Transformer blocks as a newcomer would write them, one per family of models, and a model that stacks any of them.

adaLN-Zero      DiT, SD3        six vectors from silu(c)
cross attention Wan             table + time embedding in fp32, ungated cross-attention behind an affine norm
per token       LTX, Wan 2.2    a row of the table for every token, RMSNorm without weight
single stream   Flux            attention and MLP in parallel, one projection of both
double stream   MMDiT           text and image with weights of their own and joint attention
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, TOKENS, TEXT = 64, 2, 12, 5


def bare_norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(2 * WIDTH, WIDTH))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.out(attend(self.q(x), self.k(context), self.v(context)))


class AdaLNZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = bare_norm(), bare_norm()
        self.attention, self.mlp = Attention(), mlp()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        n = self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None]
        x = x + gate1.unsqueeze(1) * self.attention(n)
        n = self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None]
        return x + gate2.unsqueeze(1) * self.mlp(n), text


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm3 = bare_norm(), bare_norm()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.attention, self.cross, self.mlp = Attention(), Attention(), mlp()
        self.table = nn.Parameter(torch.randn(1, 6, WIDTH) / 8)
        self.time = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.table + self.time(c).unflatten(-1, (6, -1)).float()
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.chunk(6, dim=1)
        n = (self.norm1(x.float()) * (1 + scale1) + shift1).type_as(x)
        x = (x.float() + self.attention(n) * gate1).type_as(x)
        x = x + self.cross(self.norm2(x), text)
        n = (self.norm3(x.float()) * (1 + scale2) + shift2).type_as(x)
        return (x.float() + self.mlp(n) * gate2).type_as(x), text


class PerToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(WIDTH, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attention, self.cross, self.mlp = Attention(), Attention(), mlp()
        self.table = nn.Parameter(torch.randn(6, WIDTH) / 8)
        self.time = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        # every token at a time of its own
        times = c[:, None] * torch.linspace(0, 1, x.shape[1], dtype=c.dtype)[:, None]
        rows = self.table[None, None] + self.time(times).unflatten(-1, (6, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(dim=2)
        x = x + self.attention(self.norm1(x) * (1 + scale1) + shift1) * gate1
        x = x + self.cross(x, text)
        return x + self.mlp(self.norm2(x) * (1 + scale2) + shift2) * gate2, text


class SingleStream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = bare_norm()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(WIDTH // HEADS, eps=1e-6) for _ in range(2))
        self.up, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 3 * WIDTH))

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([text, x], dim=1)
        shift, scale, gate = self.modulation(c).chunk(3, dim=1)
        n = self.norm(joined) * (1 + scale[:, None]) + shift[:, None]
        q = self.norm_q(self.q(n).unflatten(-1, (HEADS, -1))).flatten(2)
        k = self.norm_k(self.k(n).unflatten(-1, (HEADS, -1))).flatten(2)
        attention = attend(q, k, self.v(n))
        branch = self.out(torch.cat([attention, F.gelu(self.up(n), approximate="tanh")], dim=2))
        joined = joined + gate.unsqueeze(1) * branch
        return joined[:, text.shape[1] :], joined[:, : text.shape[1]]


class DoubleStream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(bare_norm() for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.mlps = nn.ModuleList(mlp() for _ in range(2))
        self.modulations = nn.ModuleList(nn.Linear(WIDTH, 6 * WIDTH) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        rows = [m(F.silu(c)).unsqueeze(1).chunk(6, dim=-1) for m in self.modulations]
        streams = [x, text]
        normed = [self.norms[i](s) * (1 + rows[i][1]) + rows[i][0] for i, s in enumerate(streams)]
        parts = [self.qkv[i](n).chunk(3, dim=-1) for i, n in enumerate(normed)]
        joint = attend(*(torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)))
        split = [joint[:, : x.shape[1]], joint[:, x.shape[1] :]]
        for i in (0, 1):
            shift, scale, gate = rows[i][3:]
            streams[i] = streams[i] + rows[i][2] * self.out[i](split[i])
            branch = self.mlps[i](self.norms[2 + i](streams[i]) * (1 + scale) + shift)
            streams[i] = streams[i] + gate * branch
        return streams[0], streams[1]


class Toy(nn.Module):
    """`depth` blocks of one kind and a final layer."""

    def __init__(self, block: type[nn.Module], depth: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm, self.modulation, self.out = bare_norm(), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x, text = block(x, text, c)
        return self.final(x, c)

    def final(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(c)).chunk(2, dim=1)
        return self.out(self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :])


def toy(block: type[nn.Module], depth: int = 2, kind: type[Toy] = Toy) -> Toy:
    torch.manual_seed(0)
    return kind(block, depth).to(torch.bfloat16).eval()


def toy_inputs(batch: int = 2, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, tokens, WIDTH), (batch, TEXT, WIDTH), (batch, WIDTH))
    x, text, c = (torch.randn(s, generator=generator).to(torch.bfloat16) for s in shapes)
    return x, text, c
