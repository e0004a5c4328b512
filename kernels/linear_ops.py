"""Linears with what touches them: `torch.ops.dkfuse.linear_gelu` and `torch.ops.dkfuse.split_linear`.

    linear_gelu(x, weight, bias)        gelu_tanh(x @ weight.T + bias)
                                        gelu_tanh(h) = h/2 * (1 + tanh(sqrt(2/pi) * (h + 0.044715 h^3)))
    split_linear(parts, weight, bias)   cat(parts, -1) @ weight.T + bias, one product per part, added up

Shapes: x [M, K], weight [N, K], bias [N] or None; parts [M, K_i] whose K_i add up to K. Results [M, N], contiguous. Any
strides: nothing here needs a layout, and cuBLAS reads rows and columns in place. Products are added narrowest part
first, so that the sums that are rounded on the way are small.
Dtypes: all of one floating dtype. linear_gelu rounds once; split_linear rounds the sum after each product.

On CUDA linear_gelu is cublasLt's GELU epilogue, which PyTorch offers as `aten._addmm_activation(use_gelu=True)`: the
tanh form there, but the erf form on CPU, hence an op of its own. split_linear adds each further product into the result
in place (a GEMM with beta = 1 that reads and writes one matrix); cuBLAS's kernel for that rounds the product before it
adds, see `dkfuse.seams.split`.
Errors: ValueError where shapes or dtypes do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
SCHEMAS = {
    "linear_gelu": "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    "split_linear": "(Tensor[] parts, Tensor weight, Tensor? bias) -> Tensor",
}


def check(op: str, parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError, in one sentence, for a call that has no meaning."""
    tensors = [*parts, weight] + ([bias] if bias is not None else [])
    if len({t.dtype for t in tensors}) != 1 or not weight.is_floating_point():
        found = ", ".join(sorted({str(t.dtype) for t in tensors}))
        raise ValueError(f"dkfuse::{op}: dtypes are {found}; all tensors need one floating dtype.")
    if not parts or weight.dim() != 2 or any(p.dim() != 2 for p in parts):
        raise ValueError(f"dkfuse::{op}: it needs at least one part, and parts and weight must be 2-D.")
    columns = sum(p.shape[1] for p in parts)
    if columns != weight.shape[1]:
        raise ValueError(f"dkfuse::{op}: parts have {columns} columns together, but weight {weight.shape[1]}.")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"dkfuse::{op}: bias has shape {tuple(bias.shape)}, it must be [{weight.shape[0]}].")


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype that its sums are computed in."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def _pairs(parts: Sequence[Tensor], weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each part with its columns of the weight, narrowest first."""
    columns = weight.split([p.shape[1] for p in parts], 1)
    return sorted(zip(parts, columns, strict=True), key=lambda pair: pair[0].shape[1])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition: fp32 inside (fp64 for fp64), one rounding."""
    check("linear_gelu", (x,), weight, bias)
    return F.gelu(F.linear(widened(x), widened(weight), widened(bias)), approximate="tanh").to(x.dtype)


def split_linear(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition: fp32 inside (fp64 for fp64), the sum rounded after every product."""
    check("split_linear", parts, weight, bias)
    total: Tensor | None = None
    for part, columns in _pairs(parts, weight):
        product = F.linear(widened(part), widened(columns), widened(bias) if bias is not None else None)
        total, bias = (product if total is None else widened(total) + product).to(part.dtype), None
    assert total is not None
    return total


def _linear_gelu_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return aten._addmm_activation.default(bias, x, weight.t(), use_gelu=True)


def _split_linear_cuda(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    out = parts[0].new_empty(parts[0].shape[0], weight.shape[0])
    pairs = [matrix for part, columns in _pairs(parts, weight) for matrix in (part, columns.t())]
    sum_of_products(*pairs, *([bias] if bias is not None else []), out=out)
    return out


def sum_of_products(*tensors: Tensor, out: Tensor) -> None:
    """a @ b + c @ d + ... + bias into `out`, contiguous. tensors: a, b, c, d, ..., and the bias where there is one."""
    a, b, *rest = tensors
    if len(rest) % 2:
        torch.addmm(rest.pop(), a, b, out=out)
    else:
        torch.mm(a, b, out=out)
    while rest:
        a, b, *rest = rest
        out.addmm_(a, b)


def _linear_gelu_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    check("linear_gelu", (x,), weight, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def _split_linear_fake(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    check("split_linear", parts, weight, bias)
    return parts[0].new_empty(parts[0].shape[0], weight.shape[0])


_library = torch.library.Library("dkfuse", "FRAGMENT")


def _register() -> None:
    plain = {"linear_gelu": linear_gelu, "split_linear": split_linear}
    cuda = {"linear_gelu": _linear_gelu_cuda, "split_linear": _split_linear_cuda}
    fake = {"linear_gelu": _linear_gelu_fake, "split_linear": _split_linear_fake}
    for op, schema in SCHEMAS.items():
        _library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
        torch.library.register_fake(f"dkfuse::{op}", fake[op], lib=_library)
        _library.impl(op, plain[op], "CompositeExplicitAutograd")
        _library.impl(op, cuda[op], "CUDA")


_register()
