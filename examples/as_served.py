"""Diffusion transformers as they are served, to look at and to measure: LoRAs, quantised weights, a ControlNet.

    dkfuse coverage examples/as_served.py:lora --target sm90
    dkfuse bench model examples/as_served.py:lora --layers 2 --no-warm --no-fp32      # with a GPU

Each function returns (module, kwargs) with published widths and random weights, on the GPU; without one on the meta
device, which is enough for the coverage. `lora` needs peft, `int8` and `fp8` need torchao, all need diffusers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dkfuse import zoo

Built = tuple[nn.Module, dict[str, Any]]
DEVICE = "cuda" if torch.cuda.is_available() else "meta"
LINEARS = r".*blocks\..*(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out)"


def _zoo(name: str, layers: int, size: str) -> Built:
    return zoo.build(name, size, DEVICE, layers=layers)


def lora(layers: int = 2, size: str = "full", rank: int = 16, adapters: int = 1) -> Built:
    """FLUX.1 with LoRAs on all linears of its blocks, not merged into the weights."""
    from peft import LoraConfig

    module, kwargs = _zoo("flux", layers, size)
    names = [f"lora_{i}" for i in range(adapters)]
    for name in names:
        # Weights at random: those that training begins with add nothing, which no comparison of results would notice.
        config = LoraConfig(r=rank, target_modules=LINEARS, init_lora_weights=False)
        module.add_adapter(config, name)  # type: ignore[operator]
    module.set_adapters(names)  # type: ignore[operator]
    return module.to(DEVICE, torch.bfloat16), kwargs  # peft adds a second one in fp32; loaded ones are in bf16


def two_loras(layers: int = 2, size: str = "full") -> Built:
    """FLUX.1 with two of them at once."""
    return lora(layers, size, adapters=2)


def _quantized(config: str, layers: int, size: str) -> Built:
    """Without torchao's settings for Inductor: kernels tuned one by one take minutes to compile, with any backend."""
    from torchao import quantization

    module, kwargs = _zoo("flux", layers, size)
    quantization.quantize_(module, getattr(quantization, config)(set_inductor_config=False))
    return module, kwargs


def int8(layers: int = 2, size: str = "full") -> Built:
    """FLUX.1 with torchao's int8 weights; activations stay bf16."""
    return _quantized("Int8WeightOnlyConfig", layers, size)


def fp8(layers: int = 2, size: str = "full") -> Built:
    """FLUX.1 with torchao's fp8 weights; activations stay bf16."""
    return _quantized("Float8WeightOnlyConfig", layers, size)


def controlnet(layers: int = 2, size: str = "full") -> Built:
    """Qwen-Image with what a ControlNet adds behind each block."""
    module, kwargs = _zoo("qwen-image", layers, size)
    hidden, width = kwargs["hidden_states"], module.inner_dim
    shape = (*hidden.shape[:-1], width)
    samples = [torch.randn(shape, device=DEVICE, dtype=hidden.dtype) for _ in range(layers)]  # type: ignore[arg-type]
    return module, {**kwargs, "controlnet_block_samples": samples}
