"""Transformers with a ControlNet: the norm behind it takes the block's branch and what is added then in one op."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dkfuse
from dkfuse import Settings, zoo

from .test_zoo_fusions import compared

pytest.importorskip("diffusers")
RULE = "residual_two_norm_modulate"
CASES = {  # the argument, and how many of the sums a norm of the same stream reads: behind the last block too
    "flux": ("controlnet_block_samples", 1),  # there follow single-stream blocks, with the text in front
    "sd3-medium": ("block_controlnet_hidden_states", 1),  # the last block is given none
    "qwen-image": ("controlnet_block_samples", 2),
}


def controlled(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    module, kwargs = zoo.build(name)
    hidden = kwargs["hidden_states"]
    batch, *rest = hidden.shape
    tokens = rest[0] if hidden.dim() == 3 else rest[1] * rest[2] // module.config.patch_size**2
    generator = torch.Generator().manual_seed(0)
    size = (batch, tokens, module.inner_dim)
    samples = [torch.randn(size, generator=generator).to(hidden.dtype) for _ in module.transformer_blocks]
    return module, {**kwargs, CASES[name][0]: samples}


@pytest.mark.parametrize("name", CASES)
def test_what_a_controlnet_adds_is_fused(name: str) -> None:
    coverage, found, bound = compared(*controlled(name))
    fused = [site for site in coverage.fused() if site.rule == RULE and not site.with_site]
    assert len(fused) == CASES[name][1], str(coverage)
    assert found <= bound, f"less accurate than eager: {found:.3g}, eager {bound:.3g}"


def test_an_h100_has_a_kernel_for_it() -> None:
    module, kwargs = controlled("qwen-image")
    coverage = dkfuse.coverage(module, settings=Settings(target="sm90"), **kwargs)
    kernels = {site.kernel for site in coverage.fused() if site.rule == RULE}
    assert kernels == {"triton"}, str(coverage)
