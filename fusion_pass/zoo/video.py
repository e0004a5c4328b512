"""Video models: Wan, HunyuanVideo, LTX, CogVideoX and Mochi."""

from __future__ import annotations

from typing import Any

import torch

from .build import Built, Request


def wan21_14b(r: Request) -> Built:
    return _wan(r, heads=40, ffn=13824, channels=16, latent=(21, 60, 104))


def wan21_1_3b(r: Request) -> Built:
    return _wan(r, heads=12, ffn=8960, channels=16, latent=(21, 60, 104))


def wan22_5b(r: Request) -> Built:
    return _wan(r, heads=24, ffn=14336, channels=48, latent=(31, 44, 80), per_token=True)


def _wan(
    r: Request, heads: int, ffn: int, channels: int, latent: tuple[int, int, int], per_token: bool = False
) -> Built:
    from diffusers import WanTransformer3DModel

    f, h, w = r.latent((2, 8, 8), latent)
    text, text_dim = r.text(16, 512), r.pick(64, 4096)
    module = r.build(
        WanTransformer3DModel,
        num_layers=r.depth,
        num_attention_heads=r.pick(2, heads),
        ffn_dim=r.pick(512, ffn),
        in_channels=channels,
        out_channels=channels,
        text_dim=text_dim,
    )
    frame = (h // 2) * (w // 2)
    timestep = r.timestep(700.0, torch.float32)
    if per_token:  # image to video: one timestep per token, the first frame is clean
        timestep = timestep[:, None].repeat(1, f * frame)
        timestep[:, :frame] = 0
    return module, {
        "hidden_states": r.randn(r.batch, channels, f, h, w),
        "timestep": timestep,
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "return_dict": False,
    }


def hunyuan_video(r: Request) -> Built:
    from diffusers import HunyuanVideoTransformer3DModel

    double, single = r.depths()
    f, h, w = r.latent((2, 8, 8), (33, 68, 120))
    text, text_dim, pooled = r.text(16, 256), r.pick(64, 4096), r.pick(32, 768)
    module = r.build(
        HunyuanVideoTransformer3DModel,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=r.pick(2, 24),
        text_embed_dim=text_dim,
        pooled_projection_dim=pooled,
    )
    return module, {
        "hidden_states": r.randn(r.batch, 16, f, h, w),
        "timestep": r.timestep(700.0),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "encoder_attention_mask": r.mask(text, text // 2, r.dtype),
        "pooled_projections": r.randn(r.batch, pooled),
        "guidance": r.timestep(6000.0),
        "return_dict": False,
    }


def hunyuan_video_15(r: Request) -> Built:
    from diffusers import HunyuanVideo15Transformer3DModel

    f, h, w = r.latent((2, 4, 4), (31, 30, 53))
    text, glyphs, patches = r.text(16, 1000), r.pick(8, 256), r.pick(6, 729)
    text_dim, glyph_dim, patch_dim = r.pick(64, 3584), r.pick(32, 1472), r.pick(48, 1152)
    module = r.build(
        HunyuanVideo15Transformer3DModel,
        num_layers=r.depth,
        num_attention_heads=r.pick(2, 16),
        text_embed_dim=text_dim,
        text_embed_2_dim=glyph_dim,
        image_embed_dim=patch_dim,
    )
    return module, {
        "hidden_states": r.randn(r.batch, 65, f, h, w),
        "timestep": r.timestep(700.0),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "encoder_attention_mask": r.mask(text, text // 2, r.dtype),
        "encoder_hidden_states_2": r.randn(r.batch, glyphs, glyph_dim),
        "encoder_attention_mask_2": r.mask(glyphs, glyphs // 2, r.dtype),
        "image_embeds": r.randn(r.batch, patches, patch_dim, real=True),  # all zero would mean "no image"
        "return_dict": False,
    }


def ltx(r: Request) -> Built:
    from diffusers import LTXVideoTransformer3DModel

    f, h, w = r.latent((2, 4, 4), (21, 16, 24))
    heads, text, text_dim = r.pick(2, 32), r.text(16, 128), r.pick(64, 4096)
    module = r.build(
        LTXVideoTransformer3DModel,
        num_layers=r.depth,
        num_attention_heads=heads,
        cross_attention_dim=heads * 64,
        caption_channels=text_dim,
    )
    return module, {
        "hidden_states": r.randn(r.batch, f * h * w, 128),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "timestep": r.timestep(700.0, torch.float32),
        "encoder_attention_mask": r.mask(text, text // 2, torch.int64),
        "num_frames": f,
        "height": h,
        "width": w,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }


def ltx2(r: Request) -> Built:
    from diffusers import LTX2VideoTransformer3DModel

    f, h, w = r.latent((2, 4, 4), (16, 16, 24))
    heads, text, text_dim, audio = r.pick(2, 32), r.text(16, 1024), r.pick(64, 3840), r.pick(6, 126)
    module = r.build(
        LTX2VideoTransformer3DModel,
        num_layers=r.depth,
        num_attention_heads=heads,
        cross_attention_dim=heads * 128,
        audio_num_attention_heads=heads,
        audio_cross_attention_dim=heads * 64,
        caption_channels=text_dim,
        rope_type="split",
    )
    return module, {
        "hidden_states": r.randn(r.batch, f * h * w, 128),
        "audio_hidden_states": r.randn(r.batch, audio, 128),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "audio_encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "timestep": r.timestep(700.0, torch.float32),
        "encoder_attention_mask": r.mask(text, text // 2, torch.int64),
        "audio_encoder_attention_mask": r.mask(text, text // 2, torch.int64),
        "num_frames": f,
        "height": h,
        "width": w,
        "fps": 24.0,
        "audio_num_frames": audio,
        "return_dict": False,
    }


def cogvideox_5b(r: Request) -> Built:
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    f, h, w = r.latent((2, 8, 8), (13, 60, 90))
    text, text_dim = r.text(12, 226), r.pick(64, 4096)
    module = r.build(
        CogVideoXTransformer3DModel,
        num_layers=r.depth,
        num_attention_heads=r.pick(2, 48),
        text_embed_dim=text_dim,
        max_text_seq_length=text,
        use_rotary_positional_embeddings=True,
        sample_height=h,
        sample_width=w,
    )
    grid = (h // 2, w // 2)
    host = torch.device("cpu") if r.device.type == "meta" else r.device
    tables: Any = get_3d_rotary_pos_embed(64, ((0, 0), grid), grid, f, device=host)
    return module, {
        "hidden_states": r.randn(r.batch, f, 16, h, w),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "timestep": r.timestep(700, torch.int64),
        "image_rotary_emb": tuple(table.to(r.device) for table in tables),
        "return_dict": False,
    }


def mochi(r: Request) -> Built:
    from diffusers import MochiTransformer3DModel

    f, h, w = r.latent((2, 8, 8), (28, 60, 106))
    text, text_dim, pooled = r.text(16, 256), r.pick(64, 4096), r.pick(128, 1536)
    module = r.build(
        MochiTransformer3DModel,
        num_layers=r.depth,
        num_attention_heads=r.pick(2, 24),
        pooled_projection_dim=pooled,
        text_embed_dim=text_dim,
    )
    return module, {
        "hidden_states": r.randn(r.batch, 12, f, h, w),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "timestep": r.timestep(700.0),
        "encoder_attention_mask": r.mask(text, text // 2),
        "return_dict": False,
    }
