"""What the factories of the zoo are written with: sizes, random inputs, and modules with synthetic weights.

No checkpoint is read. Dtypes follow `from_pretrained(torch_dtype=dtype)`, not `module.to(dtype)`: parameters under
`_keep_in_fp32_modules` stay fp32 and non-persistent buffers (RoPE tables) stay as `__init__` made them, because `to`
would round both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, did_you_mean

Layers = int | Sequence[int] | None
Built = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """Another full size of a model: its latent grid before patchify, (h, w) or (frames, h, w), and its tokens."""

    latent: tuple[int, ...]
    tokens: str


@dataclass(frozen=True)
class Model:
    """One entry of the zoo: `factory(request)` builds it. `latent` is set where it stands for one of `variants`."""

    name: str
    repo: str  # where the published weights of this shape live
    tokens: str  # the token count of the full size, in words
    depth: tuple[int, ...]  # published number of blocks, one number per stack
    factory: Callable[[Request], Built]
    variants: Mapping[str, Variant] = field(default_factory=dict)
    latent: tuple[int, ...] | None = None

    def variant(self, name: str) -> Model:
        """This model as `self:name`, of that size. ModelError where there is none of the name."""
        if name not in self.variants:
            known = did_you_mean(name, self.variants) if self.variants else "; it has one only, leave it out"
            raise ModelError(f"no size {name!r} of {self.name}{known}")
        found = self.variants[name]
        return replace(self, name=f"{self.name}:{name}", tokens=found.tokens, latent=found.latent, variants={})


@dataclass
class Request:
    """What to build. `full` means published widths and a realistic token count, else true structure with 2 heads.

    Under a `mode` (a FakeTensorMode) weights and large inputs are fake. Masks, ids and timesteps stay real: they are
    small, and models read their values to decide what to compute.
    """

    model: Model
    full: bool
    device: torch.device
    dtype: torch.dtype
    layers: Layers
    batch: int
    latent_shape: tuple[int, ...] | None = None
    text_length: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    mode: AbstractContextManager[Any] | None = None

    def __post_init__(self) -> None:
        meta = self.device.type == "meta"
        self._without_data = meta or self.mode is not None
        self._generator = torch.Generator(device="cpu" if meta else self.device).manual_seed(0)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with self.mode or nullcontext():
            return torch.empty(shape, device=self.device, dtype=dtype)

    def pick(self, tiny: Any, full: Any) -> Any:
        """The value for this size."""
        return full if self.full else tiny

    def depths(self) -> tuple[int, ...]:
        """Number of blocks per stack: as asked for; by default 2 each when tiny, the published depth when full."""
        published = self.model.depth
        if self.layers is None:
            return published if self.full else tuple(min(2, n) for n in published)
        if isinstance(self.layers, int):
            return (self.layers,) * len(published)
        if len(self.layers) != len(published):
            raise ValueError(f"{self.model.name} has {len(published)} stacks of blocks, got layers={self.layers!r}")
        return tuple(self.layers)

    @property
    def depth(self) -> int:
        """Number of blocks of a model with one stack."""
        (count,) = self.depths()
        return count

    def latent(self, tiny: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...]:
        """The latent grid before patchify, (h, w) or (f, h, w)."""
        if self.latent_shape is not None:
            return self.latent_shape
        return self.pick(tiny, full if self.model.latent is None else self.model.latent)

    def text(self, tiny: int, full: int) -> int:
        """The text length."""
        return self.text_length if self.text_length is not None else self.pick(tiny, full)

    def randn(self, *shape: int, real: bool = False) -> torch.Tensor:
        """A normally distributed input, the same one in every dtype up to rounding; `real` even under a fake mode."""
        if self._without_data and not (real and self.device.type != "meta"):
            return self._empty(shape, self.dtype)
        drawn = torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32)
        return drawn.to(self.dtype)

    def timestep(self, value: float, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`value` for each sample, shape [batch]."""
        return torch.full((self.batch,), value, device=self.device, dtype=dtype or self.dtype)

    def mask(self, length: int, valid: int | None = None, dtype: torch.dtype = torch.bool) -> torch.Tensor:
        """An attention mask [batch, length] whose first `valid` entries (default: all) are one."""
        mask = torch.zeros(self.batch, length, device=self.device, dtype=dtype)
        mask[:, : length if valid is None else valid] = 1
        return mask

    def ids(self, h: int, w: int, axes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Flux-style image ids [h*w, axes]: (0, y, x, 0, ...)."""
        ids = torch.zeros(h, w, axes, device=self.device, dtype=dtype)
        ids[..., 1] += torch.arange(h, device=self.device, dtype=dtype)[:, None]
        ids[..., 2] += torch.arange(w, device=self.device, dtype=dtype)[None, :]
        return ids.reshape(h * w, axes)

    def build(self, cls: type[nn.Module], **config: Any) -> nn.Module:
        """An instance of a diffusers model class in eval mode, with synthetic weights of the right dtypes."""
        from accelerate import init_empty_weights

        with self.mode or init_empty_weights(include_buffers=False):
            module = cls(**{**config, **self.config})
        keep: Any = getattr(cls, "_keep_in_fp32_modules", None) or []
        keep = set(keep if isinstance(keep, (list, tuple)) else [keep])
        made: dict[int, nn.Parameter] = {}  # so that tied parameters stay tied
        for path, child in module.named_modules():
            for name, parameter in child._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    dtype = torch.float32 if keep & {*path.split("."), name} else self.dtype
                    value = self._initial(child, name, tuple(parameter.shape), dtype)
                    made[id(parameter)] = nn.Parameter(value, requires_grad=False)
                child._parameters[name] = made[id(parameter)]
            for name, buffer in child._buffers.items():
                if buffer is not None:
                    cast = buffer.is_floating_point() and name not in child._non_persistent_buffers_set
                    child._buffers[name] = buffer.to(self.device, self.dtype if cast else buffer.dtype)
        return module.eval().requires_grad_(False)

    def _initial(self, owner: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._without_data:
            return self._empty(shape, dtype)
        drawn = torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32)
        return _scaled(drawn, owner, name).to(dtype)


def _scaled(drawn: torch.Tensor, owner: nn.Module, name: str) -> torch.Tensor:
    """Normal values turned into a weight that keeps activations near unit variance.

    No vector has its neutral value, so that a fusion which drops or swaps one changes the output.
    """
    if drawn.numel() == 1:
        return 0.5 + 0.1 * drawn
    if "bias" in name:
        return 0.02 * drawn
    if drawn.dim() == 1:  # the weight of a norm
        return 1.0 + 0.1 * drawn
    if isinstance(owner, nn.Embedding) or "token" in name or "embed" in name:
        return 0.02 * drawn
    if isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)):
        return drawn / math.sqrt(max(1, drawn.numel() // drawn.shape[0]))
    return drawn / math.sqrt(drawn.shape[-1])
