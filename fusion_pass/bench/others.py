"""Models that are no diffusion transformers, for "never slower": they must lose nothing by the backend.

    vit       ViT-B/16 of transformers, batch 8, 224 px
    bert      BERT-base of transformers, batch 8, 512 tokens
    llama     blocks of Llama-2-7B's width, 2048 tokens
    convnet   residual blocks of 3x3 convolutions, 256 px, batch 16

Random weights; each function returns (module, keyword arguments of forward).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]


class Residual(nn.Module):
    """x + conv(relu(norm(conv(x)))), behind a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class ConvNet(nn.Module):
    """A stem, `layers` residual blocks with a halving in the middle, and a classifier."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, stride=2, padding=3)
        self.first = nn.Sequential(*(Residual(width) for _ in range(layers - layers // 2)))
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.second = nn.Sequential(*(Residual(2 * width) for _ in range(layers // 2)))
        self.head = nn.Linear(2 * width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.down(self.first(torch.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def convnet(tiny: bool, layers: int, batch: int | None) -> Built:
    pixels = 32 if tiny else 256
    module = ConvNet(8 if tiny else 64, layers)
    return module, {"x": torch.randn(batch or (2 if tiny else 16), 3, pixels, pixels)}


def vit(tiny: bool, layers: int, batch: int | None) -> Built:
    from transformers import ViTConfig, ViTModel

    width, pixels = (32, 32) if tiny else (768, 224)
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16 if tiny else 12,
        image_size=pixels,
    )
    return ViTModel(config), {"pixel_values": torch.randn(batch or (2 if tiny else 8), 3, pixels, pixels)}


def bert(tiny: bool, layers: int, batch: int | None) -> Built:
    from transformers import BertConfig, BertModel

    width, tokens = (32, 16) if tiny else (768, 512)
    config = BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16 if tiny else 12,
    )
    ids = torch.randint(0, config.vocab_size, (batch or (2 if tiny else 8), tokens))
    return BertModel(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def llama(tiny: bool, layers: int, batch: int | None) -> Built:
    from transformers import LlamaConfig, LlamaModel

    width, tokens = (64, 16) if tiny else (4096, 2048)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=128 if tiny else 11008,
        num_hidden_layers=layers,
        num_attention_heads=width // 32 if tiny else 32,
        use_cache=False,
    )
    return LlamaModel(config), {"input_ids": torch.randint(0, 1000, (batch or 1, tokens))}


OTHERS: dict[str, Callable[[bool, int, int | None], Built]] = {
    "vit": vit,
    "bert": bert,
    "llama": llama,
    "convnet": convnet,
}
DEFAULT_LAYERS = {"vit": 12, "bert": 12, "llama": 4, "convnet": 8}
TINY_LAYERS = 2
