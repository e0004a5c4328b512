"""Image models: Stable Diffusion 3, DiT, PixArt, Sana, Z-Image, Lumina 2, CogView4, AuraFlow and HiDream."""

from __future__ import annotations

from typing import Any

import torch

from .build import Built, Request


def sd3_medium(r: Request) -> Built:
    return _sd3(r, heads=24, positions=192)


def sd35_medium(r: Request) -> Built:
    dual = tuple(i for i in range(13) if i < r.depth)
    return _sd3(r, heads=24, positions=384, qk_norm="rms_norm", dual_attention_layers=dual)


def sd35_large(r: Request) -> Built:
    return _sd3(r, heads=38, positions=192, qk_norm="rms_norm")


def _sd3(r: Request, heads: int, positions: int, **config: Any) -> Built:
    from diffusers import SD3Transformer2DModel

    h, w = r.latent((8, 8), (128, 128))
    heads, text = r.pick(2, heads), r.text(12, 333)
    text_dim, pooled = r.pick(64, 4096), r.pick(32, 2048)
    module = r.build(
        SD3Transformer2DModel,
        num_layers=r.depth,
        num_attention_heads=heads,
        joint_attention_dim=text_dim,
        caption_projection_dim=heads * 64,
        pooled_projection_dim=pooled,
        pos_embed_max_size=r.pick(16, positions),
        sample_size=r.pick(8, 128),
        **config,
    )
    return module, {
        "hidden_states": r.randn(r.batch, 16, h, w),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "pooled_projections": r.randn(r.batch, pooled),
        "timestep": r.timestep(700.0, torch.float32),
        "return_dict": False,
    }


def dit_xl_2(r: Request) -> Built:
    from diffusers import DiTTransformer2DModel

    h, w = r.latent((8, 8), (32, 32))
    module = r.build(
        DiTTransformer2DModel,
        num_layers=r.depth,
        num_attention_heads=r.pick(2, 16),
        sample_size=h,
        out_channels=8,
    )
    return module, {
        "hidden_states": r.randn(r.batch, 4, h, w),
        "timestep": r.timestep(700, torch.int64),
        "class_labels": r.timestep(207, torch.int64),
        "return_dict": False,
    }


def pixart_sigma(r: Request) -> Built:
    from diffusers import PixArtTransformer2DModel

    h, w = r.latent((8, 8), (128, 128))
    heads, text, text_dim = r.pick(2, 16), r.text(12, 300), r.pick(64, 4096)
    module = r.build(
        PixArtTransformer2DModel,
        num_layers=r.depth,
        num_attention_heads=heads,
        cross_attention_dim=heads * 72,
        caption_channels=text_dim,
        sample_size=h,
        interpolation_scale=2,
        use_additional_conditions=False,
    )
    return module, {
        "hidden_states": r.randn(r.batch, 4, h, w),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "timestep": r.timestep(700, torch.int64),
        "encoder_attention_mask": r.mask(text, text // 2, torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def sana(r: Request) -> Built:
    from diffusers import SanaTransformer2DModel

    h, w = r.latent((4, 4), (32, 32))
    heads, text, text_dim = r.pick(7, 70), r.text(12, 300), r.pick(64, 2304)
    module = r.build(
        SanaTransformer2DModel,
        num_layers=r.depth,
        num_attention_heads=heads,
        num_cross_attention_heads=r.pick(2, 20),
        cross_attention_dim=heads * 32,
        caption_channels=text_dim,
    )
    return module, {
        "hidden_states": r.randn(r.batch, 32, h, w),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "timestep": r.timestep(700.0, torch.float32),
        "encoder_attention_mask": r.mask(text, text // 2, torch.int64),
        "return_dict": False,
    }


def z_image(r: Request) -> Built:
    from diffusers import ZImageTransformer2DModel

    h, w = r.latent((8, 8), (128, 128))
    heads, text, text_dim = r.pick(2, 30), r.text(32, 128), r.pick(64, 2560)
    module = r.build(
        ZImageTransformer2DModel,
        n_layers=r.depth,
        n_refiner_layers=r.pick(1, 2),
        dim=heads * 128,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=text_dim,
    )
    return module, {
        "x": [r.randn(16, 1, h, w) for _ in range(r.batch)],
        "t": r.timestep(0.3, torch.float32),
        "cap_feats": [r.randn(text, text_dim) for _ in range(r.batch)],
        "return_dict": False,
    }


def lumina2(r: Request) -> Built:
    from diffusers import Lumina2Transformer2DModel

    h, w = r.latent((8, 8), (128, 128))
    heads, text, text_dim = r.pick(6, 24), r.text(16, 256), r.pick(64, 2304)
    module = r.build(
        Lumina2Transformer2DModel,
        num_layers=r.depth,
        num_refiner_layers=r.pick(1, 2),
        hidden_size=heads * 96,
        num_attention_heads=heads,
        num_kv_heads=r.pick(2, 8),
        cap_feat_dim=text_dim,
    )
    return module, {
        "hidden_states": r.randn(r.batch, 16, h, w),
        "timestep": r.timestep(0.3, torch.float32),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "encoder_attention_mask": r.mask(text, dtype=torch.int64),
        "return_dict": False,
    }


def cogview4(r: Request) -> Built:
    from diffusers import CogView4Transformer2DModel

    h, w = r.latent((8, 8), (128, 128))
    text, text_dim = r.text(16, 224), r.pick(64, 4096)
    module = r.build(
        CogView4Transformer2DModel,
        num_layers=r.depth,
        num_attention_heads=r.pick(2, 32),
        attention_head_dim=128,
        text_embed_dim=text_dim,
        time_embed_dim=r.pick(64, 512),
        condition_dim=r.pick(32, 256),
        rope_axes_dim=(256, 256),
    )
    size = torch.full((r.batch, 2), 1024.0, device=r.device, dtype=r.dtype)
    return module, {
        "hidden_states": r.randn(r.batch, 16, h, w),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "timestep": r.timestep(700.0),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
        "return_dict": False,
    }


def auraflow(r: Request) -> Built:
    from diffusers import AuraFlowTransformer2DModel

    joint, single = r.depths()
    h, w = r.latent((8, 8), (128, 128))
    heads, text, text_dim = r.pick(2, 12), r.text(16, 256), r.pick(64, 2048)
    module = r.build(
        AuraFlowTransformer2DModel,
        num_mmdit_layers=joint,
        num_single_dit_layers=single,
        num_attention_heads=heads,
        caption_projection_dim=heads * 256,
        joint_attention_dim=text_dim,
        sample_size=r.pick(8, 64),
        pos_embed_max_size=r.pick(64, 9216),
    )
    return module, {
        "hidden_states": r.randn(r.batch, 4, h, w),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "timestep": r.timestep(0.7),
        "return_dict": False,
    }


def hidream(r: Request) -> Built:
    from diffusers import HiDreamImageTransformer2DModel

    double, single = r.depths()
    blocks = double + single
    h, w = r.latent((8, 8), (128, 128))
    text, text_dim, pooled = r.text(8, 128), r.pick(64, 4096), r.pick(32, 2048)
    module = r.build(
        HiDreamImageTransformer2DModel,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=r.pick(2, 20),
        attention_head_dim=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        caption_channels=[text_dim, text_dim],
        text_emb_dim=pooled,
        axes_dims_rope=(64, 32, 32),
        max_resolution=(h, w),
        llama_layers=[min(i, 31) for i in range(blocks)],
    )
    return module, {
        "hidden_states": r.randn(r.batch, 16, h, w),
        "timesteps": r.timestep(700.0, torch.float32),
        "encoder_hidden_states_t5": r.randn(r.batch, text, text_dim),
        "encoder_hidden_states_llama3": r.randn(min(blocks, 32), r.batch, text, text_dim),
        "pooled_embeds": r.randn(r.batch, pooled),
        "return_dict": False,
    }
