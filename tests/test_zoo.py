"""The zoo: every model runs tiny, is deterministic, and traces weightless into the same graphs as with weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

import dkfuse
from dkfuse import zoo
from dkfuse.errors import ModelError
from dkfuse.reporting.weightless import SMALL, WeightlessMode, mode_of, without_memory

pytest.importorskip("diffusers")
NAMES = list(zoo.MODELS)
SEVERAL_GRAPHS = {"hidream", "hunyuan-video-15", "lumina2", "mochi", "z-image"}  # the others have one graph


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def graphs(module: nn.Module, kwargs: dict[str, Any]) -> list[list[str]]:
    """The call targets of each graph that Dynamo makes of a call."""
    seen: list[list[str]] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable:
        seen.append([str(node.target) for node in gm.graph.nodes if node.op == "call_function"])
        return gm.forward

    torch.compiler.reset()
    with mode_of(module, kwargs), torch.no_grad():
        torch.compile(module, backend=backend, dynamic=False)(**kwargs)
    torch.compiler.reset()
    return seen


def test_there_are_25() -> None:
    assert len(NAMES) == 25
    assert all(name == name.lower() and "_" not in name for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_runs_and_repeats(name: str) -> None:
    results = []
    for _ in range(2):
        module, kwargs = zoo.build(name)
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert sum(parameter.numel() for parameter in module.parameters()) < 60e6
        with torch.no_grad():
            results.append(tensors(module(**kwargs)))
    assert results[0]
    for first, second in zip(*results, strict=True):
        assert first.dtype is torch.bfloat16
        assert torch.isfinite(first).all()
        assert 0.2 < first.float().std() < 5
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", [*sorted(SEVERAL_GRAPHS), "flux", "sd35-medium", "wan22-5b"])
def test_weightless_traces_the_same_graphs(name: str) -> None:
    module, kwargs = zoo.build_fake(name, "tiny")
    assert all(isinstance(parameter, FakeTensor) for parameter in module.parameters())
    fake = graphs(module, kwargs)
    if name == "hidream":  # the tokens of a mixture of experts cannot be counted without values
        assert len(fake) > 10
        return
    assert fake == graphs(*zoo.build(name))
    assert (len(fake) > 1) == (name in SEVERAL_GRAPHS)


@pytest.mark.parametrize("name", NAMES)
def test_full_size_has_the_published_depth_and_needs_no_memory(name: str) -> None:
    model = zoo.find(name)
    module, kwargs = zoo.build_fake(name)
    stacks = [len(child) for child in module.children() if isinstance(child, nn.ModuleList)]
    assert set(model.depth) <= set(stacks)
    real = [tensor for tensor in (*module.parameters(), *tensors(kwargs)) if not isinstance(tensor, FakeTensor)]
    assert sum(tensor.numel() for tensor in real) < 5e6
    assert sum(parameter.numel() for parameter in module.parameters()) > 4e8


def test_layers_latent_text_batch_and_config() -> None:
    module, kwargs = zoo.build("flux", layers=(1, 3), batch=2, latent=(4, 6), text=5, guidance_embeds=False)
    assert (len(module.transformer_blocks), len(module.single_transformer_blocks)) == (1, 3)
    assert kwargs["hidden_states"].shape == (2, 6, 64)
    assert kwargs["encoder_hidden_states"].shape[1] == 5
    assert module.time_text_embed.__class__.__name__ == "CombinedTimestepTextProjEmbeddings"
    with pytest.raises(ValueError, match="2 stacks"):
        zoo.build("flux", layers=(1, 2, 3))


def test_dtypes_follow_from_pretrained() -> None:
    module, _ = zoo.build("wan21-1.3b")
    assert module.scale_shift_table.dtype is torch.float32
    assert module.blocks[0].attn1.to_q.weight.dtype is torch.bfloat16
    assert zoo.build("flux", dtype=torch.float16)[1]["hidden_states"].dtype is torch.float16


def test_names() -> None:
    assert zoo.find("Wan21_14B").name == "wan21-14b"
    with pytest.raises(ModelError, match="no model 'flux1' in the zoo; did you mean 'flux'"):
        zoo.find("flux1")
    with pytest.raises(ModelError, match="size 'huge' is not allowed: give tiny or full"):
        zoo.build("flux", "huge")


def test_another_size_of_a_model() -> None:
    entry = zoo.find("Hunyuan_Video:480P")
    assert (entry.name, entry.depth, entry.tokens) == ("hunyuan-video:480p", (20, 40), "25440 video + 256 text")
    _, kwargs = zoo.build_fake("hunyuan-video:480p", layers=1)
    assert kwargs["hidden_states"].shape == (1, 16, 16, 60, 106)
    with pytest.raises(ModelError, match="no size '481p' of hunyuan-video; did you mean '480p'"):
        zoo.find("hunyuan-video:481p")
    with pytest.raises(ModelError, match="no size '480p' of flux; it has one only"):
        zoo.find("flux:480p")
    with pytest.raises(ModelError, match="hunyuan-video:480p is a full size; ask for size full, or for hunyuan-video"):
        zoo.build("hunyuan-video:480p")


def test_the_tokens_of_other_sizes() -> None:
    for name, size in (("hunyuan-video", "480p"), ("wan21-14b", "720p")):
        variant = zoo.MODELS[name].variants[size]
        f, h, w = variant.latent
        assert variant.tokens.startswith(f"{f * (h // 2) * (w // 2)} video")  # patches of 1 x 2 x 2


def test_weightless_mode_keeps_small_values_real() -> None:
    mode = WeightlessMode()
    with mode:
        weight = torch.empty(8, 4)
    mode.keeps_real = True
    mask = torch.tensor([True, False, True, False, False, False, False, True])
    with mode:
        assert mask.sum().item() == 3
        assert weight[mask].shape == (3, 4)
        assert isinstance(weight[mask], FakeTensor)
        large = torch.ones(SMALL // 2 + 1, 1) * torch.ones(1, 2)
        assert isinstance(large, FakeTensor)
        with pytest.raises(DataDependentOutputException):
            weight.sum().item()
    assert isinstance(weight * mask[:, None], FakeTensor)  # outside the mode too


def test_coverage_traces_a_copy_of_a_model_on_the_meta_device() -> None:
    """Traced as it is, torch would fold all of it away, and nothing would be found, silently."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)).requires_grad_(False)
        x = torch.empty(2, 16, 64)
    coverage = dkfuse.coverage(module, x, settings=dkfuse.Settings(target="sm90"))
    assert coverage.totals["sites"] == 1 and coverage.graphs[0].nodes > 5
    assert all(p.device.type == "meta" and type(p) is nn.Parameter for p in module.parameters())


def test_meta_models_become_fake_and_stay_tied() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        x = torch.empty(2, 4)
    module[2].weight = module[0].weight
    made, kwargs = without_memory(module, {"input": x, "other": torch.ones(2)})
    assert made is module
    assert module[2].weight is module[0].weight
    assert isinstance(module[1].running_mean, FakeTensor)
    assert not isinstance(kwargs["other"], FakeTensor)
    with mode_of(module, kwargs):
        assert module(kwargs["input"]).shape == (2, 4)
    real = nn.Linear(2, 2)
    assert without_memory(real, {})[0].weight.device.type == "cpu"
