"""Patch embeddings as GEMMs: convolutions that are one, those that are not, and what follows from dense tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dkfuse

from .harness import BF16, FP32, check_numerics, run, tally

FAMILY = "patch_embedding"
CONV = {2: nn.Conv2d, 3: nn.Conv3d}
aten = torch.ops.aten


class Embedding(nn.Module):
    """Tokens of an image or a video, and what a transformer does first with them."""

    def __init__(self, patch: tuple[int, ...], channels: int = 4, features: int = 64, **config: Any):
        super().__init__()
        self.proj = CONV[len(patch)](channels, features, patch, **{"stride": patch, **config})
        self.norm = nn.LayerNorm(features, elementwise_affine=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2)) * (1 + scale)


def seams(coverage: dkfuse.Coverage) -> list[dkfuse.Site]:
    return [site for site in coverage.seams if site.family == FAMILY]


def image(*sizes: int, channels: int = 4, batch: int = 2, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(batch, channels, *sizes, generator=torch.Generator().manual_seed(0)).to(dtype)


def built(*args: Any, dtype: torch.dtype = BF16, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return Embedding(*args, **config).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("patch", "sizes"), [((2, 2), (8, 6)), ((1, 2, 2), (3, 4, 6)), ((2, 4), (4, 8))])
def test_a_patch_embedding_is_a_gemm(
    patch: tuple[int, ...], sizes: tuple[int, ...], bias: bool, fused_graphs: list[fx.Graph]
) -> None:
    module, x = built(patch, bias=bias), image(*sizes)
    scale = torch.randn(2, 1, 64).to(BF16)
    results, coverage = run(module, [x, scale], target="sm90")
    assert tally(seams(coverage)) == {FAMILY: 1}
    assert tally(coverage.sites) == {"norm_modulate": 1}  # its tokens are dense: no copy, and no reason to refuse
    (graph,) = fused_graphs
    assert not graph.find_nodes(op="call_function", target=aten.convolution.default)
    assert len(graph.find_nodes(op="call_function", target=aten.addmm.default if bias else aten.mm.default)) == 1
    check_numerics(module, [x, scale], results)


class Frames(nn.Module):
    """A video embedded frame by frame, as CogVideoX does."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(4, 64, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, *rest = x.shape
        y = self.proj(x.reshape(-1, *rest)).view(batch, frames, 64, -1)
        return y.transpose(2, 3).flatten(1, 2).sin()


class ChannelsLast(nn.Module):
    """Tokens by permute and a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(4, 64, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1).contiguous().sin()


@pytest.mark.parametrize(("kind", "shape"), [(Frames, (2, 3, 4, 4, 4)), (ChannelsLast, (2, 4, 4, 4))])
def test_other_ways_to_read_rows(kind: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = kind().to(BF16).requires_grad_(False), torch.randn(shape).to(BF16)
    results, coverage = run(module, [x], target="sm90")
    assert tally(seams(coverage)) == {FAMILY: 1}
    check_numerics(module, [x], results)


class AsImage(Embedding):
    """A U-Net's downsampling: the next layer reads an image."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.proj(x).sin() * scale.mean()


class AsBoth(Embedding):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.proj(x)
        return self.norm(y.flatten(2).transpose(1, 2)).sum() + y.cumsum(1)


@pytest.mark.parametrize(
    ("make", "sizes", "options", "expected"),
    [
        (lambda: built((2, 2), stride=1), (4, 4), {}, {}),
        (lambda: built((2, 2), padding=1), (4, 4), {}, {}),
        (lambda: built((2, 2), groups=4), (4, 4), {}, {}),
        (lambda: built((1, 1)), (4, 4), {}, {}),
        (lambda: built((2, 2)), (5, 4), {}, {"left:layout": 1}),
        (lambda: built((2, 2), features=60), (4, 4), {}, {"left:layout": 1}),
        (lambda: built((3, 3)), (6, 6), {}, {"left:layout": 1}),
        (lambda: built((2, 2), dtype=FP32), (4, 4), {"dtype": FP32}, {"left:dtype": 1}),
        (lambda: built((2, 2)), (4, 4), {"rules": "-patch_embedding"}, {"rejected:disabled": 1}),
        (lambda: built((2, 2)), (4, 4), {"roundings": "eager"}, {"rejected:rounding": 1}),
        (lambda: built((2, 2), bias=False), (4, 4), {"roundings": "eager"}, {FAMILY: 1}),
        (lambda: built((2, 2)), (4, 4), {"target": "cpu"}, {}),
        (lambda: AsImage((2, 2)).to(BF16).requires_grad_(False), (4, 4), {}, {"left:layout": 1}),
        (lambda: AsBoth((2, 2)).to(BF16).requires_grad_(False), (4, 4), {}, {"left:layout": 1}),
    ],
)
def test_what_is_one(
    make: Callable[[], nn.Module], sizes: tuple[int, ...], options: dict[str, Any], expected: dict[str, int]
) -> None:
    options = {"target": "sm90", **options}
    dtype = options.pop("dtype", BF16)
    module = make()
    args = [image(*sizes, dtype=dtype), torch.randn(2, 1, module.proj.out_channels).to(dtype)]
    results, coverage = run(module, args, **options)
    assert tally(seams(coverage)) == expected
    check_numerics(module, args, results)


def test_sizes_that_are_symbols_are_left() -> None:
    module, x = built((2, 2)), image(8, 6)
    torch._dynamo.mark_dynamic(x, 2)
    results, coverage = run(module, [x, torch.zeros(2, 1, 64).to(BF16)], target="sm90", dynamic=None)
    assert tally(seams(coverage)) == {"left:symbolic": 1}
    check_numerics(module, [x, torch.zeros(2, 1, 64).to(BF16)], results)
