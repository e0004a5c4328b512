"""Models that are no diffusion transformers go through the backend as well: results no worse than eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dkfuse

transformers = pytest.importorskip("transformers")
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 100
SITES = {"bert": 5, "vit": 5, "llama": 9, "convnet": 1}  # the last is a GroupNorm, which no rule takes


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.GroupNorm(4, 16)),
            *(nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layers(x),)


def model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32)
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=100, **SMALL)), {"input_ids": TOKENS}
    if name == "vit":
        config = transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
        return transformers.ViTModel(config), {"pixel_values": image}
    if name == "llama":
        config = transformers.LlamaConfig(vocab_size=100, num_key_value_heads=2, **SMALL)
        return transformers.LlamaModel(config), {"input_ids": TOKENS, "use_cache": False}
    return ConvNet(), {"x": image}


@pytest.mark.parametrize("target", ["cpu", "sm90"])
@pytest.mark.parametrize("name", SITES)
def test_results_are_no_worse_than_eagers(name: str, target: str) -> None:
    module, inputs = model(name)
    module = module.eval().bfloat16()
    inputs = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    options = {"dkfuse.remainder": "eager", "dkfuse.target": target}
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        eager = module(**inputs)[0].double()
        ours = torch.compile(module, backend="dkfuse", dynamic=False, options=options)(**inputs)[0].double()
        wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        exact = module.double()(**wide)[0]
    assert len(coverage.sites) == SITES[name], str(coverage)
    assert (ours - exact).norm() <= 1.05 * (eager - exact).norm()
