"""`examples/as_served.py`: models with LoRAs, quantised weights and a ControlNet keep what the plain model has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import dkfuse

pytest.importorskip("diffusers")
NEEDS = {"lora": "peft", "two_loras": "peft", "int8": "torchao", "fp8": "torchao", "controlnet": "diffusers"}


@pytest.fixture
def served(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("as_served", root / "examples" / "as_served.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NEEDS)
def test_full_size_keeps_what_the_plain_model_has(served: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many sites are fused, with what a ControlNet adds, and as many GELUs go into GEMMs, but for LoRAs' sums."""
    pytest.importorskip(NEEDS[name])
    monkeypatch.setattr(served, "DEVICE", "meta")
    plain = fused(*dkfuse.zoo.build("qwen-image" if name == "controlnet" else "flux", "full", "meta", layers=1))
    found = fused(*getattr(served, name)(layers=1))
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
