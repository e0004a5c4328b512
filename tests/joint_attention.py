"""Attention of two streams as models write it: projections of each, queries and keys normed, all three joined."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS = 64, 4


class JointAttention(nn.Module):
    """Attention of image and text. `dim`: of the tokens where the streams are joined, 1 for BSHD and 2 for BHSD."""

    def __init__(
        self,
        dim: int = 1,
        text_first: bool = True,
        bias: bool = True,
        text_width: int | None = None,
        norm: bool = True,
        width: int = WIDTH,
        heads: int = HEADS,
    ):
        super().__init__()
        self.dim, self.text_first, self.count = dim, text_first, heads
        for name in ("to_q", "to_k", "to_v"):
            self.add_module(name, nn.Linear(width, width, bias=bias))
        for name in ("add_k_proj", "add_v_proj", "add_q_proj"):
            self.add_module(name, nn.Linear(text_width or width, width, bias=bias))
        self.norm = nn.RMSNorm(width // heads) if norm else nn.Identity()

    def heads(self, x: Tensor, *layers: nn.Linear) -> list[Tensor]:
        split = [layer(x).unflatten(2, (self.count, -1)) for layer in layers]
        return [part.transpose(1, 2) for part in split] if self.dim == 2 else split

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        streams = [
            self.heads(image, self.to_q, self.to_k, self.to_v),
            self.heads(text, self.add_q_proj, self.add_k_proj, self.add_v_proj),
        ]
        if self.text_first:
            streams.reverse()
        q = torch.cat([self.norm(s[0]) for s in streams], self.dim)
        k = torch.cat([self.norm(s[1]) for s in streams], self.dim)
        v = torch.cat([s[2] for s in streams], self.dim)
        if self.dim == 1:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
