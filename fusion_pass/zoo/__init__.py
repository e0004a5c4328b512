"""Diffusion transformers of diffusers, buildable at any size with random weights.

    module, kwargs = zoo.build("flux")                            # 2 heads, a few dozen tokens, 2 blocks per stack
    module, kwargs = zoo.build("flux", "full", "cuda", layers=2)  # published width and tokens
    module, kwargs = zoo.build("hunyuan-video:480p", "full", "cuda")  # another full size of the same model
    module, kwargs = zoo.build_fake("flux")                       # published everything, no memory: for tracing only
    with torch.no_grad():
        (sample,) = module(**kwargs)

Needs the `diffusers` extra.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ModelError, did_you_mean
from ..reporting.weightless import WeightlessMode
from . import flux, image, video
from .build import Built, Layers, Model, Request, Variant

__all__ = ["MODELS", "Model", "Variant", "build", "build_fake", "find"]

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("flux", "FLUX.1-dev", "4096 image + 512 text", (19, 38), flux.flux),
        Model("flux2", "FLUX.2-dev", "4096 image + 512 text", (8, 48), flux.flux2),
        Model("chroma", "Chroma1-HD", "4096 image + 512 text", (19, 38), flux.chroma),
        Model("qwen-image", "Qwen-Image", "4096 image + 512 text", (60,), flux.qwen_image),
        Model(
            "qwen-image-edit",
            "Qwen-Image-Edit-2511",
            "4096 + 4096 image + 512 text, two modulations picked per token",
            (60,),
            flux.qwen_image_edit,
        ),
        Model(
            "wan21-14b",
            "Wan2.1-T2V-14B",
            "32760 video x 512 text",
            (40,),
            video.wan21_14b,
            {"720p": Variant((21, 90, 160), "75600 video x 512 text")},
        ),
        Model("wan21-1.3b", "Wan2.1-T2V-1.3B", "32760 video x 512 text", (30,), video.wan21_1_3b),
        Model("wan22-5b", "Wan2.2-TI2V-5B", "27280 video x 512 text, one modulation per token", (30,), video.wan22_5b),
        Model(
            "hunyuan-video",
            "HunyuanVideo",
            "67320 video + 256 text",
            (20, 40),
            video.hunyuan_video,
            {"480p": Variant((16, 60, 106), "25440 video + 256 text")},
        ),
        Model(
            "hunyuan-video-15", "HunyuanVideo-1.5", "49290 video + 1985 text and image", (54,), video.hunyuan_video_15
        ),
        Model("ltx", "LTX-Video", "8064 video x 128 text", (28,), video.ltx),
        Model("ltx2", "LTX-2", "6144 video + 126 audio x 1024 text", (48,), video.ltx2),
        Model("sd3-medium", "stable-diffusion-3-medium", "4096 image + 333 text", (24,), image.sd3_medium),
        Model("sd35-medium", "stable-diffusion-3.5-medium", "4096 image + 333 text", (24,), image.sd35_medium),
        Model("sd35-large", "stable-diffusion-3.5-large", "4096 image + 333 text", (38,), image.sd35_large),
        Model("dit-xl-2", "DiT-XL-2-256", "256 image", (28,), image.dit_xl_2),
        Model("pixart-sigma", "PixArt-Sigma-XL-2-1024-MS", "4096 image x 300 text", (28,), image.pixart_sigma),
        Model("sana", "Sana_1600M_1024px", "1024 image x 300 text, linear attention", (20,), image.sana),
        Model("z-image", "Z-Image-Turbo", "4096 image + 128 text", (30,), image.z_image),
        Model("lumina2", "Lumina-Image-2.0", "4096 image + 256 text", (26,), image.lumina2),
        Model("cogvideox-5b", "CogVideoX-5b", "17550 video + 226 text", (42,), video.cogvideox_5b),
        Model("cogview4", "CogView4-6B", "4096 image + 224 text", (28,), image.cogview4),
        Model("mochi", "mochi-1-preview", "44520 video + 256 text", (48,), video.mochi),
        Model("auraflow", "AuraFlow-v0.3", "4096 image + 256 text", (4, 32), image.auraflow),
        Model("hidream", "HiDream-I1", "4096 image + 384 text", (16, 32), image.hidream),
    )
}


def find(name: str) -> Model:
    """The entry of this name, in any case and with `_` for `-`; NAME:SIZE is one of its other full sizes.

    ModelError with the nearest names otherwise.
    """
    plain, separator, size = name.lower().replace("_", "-").partition(":")
    model = MODELS.get(plain)
    if model is None:
        raise ModelError(f"no model {name.partition(':')[0]!r} in the zoo{did_you_mean(plain, MODELS)}")
    return model.variant(size) if separator else model


def build(
    name: str,
    size: str = "tiny",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    layers: Layers = None,
    batch: int = 1,
    *,
    latent: tuple[int, ...] | None = None,
    text: int | None = None,
    **config: Any,
) -> Built:
    """Build a model of the zoo: (module in eval mode, keyword arguments of one forward call).

    size    "tiny": true head size and structure, 2 heads, a few dozen tokens. "full": published widths and tokens.
    layers  blocks per stack, one number or one per stack; by default 2 when tiny, the published depth when full.
    latent  the latent grid before patchify, (h, w) or (frames, h, w), instead of the size's own; `text` its length.
    config  overrides for the constructor of the diffusers class.
    """
    model = _checked(name, size)
    request = Request(model, size == "full", torch.device(device), dtype, layers, batch, latent, text, config)
    return model.factory(request)


def build_fake(
    name: str,
    size: str = "full",
    dtype: torch.dtype = torch.bfloat16,
    layers: Layers = None,
    batch: int = 1,
    **options: Any,
) -> Built:
    """Like `build`, with fake tensors on the CPU for every weight and input: nothing is allocated or computed.

    The result can be traced by torch.compile (see `dkfuse.coverage`), not run.
    """
    model = _checked(name, size)
    latent, text = options.pop("latent", None), options.pop("text", None)
    mode = WeightlessMode()
    request = Request(model, size == "full", torch.device("cpu"), dtype, layers, batch, latent, text, options, mode)
    built = model.factory(request)
    mode.keeps_real = True
    return built


def _checked(name: str, size: str) -> Model:
    if size not in ("tiny", "full"):
        raise ModelError(f"size {size!r} is not allowed: give tiny or full")
    model = find(name)
    if size == "tiny" and model.latent is not None:
        raise ModelError(f"{model.name} is a full size; ask for size full, or for {name.partition(':')[0]}")
    return model
