"""`dkfuse::linear`: a linear and what is done to its result, by a named GEMM.

    h = x @ weight.T + bias
    act "none"          h
        "gelu"          h/2 * (1 + tanh(sqrt(2/pi) * (h + 0.044715 h^3)))
        "silu_first"    silu(h[:, :F]) * h[:, F:]          N = 2 F,  silu(g) = g / (1 + exp(-g))
        "silu_second"   h[:, :F] * silu(h[:, F:])

Shapes: x [M, K], weight [N, K], bias [N] or None; the result is [M, N], or [M, F] for the last two, contiguous. Any
strides and addresses: what the kernel cannot read in place is copied.
Dtypes: one floating dtype; fp16 and bf16 for "quack". Sums and `act` are fp32 (fp64 for fp64), rounded once.
using: "cublas", what PyTorch has (SwiGLU is then a pass of its own, after a rounding), or "quack", whose GEMM computes
`act` before it writes (`gemm_quack`), cut into `tiles` (`gemm_kernels.TILES`).
Errors: ValueError for shapes and dtypes that do not fit, and for an act, a kernel or tiles that do not exist;
ImportError where quack is missing. On a CPU, and by either kernel, the result is the definition.

Compiled graphs call `into` past torch's dispatcher (`dkfuse.compat_direct`).
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm_quack
from .gemm_kernels import ACTIVATIONS, DEFAULT_TILES, GATED, HALF, NAMES, QUACK, TILES
from .linear_ops import check, widened

aten = torch.ops.aten
SCHEMA = (
    'linear(Tensor x, Tensor weight, Tensor? bias=None, *, str act="none", str using="cublas", '
    f'str tiles="{DEFAULT_TILES}") -> Tensor'
)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, using: str, tiles: str) -> None:
    check("linear", (x,), weight, bias)
    for what, name, known in (("act", act, ACTIVATIONS), ("kernel", using, NAMES), ("tiles", tiles, TILES)):
        if name not in known:
            raise ValueError(f"dkfuse::linear: there is no {what} {name!r}; known: {', '.join(known)}")
    if act in GATED and weight.shape[0] % 2:
        raise ValueError(f"dkfuse::linear: act={act!r} needs an even number of rows in weight, not {weight.shape[0]}")


def columns(weight: Tensor, act: str) -> int:
    """Columns of the result."""
    return weight.shape[0] // 2 if act in GATED else weight.shape[0]


def activated(h: Tensor, act: str) -> Tensor:
    """`act` of a linear's result, in its dtype."""
    if act == "gelu":
        return F.gelu(h, approximate="tanh")
    if act in GATED:
        first, second = h.chunk(2, -1)
        return F.silu(first) * second if act == "silu_first" else first * F.silu(second)
    return h


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: str = "none",
    using: str = "cublas",
    tiles: str = DEFAULT_TILES,
) -> Tensor:
    """The definition: fp32 inside (fp64 for fp64), one rounding."""
    _check(x, weight, bias, act, using, tiles)
    h = F.linear(widened(x), widened(weight), None if bias is None else widened(bias))
    return activated(h, act).to(x.dtype)


def by_cublas(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """By PyTorch's kernels, of which there is none for SwiGLU: that reads the rounded result of the linear."""
    if act == "gelu" and bias is not None:
        return aten._addmm_activation.default(bias, x, weight.t(), use_gelu=True)
    return activated(F.linear(x, weight, bias), act)


def _cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: str = "none",
    using: str = "cublas",
    tiles: str = DEFAULT_TILES,
) -> Tensor:
    _check(x, weight, bias, act, using, tiles)
    if using != QUACK:
        return by_cublas(x, weight, bias, act).contiguous()
    if x.dtype not in HALF:
        raise ValueError(f"dkfuse::linear: quack takes fp16 and bf16, not {x.dtype}; give using='cublas'")
    out = x.new_empty((x.shape[0], columns(weight, act)))
    index = x.device.index
    with torch.cuda.device(index) if index != torch.cuda.current_device() else contextlib.nullcontext():
        into(x, weight, bias, act=act, tiles=tiles, out=out)
    return out


def into(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, act: str, tiles: str, out: Tensor) -> None:
    """The linear by quack into `out`, contiguous, of a call that was checked, on the current device."""
    if not out.is_cuda:
        out.copy_(reference(x, weight, bias, act=act))
    elif out.numel():
        gemm_quack.run(x, weight, bias, act, out, tiles)


def into_batched(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, act: str, tiles: str, out: Tensor) -> None:
    """`into` of matrices as [rows, columns, 1] and a bias as [1, N], of strides that quack reads in place.

    That saves each call of a compiled graph four views. Addresses that are no whole vectors are seen to as in `into`.
    """
    given = (x, weight, out) if bias is None else (x, weight, out, bias)
    if not out.is_cuda or any(t.data_ptr() & 15 for t in given):
        into(x[..., 0], weight[..., 0], None if bias is None else bias[0], act=act, tiles=tiles, out=out[..., 0])
    elif out.numel():
        gemm_quack.launch(x, weight, bias, act, out, tiles)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: str = "none",
    using: str = "cublas",
    tiles: str = DEFAULT_TILES,
) -> Tensor:
    _check(x, weight, bias, act, using, tiles)
    return x.new_empty((x.shape[0], columns(weight, act)))


_library = torch.library.Library("dkfuse", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
torch.library.register_fake("dkfuse::linear", _fake, lib=_library)
_library.impl("linear", reference, "CompositeExplicitAutograd")
_library.impl("linear", _cuda, "CUDA")
