"""Diffusion transformers that no rule was written for and the zoo does not have: what an H100 would fuse, pinned.

Two blocks a stack, two heads of the published size, random weights; traced, not run. Run and compared with eager and
fp64 are the zoo's models, in `test_zoo_fusions`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dkfuse
from dkfuse import Settings, Status
from dkfuse.zoo.build import Model, Request

from .test_zoo_fusions import compared

diffusers = pytest.importorskip("diffusers")
BF16 = torch.bfloat16
Inputs = Callable[[Callable[..., torch.Tensor]], dict[str, Any]]


def any_flow(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 2, 16, 16, 16),
        "timestep": torch.full((1, 2), 500.0),
        "r_timestep": torch.full((1, 2), 400.0),
        "encoder_hidden_states": randn(1, 16, 64),
    }


def cosmos(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 16, 2, 16, 16),
        "timestep": randn(1, 1, 2, 1, 1),
        "encoder_hidden_states": randn(1, 16, 96),
        "fps": 24,
    }


def easy_animate(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": randn(1, 16, 64),
        "timestep": torch.tensor([700]),
    }


def ernie(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 16, 4, 4),
        "text_bth": randn(1, 16, 64),
        "text_lens": torch.tensor([16]),
        "timestep": torch.tensor([700.0]),
    }


def flux3(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    def ids(count: int, stream: float) -> torch.Tensor:
        at = torch.arange(float(count))
        return torch.stack([torch.full_like(at, stream), at // 4, at % 4, 0 * at], -1)

    return {
        "hidden_states": randn(1, 16, 16),
        "image_cond_hidden_states": randn(1, 16, 16),
        "encoder_hidden_states": randn(1, 12, 96),
        "timestep": torch.tensor([0.6]),
        "img_ids": ids(16, 0.0),
        "image_cond_ids": ids(16, 1.0),
        "txt_ids": ids(12, 3.0),
    }


def fibo2(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 8, 8, 8),
        "context_latents": [randn(1, 8, 8, 8)],
        "encoder_hidden_states": randn(1, 2, 12, 64),
        "timestep": torch.tensor([0.5]),
    }


def joy_image(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 16, 1, 8, 8),
        "encoder_hidden_states": randn(1, 12, 96),
        "timestep": torch.tensor([500]),
    }


def kandinsky(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 2, 8, 8, 16),
        "encoder_hidden_states": randn(1, 16, 64),
        "pooled_projections": randn(1, 32),
        "timestep": torch.tensor([700.0]),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(16),
    }


def krea(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 16, 64),
        "encoder_hidden_states": randn(1, 8, 2, 128),
        "timestep": torch.tensor([0.5], dtype=BF16),
        "position_ids": torch.arange(24.0)[:, None].expand(24, 3),
    }


def prx(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 16, 8, 8),
        "encoder_hidden_states": randn(1, 16, 64),
        "timestep": torch.tensor([1.0]),
    }


def qwen_image_21(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    mask = torch.arange(12)[None] >= 8
    return {
        "hidden_states": randn(1, 16, 16),
        "encoder_hidden_states": randn(1, 8, 96),
        "timestep": torch.tensor([0.6]),
        "img_shapes": [[(1, 4, 4)]],
        "img_mask": mask,
    }


def stable_audio(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    angles = torch.randn(17, 16)  # the global state is a token too
    return {
        "hidden_states": randn(1, 64, 16),
        "encoder_hidden_states": randn(1, 8, 64),
        "global_hidden_states": randn(1, 1, 128),
        "timestep": torch.tensor([0.5], dtype=BF16),
        "rotary_embedding": (torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)),
    }


HEADS = {"num_layers": 2, "num_attention_heads": 2}
CASES: dict[str, tuple[dict[str, Any], Inputs, dict[str, int]]] = {
    "AnyFlowTransformer3DModel": (  # a timestep for each frame
        {
            **HEADS,
            "attention_head_dim": 128,
            "text_dim": 64,
            "freq_dim": 64,
            "ffn_dim": 512,
            "rope_max_seq_len": 64,
        },
        any_flow,
        {
            "gated_residual": 4,
            "norm_modulate": 1,
            "qk_norm": 8,
            "residual_norm": 2,
            "residual_norm_modulate": 4,
            "rotation": 4,
        },
    ),
    "CosmosTransformer3DModel": (  # Predict2.5: a timestep for each frame, projected for each norm
        {
            **HEADS,
            "attention_head_dim": 128,
            "in_channels": 16,
            "text_embed_dim": 64,
            "adaln_lora_dim": 64,
            "max_size": (8, 32, 32),
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 96,
            "encoder_hidden_states_channels": 64,
        },
        cosmos,
        {"gated_residual": 6, "norm_modulate": 1, "qk_norm": 8, "residual_norm_modulate": 6, "rotation": 4},
    ),
    "EasyAnimateTransformer3DModel": (
        {**HEADS, "mmdit_layers": 2, "in_channels": 4, "out_channels": 4, "patch_size": 2, "text_embed_dim": 64},
        easy_animate,
        {
            "gated_residual": 6,
            "norm_modulate": 3,
            "qk_norm": 8,
            "residual_norm": 1,
            "residual_norm_modulate": 5,
            "rotation": 4,
        },
    ),
    "ErnieImageTransformer2DModel": (
        {**HEADS, "hidden_size": 256, "ffn_hidden_size": 256, "in_channels": 16, "text_in_dim": 64},
        ernie,
        {"gated_residual": 4, "norm_modulate": 1, "qk_norm": 4, "residual_norm_modulate": 4, "rotation": 4},
    ),
    "Flux3Transformer2DModel": (  # attention and MLP side by side, a modulation for each token
        {
            **HEADS,
            "num_single_layers": 2,
            "in_channels": 16,
            "cond_in_channels": 16,
            "attention_head_dim": 64,
            "joint_attention_dim": 96,
            "timestep_channels": 64,
            "axes_dims_rope": (16, 16, 16, 16),
        },
        flux3,
        {"gated_residual": 7, "norm_modulate": 4, "qk_norm": 16, "residual_norm_modulate": 7, "rotation": 16},
    ),
    "BriaFibo2Transformer2DModel": (  # tokens pick one of two projections' modulations
        {
            "in_channels": 8,
            "dim": 128,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "cap_feat_dim": 64,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 2,
            "min_num_gist_tokens": 8,
            "max_num_gist_tokens": 16,
            "gist_step": 8,
            "gist_min_text_len": 8,
            "gist_max_text_len": 32,
            "axes_dims": (16, 24, 24),
            "axes_lens": (64, 32, 32),
        },
        fibo2,
        {
            "gated_residual": 8,
            "norm": 1,
            "norm_modulate": 5,
            "qk_norm": 18,
            "residual_norm": 7,
            "residual_norm_modulate": 6,
            "rotation": 8,
            "sandwich": 7,
        },
    ),
    "JoyImageEditTransformer3DModel": (  # the graph breaks behind the patch embedding: a strided stream is an input
        {
            **HEADS,
            "in_channels": 16,
            "hidden_size": 128,
            "text_dim": 96,
            "rope_dim_list": [16, 24, 24],
            "mlp_width_ratio": 2.0,
            "rope_type": "mrope",
        },
        joy_image,
        {
            "gated_residual": 6,
            "norm_modulate": 2,
            "qk_norm": 8,
            "residual_norm": 1,
            "residual_norm_modulate": 5,
            "rotation": 8,
        },
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "in_text_dim": 64,
            "in_text_dim2": 32,
            "time_dim": 64,
            "model_dim": 128,
            "ff_dim": 256,
            "num_text_blocks": 2,
            "num_visual_blocks": 2,
        },
        kandinsky,
        {"gated_residual": 9, "norm": 1, "norm_modulate": 2, "qk_norm": 12, "residual_norm_modulate": 9, "rotation": 8},
    ),
    "Krea2Transformer2DModel": (
        {
            **HEADS,
            "num_key_value_heads": 1,
            "intermediate_size": 256,
            "text_hidden_dim": 128,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 128,
        },
        krea,
        {"gated_residual": 4, "norm_modulate": 3, "qk_norm": 12, "residual_norm_modulate": 11, "rotation": 4},
    ),
    "PRXTransformer2DModel": (
        {"hidden_size": 128, "num_heads": 2, "depth": 2, "context_in_dim": 64, "axes_dim": [32, 32]},
        prx,
        {"gated_residual": 4, "norm_modulate": 1, "qk_norm": 6, "residual_norm_modulate": 4, "rotation": 4},
    ),
    "QwenImage21Transformer2DModel": (  # text and reference tokens pick the modulation of timestep 0
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 16,
            "attention_head_dim": 64,
            "context_in_dim": 96,
            "axes_dims_rope": (16, 24, 24),
        },
        qwen_image_21,
        {"gated_residual": 4, "norm_modulate": 2, "qk_norm": 4, "residual_norm_modulate": 4, "rotation": 4},
    ),
    "StableAudioDiTModel": (
        {
            **HEADS,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 64,
            "cross_attention_input_dim": 64,
            "global_states_input_dim": 128,
        },
        stable_audio,
        {"norm": 1, "residual_norm": 5, "rotation": 4},
    ),
}


def built(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    config, inputs, _ = CASES[name]
    model = Model(name, name, "", (2,), lambda request: (request.build(getattr(diffusers, name), **config), {}))
    request = Request(model, full=False, device=torch.device("cpu"), dtype=BF16, layers=None, batch=1)
    return model.factory(request)[0], inputs(request.randn)


@pytest.mark.parametrize("name", list(CASES))
def test_fused(name: str) -> None:
    module, inputs = built(name)
    coverage = dkfuse.coverage(module, settings=Settings(target="sm90"), **inputs)
    fused = Counter(site.family for site in coverage.sites if site.status is Status.FUSED)
    assert dict(fused) == CASES[name][2], "\n" + str(coverage)
    others = {site.reason.code for site in coverage.sites if site.reason is not None}
    assert others <= {"pointwise", "feeds_pointwise"}, "\n" + str(coverage)


@pytest.mark.parametrize("name", ["AnyFlowTransformer3DModel", "CosmosTransformer3DModel"])
def test_kernels_read_rows_of_frames(name: str, fused_graphs: list[torch.fx.Graph]) -> None:
    """And so do linears of the frames' timesteps; the result is as near as eager's."""
    _, found, bound = compared(*built(name), **{"dkfuse.target": "sm90"})
    assert found <= bound
    (graph,) = fused_graphs
    ops = (torch.ops.dkfuse.norm_modulate.default, torch.ops.dkfuse.residual_norm_modulate.default)
    calls = [node for op in ops for node in graph.find_nodes(op="call_function", target=op)]
    modulated = [node for node in calls if node.args[ops.index(node.target) * 3 + 3] is not None]
    assert len(modulated) >= CASES[name][2]["norm_modulate"] + CASES[name][2]["residual_norm_modulate"]
    for node in modulated:
        streams = [i for i in node.all_input_nodes if i.meta["val"].numel() >= 128 * 256]
        assert len(streams) == 1 + (node.target is ops[1]), node.format_node()
