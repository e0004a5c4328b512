"""`examples/as_served.py`: models with LoRAs, quantised weights and a ControlNet keep what the plain model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dkfuse
from dkfuse import zoo
from dkfuse.cli.loading import load_real

pytest.importorskip("diffusers")
NEEDS = {"lora": "peft", "two_loras": "peft", "int8": "torchao", "fp8": "torchao", "controlnet": "diffusers"}


@pytest.mark.parametrize("name", NEEDS)
def test_full_size_keeps_what_the_plain_model_has(name: str, root: Path) -> None:
    """As many sites are fused, with what a ControlNet adds, and as many GELUs go into GEMMs, but for LoRAs' sums."""
    pytest.importorskip(NEEDS[name])
    plain = fused(*zoo.build("qwen-image" if name == "controlnet" else "flux", "full", "meta", layers=1))
    found = fused(*load_real(f"{root}/examples/as_served.py:{name}", {"layers": 1}))
    assert found["sites"] == plain["sites"] > 10
    assert found["added"] == (name == "controlnet")
    assert found["gelus"] == (0 if "lora" in name else plain["gelus"])


def fused(module: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, int]:
    coverage = dkfuse.coverage(module, settings=dkfuse.Settings(target="sm90"), **kwargs)
    taken = [site.family for site in coverage.seams if site.status is dkfuse.Status.FUSED]
    rules = [site.rule for site in coverage.fused() if not site.with_site]
    return {
        "sites": len(coverage.fused()),
        "gelus": taken.count("gelu_epilogue"),
        "added": rules.count("residual_two_norm_modulate"),
    }
