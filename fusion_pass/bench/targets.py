"""MODEL[@BATCH] of `dkfuse bench model`.

NAME, NAME:SIZE          a model of the zoo
vit, bert, ...           one of `others`
path/to/file.py:function what the function returns
zoo, headline, others    all of a group: the zoo, HEADLINE, the models that are no diffusion transformers
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..cli.loading import DTYPES, load_real, names_a_file
from ..errors import ModelError, did_you_mean

HEADLINE = ("flux", "qwen-image", "z-image", "sd35-large@2", "hunyuan-video:480p", "wan21-14b")
DEFAULT_LAYERS = 8  # blocks per stack of a zoo model, or as many as were published


@dataclass(frozen=True)
class Target:
    """One model to measure. `source` is "zoo", "others" or "file"; `batch` None is the model's own."""

    name: str
    source: str
    batch: int | None = None

    @property
    def label(self) -> str:
        return self.name + (f"@{self.batch}" if self.batch is not None else "")


def find(model: str) -> list[Target]:
    """The targets that MODEL names: one, or all of a group. Raises ModelError where there is no such model."""
    from .. import zoo
    from .others import OTHERS

    name, separator, size = model.rpartition("@")
    batch = None
    if separator:
        if not re.fullmatch(r"[1-9]\d*", size):
            raise ModelError(f"the batch size in {model!r} is {size!r}; give a positive number, as in flux@2")
        batch = int(size)
    else:
        name = model
    if name.endswith(".py"):
        raise ModelError(f"{name!r} names no function; give path/to/file.py:function")
    plain, _, variant = name.lower().replace("_", "-").replace("/", "-").partition(":")
    if plain not in zoo.MODELS and names_a_file(name):
        if not Path(path := name.rpartition(":")[0]).is_file():
            raise ModelError(f"no file {path!r}; give the name of a model or path/to/file.py:function")
        return [Target(name, "file", batch)]
    groups = {"others": list(OTHERS), "zoo": list(zoo.MODELS), "headline": list(HEADLINE)}
    if plain in zoo.MODELS:
        return [Target((zoo.MODELS[plain].variant(variant) if variant else zoo.MODELS[plain]).name, "zoo", batch)]
    if variant or plain not in (*OTHERS, *groups):
        hint = did_you_mean(plain, [*zoo.MODELS, *OTHERS, *groups])
        raise ModelError(f"no model {name!r} in the zoo or among the others{hint}")
    if plain in OTHERS:
        return [Target(plain, "others", batch)]
    members = [target for member in groups[plain] for target in find(member)]
    return members if batch is None else [replace(target, batch=batch) for target in members]


def depth(target: Target, layers: int | None, size: str) -> tuple[int, ...]:
    """Blocks of each stack that `build` makes; empty for a function's model, whose own they are."""
    from .others import DEFAULT_LAYERS as OWN
    from .others import TINY_LAYERS

    tiny = size == "tiny"
    if target.source == "file":
        return ()
    if target.source == "others":
        return (layers if layers is not None else TINY_LAYERS if tiny else OWN[target.name],)
    from .. import zoo

    most = layers if layers is not None else 2 if tiny else DEFAULT_LAYERS
    return tuple(min(most, published) for published in zoo.find(target.name).depth)


def build(target: Target, layers: int | None, size: str, dtype: str, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """(module, keyword arguments of forward) with weights and inputs on `device`."""
    if target.source == "zoo":
        from .. import zoo

        blocks = depth(target, layers, size)
        return zoo.build(target.name, size, device, DTYPES[dtype], blocks, target.batch or 1)
    if target.source == "file":
        module, kwargs = load_real(target.name, {"layers": layers, "batch": target.batch})
        return _moved(module, kwargs, device, None)
    from .others import OTHERS

    torch.manual_seed(0)
    (count,) = depth(target, layers, size)
    module, kwargs = OTHERS[target.name](size == "tiny", count, target.batch)
    return _moved(module, kwargs, device, DTYPES[dtype])


def _moved(module: nn.Module, kwargs: dict[str, Any], device: str, dtype: torch.dtype | None) -> Any:
    def to(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)

    weights = [*module.parameters(), *module.buffers()]
    if any(w.is_meta for w in weights):
        raise ModelError("the function returns a model on the meta device; a bench needs weights, random ones will do")
    module = module.to(device) if dtype is None else module.to(device, dtype)
    return module.eval().requires_grad_(False), tree_map(to, kwargs)
