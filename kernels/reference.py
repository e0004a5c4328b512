"""Plain torch meaning of the dkfuse ops: the CPU implementation, and what the kernels are tested against.

`compute` is the dtype of everything inside (fp32 for the ops, fp64 for an accuracy reference). Intermediates are
rounded to `x.dtype` where `roundings` says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import SECOND_BRANCH, Rounding


def _rounded(value: Tensor, dtype: torch.dtype, roundings: int, flag: Rounding) -> Tensor:
    return value.to(dtype).to(value.dtype) if roundings & flag else value


def normalize(z: Tensor, norm: str, eps: float, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """layer: (z-mean)*rsqrt(var+eps), biased variance; rms: z*rsqrt(mean(z^2)+eps). Over `dims`."""
    if norm == "layer":
        z = z - z.mean(dims, keepdim=True)
    return z * torch.rsqrt(z.square().mean(dims, keepdim=True) + eps)


def biased(y: Tensor, bias: Tensor | None, roundings: int, dtype: torch.dtype) -> Tensor:
    """y + bias, the bias optional."""
    return y if bias is None else _rounded(y + bias.to(y.dtype), dtype, roundings, Rounding.BRANCH_BIAS)


def branch(
    y: Tensor, norm: str, eps: float, weight: Tensor | None, weight_offset: float, roundings: int, dtype: torch.dtype
) -> Tensor:
    """norm_b(y)*(weight_offset+weight), the weight optional; y itself for norm "none"."""
    if norm == "none":
        return y
    y = _rounded(normalize(y, norm, eps), dtype, roundings, Rounding.BRANCH)
    if weight is not None:
        y = _rounded(y * (weight_offset + weight.to(y.dtype)), dtype, roundings, Rounding.BRANCH_WEIGHTED)
    return y


def gate_and_add(y: Tensor, residual: Tensor | None, gate: Tensor | None, roundings: int, dtype: torch.dtype) -> Tensor:
    """z = residual + gate*y, in y's dtype; without a residual z = y, without a gate the factor is 1."""
    if residual is None:
        return y
    if gate is not None:
        y = _rounded(y * gate.to(y.dtype), dtype, roundings, Rounding.GATE_PRODUCT)
    return _rounded(residual.to(y.dtype) + y, dtype, roundings, Rounding.SUM)


def affine(
    n: Tensor, weight: Tensor | None, bias: Tensor | None, weight_offset: float, roundings: int, dtype: torch.dtype
) -> Tensor:
    """a = n*(weight_offset+weight) + bias, each optional."""
    n = _rounded(n, dtype, roundings, Rounding.NORM)
    if weight is not None:
        n = _rounded(n * (weight_offset + weight.to(n.dtype)), dtype, roundings, Rounding.WEIGHTED)
    if bias is not None:
        n = _rounded(n + bias.to(n.dtype), dtype, roundings, Rounding.AFFINE)
    return n


def modulate(
    a: Tensor, scale: Tensor | None, shift: Tensor | None, scale_offset: float, roundings: int, dtype: torch.dtype
) -> Tensor:
    """a*(scale_offset+scale) + shift, each optional; without a scale the factor is 1."""
    if scale is not None:
        factor = _rounded(scale_offset + scale.to(a.dtype), dtype, roundings, Rounding.ONE_PLUS)
        a = _rounded(a * factor, dtype, roundings, Rounding.PRODUCT)
    if shift is not None:
        a = a + shift.to(a.dtype)
    return a


def residual_norm_modulate_dual(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    scale2: Tensor | None,
    shift2: Tensor | None,
    *,
    norm: str,
    eps: float,
    weight_offset: float,
    scale_offset: float,
    roundings: int,
    branch_bias: Tensor | None = None,
    branch_weight: Tensor | None = None,
    branch_norm: str = "none",
    branch_eps: float = 0.0,
    branch_weight_offset: float = 0.0,
    x2: Tensor | None = None,
    gate2: Tensor | None = None,
    factor2: float = 1.0,
    limit: float = 0.0,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, out, out2) in `compute`, before the outputs are rounded to their dtypes."""
    y = biased(x.to(compute), branch_bias, roundings, x.dtype)
    y = branch(y, branch_norm, branch_eps, branch_weight, branch_weight_offset, roundings, x.dtype)
    z = gate_and_add(y, residual, gate, roundings, x.dtype)
    if x2 is not None:
        second = roundings >> SECOND_BRANCH
        x2 = _rounded(x2.to(compute) * factor2, x.dtype, second if factor2 != 1 else 0, Rounding.GATE_PRODUCT)
        z = gate_and_add(x2, z, gate2, second, x.dtype)
    if limit:
        z = z.clamp(-limit, limit)
    a = affine(normalize(z, norm, eps), weight, bias, weight_offset, roundings, x.dtype)
    return (
        z,
        modulate(a, scale, shift, scale_offset, roundings, x.dtype),
        modulate(a, scale2, shift2, scale_offset, roundings, x.dtype),
    )
