"""FLUX.1, FLUX.2, Chroma and Qwen-Image: double-stream blocks, some followed by single-stream ones."""

from __future__ import annotations

import torch

from .build import Built, Request


def flux(r: Request) -> Built:
    from diffusers import FluxTransformer2DModel

    double, single = r.depths()
    h, w = r.latent((8, 8), (128, 128))
    tokens, text, text_dim, pooled = (h // 2) * (w // 2), r.text(8, 512), r.pick(64, 4096), r.pick(32, 768)
    module = r.build(
        FluxTransformer2DModel,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=r.pick(2, 24),
        joint_attention_dim=text_dim,
        pooled_projection_dim=pooled,
        guidance_embeds=True,
    )
    return module, {
        "hidden_states": r.randn(r.batch, tokens, 64),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "pooled_projections": r.randn(r.batch, pooled),
        "timestep": r.timestep(0.7),
        "guidance": r.timestep(3.5, torch.float32),
        "img_ids": r.ids(h // 2, w // 2, 3, dtype=r.dtype),
        "txt_ids": torch.zeros(text, 3, device=r.device, dtype=r.dtype),
        "return_dict": False,
    }


def flux2(r: Request) -> Built:
    from diffusers import Flux2Transformer2DModel

    double, single = r.depths()
    h, w = r.latent((4, 4), (64, 64))  # already packed: the VAE's grid divided by 16
    text, text_dim = r.text(8, 512), r.pick(64, 15360)
    module = r.build(
        Flux2Transformer2DModel,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=r.pick(2, 48),
        joint_attention_dim=text_dim,
    )
    text_ids = torch.zeros(text, 4, device=r.device)
    text_ids[:, 3] = torch.arange(text, device=r.device)
    return module, {
        "hidden_states": r.randn(r.batch, h * w, 128),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "timestep": r.timestep(0.7),
        "img_ids": r.ids(h, w, 4),
        "txt_ids": text_ids,
        "guidance": r.timestep(4.0, torch.float32),
        "return_dict": False,
    }


def chroma(r: Request) -> Built:
    from diffusers import ChromaTransformer2DModel

    double, single = r.depths()
    h, w = r.latent((8, 8), (128, 128))
    tokens, text, text_dim = (h // 2) * (w // 2), r.text(8, 512), r.pick(64, 4096)
    module = r.build(
        ChromaTransformer2DModel,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=r.pick(2, 24),
        joint_attention_dim=text_dim,
        approximator_hidden_dim=r.pick(64, 5120),
        approximator_layers=r.pick(1, 5),
    )
    # The pipeline hands over a float 0/1 mask, which attention then adds to the scores.
    mask = torch.cat([r.mask(text, text // 2 + 1, r.dtype), r.mask(tokens, dtype=r.dtype)], 1)
    return module, {
        "hidden_states": r.randn(r.batch, tokens, 64),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "timestep": r.timestep(0.7),
        "img_ids": r.ids(h // 2, w // 2, 3, dtype=r.dtype),
        "txt_ids": torch.zeros(text, 3, device=r.device, dtype=r.dtype),
        "attention_mask": mask,
        "return_dict": False,
    }


def qwen_image(r: Request) -> Built:
    return _qwen(r, edit=False)


def qwen_image_edit(r: Request) -> Built:
    return _qwen(r, edit=True)


def _qwen(r: Request, edit: bool) -> Built:
    from diffusers import QwenImageTransformer2DModel

    h, w = r.latent((8, 8), (128, 128))
    tokens, text, text_dim = (h // 2) * (w // 2), r.text(8, 512), r.pick(64, 3584)
    module = r.build(
        QwenImageTransformer2DModel,
        num_layers=r.depth,
        num_attention_heads=r.pick(2, 24),
        joint_attention_dim=text_dim,
        zero_cond_t=edit,
    )
    images = 2 if edit else 1  # the image to make, and the image to edit beside it
    return module, {
        "hidden_states": r.randn(r.batch, tokens * images, 64),
        "encoder_hidden_states": r.randn(r.batch, text, text_dim),
        "encoder_hidden_states_mask": None,
        "timestep": r.timestep(0.7),
        "img_shapes": [[(1, h // 2, w // 2)] * images] * r.batch,
        "return_dict": False,
    }
