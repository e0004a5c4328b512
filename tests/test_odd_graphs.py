"""Graphs with operands that few models have: tensors of one value, sizes that data decide. Compiled as any others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dkfuse

from .harness import compiled, counts

Function = Callable[[Tensor], Tensor]
BF16 = torch.bfloat16


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=BF16)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=BF16)


def written_in_place(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2], out[..., 1::2] = zeros(2, 8, 32), x[..., ::2]
    return out


def rotated(x: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = ones(2, 8, 32), zeros(2, 8, 32)
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


CONSTANTS: dict[str, Function] = {
    "product with zeros on the left": lambda x: torch.bmm(zeros(2, 4, 8), x),
    "product with zeros on the right": lambda x: torch.bmm(x, zeros(2, 64, 4)),
    "product of pairs": lambda x: torch.bmm(x.reshape(2, 256, 2), zeros(2, 2, 2)),
    "product of matrices of pairs": lambda x: torch.bmm(ones(2, 2, 2), x.reshape(2, 2, 256)),
    "matmul": lambda x: torch.matmul(zeros(2, 4, 8), x),
    "einsum": lambda x: torch.einsum("bnij,bnj->bni", zeros(2, 8, 2, 2), x[..., :2]),
    "sum of pairs": lambda x: x + zeros(2, 8, 2).sum(-1, keepdim=True),
    "product and sum of pairs": lambda x: (zeros(2, 8, 2, 2) * x[..., None, :2]).sum(-1),
    "norm of zeros": lambda x: x + F.layer_norm(zeros(2, 8, 64), (64,)),
    "norm of ones": lambda x: x + F.rms_norm(ones(2, 8, 64), (64,)),
    "norm by hand": lambda x: x * torch.rsqrt(ones(2, 8, 64).float().pow(2).mean(-1, keepdim=True)).to(BF16),
    "norm of a sum with nothing": lambda x: F.layer_norm(x + zeros(2, 1, 64) * x, (64,)),
    "norm of an expanded scalar": lambda x: F.layer_norm(torch.zeros((), dtype=BF16).expand(2, 8, 64) + x, (64,)),
    "modulation by parts": lambda x: F.layer_norm(x, (64,)) * (1 + torch.cat([zeros(2, 4, 64), x[:, :4]], 1)),
    "gate of ones": lambda x: x + ones(2, 1, 64) * x.relu(),
    "stack": lambda x: torch.stack([zeros(2, 8, 64), x], -1).flatten(2),
    "cat": lambda x: torch.cat([zeros(2, 8, 64), x], -1),
    "unbind": lambda x: x + zeros(2, 8, 64, 2).unbind(-1)[1],
    "chunk": lambda x: x + zeros(2, 8, 128).chunk(2, -1)[1],
    "select": lambda x: x + zeros(2, 3, 8, 64)[:, 1],
    "written in place": written_in_place,
    "rotated": rotated,
}


@pytest.mark.parametrize("function", CONSTANTS.values(), ids=CONSTANTS.keys())
def test_tensors_of_one_value(function: Function) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 64).to(BF16)
    torch.compiler.reset()
    with torch.no_grad():
        found = compiled(function, target="sm90")(x)
    torch.testing.assert_close(found, function(x), rtol=2e-2, atol=2e-2)


# -- sizes that data decide --------------------------------------------------------------------------------------------

S, T = torch.linspace(-1, 1, 64).to(BF16), torch.linspace(1, 0, 64).to(BF16)
COS, SIN = torch.randn(16, 1, 32, generator=torch.Generator().manual_seed(1)).chunk(2, -1)
W = torch.eye(64, dtype=BF16)


def modulated(x: Tensor) -> Tensor:
    return (F.layer_norm(x, (64,)) * (1 + S) + T) @ W


def residual(x: Tensor) -> Tensor:
    h = x + S * (x @ W)
    return (F.rms_norm(h, (64,)) * (1 + S) + T) @ W + h


def merged_heads(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, 32)).transpose(1, 2).reshape(x.shape[0], 2, -1, 32).transpose(1, 2)
    return modulated(heads.flatten(2))


def queries(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 32)).float()
    q = (q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16)  # torch's rms_norm asks for the size itself
    a, b = q.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = COS[: x.shape[1]], SIN[: x.shape[1]]
    return (torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).to(BF16).flatten(2)) @ W


@pytest.mark.parametrize(
    ("function", "fused"),
    [(modulated, {"norm_modulate": 1}), (merged_heads, {"norm_modulate": 1}), (residual, None), (queries, None)],
)
def test_a_number_of_tokens_that_data_decide(function: Function, fused: dict[str, int] | None) -> None:
    """FramePack and Wan-Animate, with ``torch._dynamo.config.capture_scalar_outputs``."""

    def program(x: Tensor, n: Tensor) -> Tensor:
        return function(x[:, : n.item()])

    torch.manual_seed(0)
    x, n = torch.randn(2, 16, 64).to(BF16), torch.tensor(9)
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage, torch._dynamo.config.patch(capture_scalar_outputs=True):
        found = compiled(program, target="sm90")(x, n)
    assert len(coverage.graphs) == 1
    torch.testing.assert_close(found, program(x, n), rtol=2e-2, atol=4e-2)
    if fused is not None:
        assert counts(coverage) == fused, str(coverage)
