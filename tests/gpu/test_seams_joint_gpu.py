"""Joint tensors that GEMMs write, and patch embeddings as GEMMs, on the device and through Inductor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkfuse
from dkfuse.kernels import gemm_kernels

from ..joint_attention import JointAttention
from .on_device import capability, random
from .test_seams_gpu import error, kernels, taken

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
QUACK = gemm_kernels.version() is not None and torch.cuda.is_available() and capability() == 90


@pytest.mark.parametrize("tiles", ["", pytest.param("128x192", marks=pytest.mark.skipif(not QUACK, reason="no quack"))])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_op(batch: int, bias: bool, tiles: str) -> None:
    rows, widths = (1000, 77), (512, 256)
    xs = [random(batch * n, k, seed=i) for i, (n, k) in enumerate(zip(rows, widths, strict=True))]
    weights = [(random(384, k, dtype=torch.float32, seed=2 + k) * k**-0.5).to(BF16) for k in widths]
    biases = [random(384, seed=9) if bias else None for _ in widths]
    out = torch.ops.dkfuse.joint_linear(xs, weights, biases, batch, [tiles, ""])
    parts = [F.linear(x, w, b).view(batch, -1, 384) for x, w, b in zip(xs, weights, biases, strict=True)]
    exact = [
        F.linear(x.double(), w.double(), None if b is None else b.double()).view(batch, -1, 384)
        for x, w, b in zip(xs, weights, biases, strict=True)
    ]
    assert out.is_contiguous() and out.shape == (batch, 1077, 384)
    assert error(out, torch.cat(exact, 1)) <= 1.02 * error(torch.cat(parts, 1), torch.cat(exact, 1))


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_joint_attention(batch: int, packed: bool, mode: str | None) -> None:
    torch.manual_seed(0)
    module = JointAttention(width=2048, heads=16).to("cuda", BF16).requires_grad_(False)
    image, text = random(batch, 4096, 2048), random(batch, 512, 2048, seed=1)
    if packed:
        dkfuse.pack(module)
    torch.compiler.reset()
    options = {"dkfuse.gemm": "cublas", **({"mode": mode} if mode else {})}
    with torch.no_grad(), dkfuse.record() as coverage:
        compiled = torch.compile(module, backend="dkfuse", dynamic=False, options=options)
        for _ in range(3):
            result = compiled(image, text).clone()
        names = kernels(lambda: compiled(image, text))
        eager = module(image, text)
        exact = module.float()(image.float(), text.float())
    coverage.assert_fused("joint_projection", exactly=1)
    assert all(site.status is dkfuse.Status.FUSED for site in coverage.sites) and len(coverage.sites) == 4
    assert error(result, exact) <= 1.05 * error(eager, exact)
    assert not any("cat" in name.lower() for name in names), names


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv3d(16, 1024, (1, 2, 2), stride=(1, 2, 2))
        self.norm = nn.LayerNorm(1024, elementwise_affine=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2)) * (1 + scale)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_patch_embedding(mode: str | None) -> None:
    torch.manual_seed(0)
    module = Tokens().to("cuda", BF16).requires_grad_(False)
    x, scale = random(2, 16, 5, 32, 48), random(2, 1, 1024, seed=1)
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        compiled = torch.compile(module, backend="dkfuse", dynamic=False, options={"mode": mode} if mode else {})
        for _ in range(3):
            result = compiled(x, scale).clone()
        names = kernels(lambda: compiled(x, scale))
        eager = module(x, scale)
        exact = module.float()(x.float(), scale.float())
    assert taken(coverage) == ["patch_embedding"]
    coverage.assert_fused("norm_modulate", at_least=1)
    assert not any("conv" in name.lower() or "nchw" in name.lower() for name in names), names
    assert error(result, exact) <= 1.02 * error(eager, exact)
