"""`dkfuse::adapted_linear`: a linear and updates of low rank that are added to its result, as unmerged LoRAs are.

    y = x @ weight.T + bias
    y = y + alphas[i] * (downs[i] @ ups[i].T)            for each update, one after the other

Shapes: x [M, K], weight [N, K], bias [N] or None; downs[i] [M, R_i], which is x times the update's first matrix, ups[i]
[N, R_i], its second. The result is [M, N], contiguous. Any strides and addresses.
Dtypes: all of one floating dtype; sums in fp32 (fp64 for fp64), rounded after each line: eager rounds each product and
its multiple by alpha besides.
tiles: how quack's GEMM is cut for the first line (`gemm_kernels.TILES`), or "" for cuBLAS.

On CUDA each update is a GEMM that adds to the result in place, with beta = 1: it reads and writes [M, N] once, where
eager's product is written, multiplied, and read again for the sum. The update: Hu et al., LoRA, arXiv 2106.09685.
Errors: ValueError where shapes, dtypes or tiles do not fit; ImportError where quack is missing. On a CPU the result is
the definition.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm
from .gemm_kernels import TILES
from .linear_ops import check, widened

SCHEMA = (
    "adapted_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] downs, Tensor[] ups, float[] alphas, "
    'str tiles="") -> Tensor'
)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    alphas: Sequence[float],
    tiles: str,
) -> None:
    check("adapted_linear", (x,), weight, bias)
    if not len(downs) == len(ups) == len(alphas):
        found = f"{len(downs)} downs, {len(ups)} ups, {len(alphas)} alphas"
        raise ValueError(f"dkfuse::adapted_linear: {found}; one of each is needed for every update.")
    for down, up in zip(downs, ups, strict=True):
        check("adapted_linear", (down,), up, None)
        if down.dtype != x.dtype or down.shape[0] != x.shape[0] or up.shape[0] != weight.shape[0]:
            found = f"{list(down.shape)} and {list(up.shape)} of {down.dtype}"
            wanted = f"[{x.shape[0]}, R] and [{weight.shape[0]}, R] of {x.dtype}"
            raise ValueError(f"dkfuse::adapted_linear: an update is {found}; it must be {wanted}.")
    if tiles and tiles not in TILES:
        raise ValueError(f"dkfuse::adapted_linear: there are no tiles {tiles!r}; known: {', '.join(TILES)}")


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    alphas: Sequence[float],
    tiles: str = "",
) -> Tensor:
    """The definition: fp32 inside (fp64 for fp64), the sum rounded after every product."""
    _check(x, weight, bias, downs, ups, alphas, tiles)
    total = F.linear(widened(x), widened(weight), None if bias is None else widened(bias)).to(x.dtype)
    for down, up, alpha in zip(downs, ups, alphas, strict=True):
        total = (widened(total) + alpha * F.linear(widened(down), widened(up))).to(x.dtype)
    return total


def _cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    alphas: Sequence[float],
    tiles: str = "",
) -> Tensor:
    _check(x, weight, bias, downs, ups, alphas, tiles)
    out, index = x.new_empty((x.shape[0], weight.shape[0])), x.device.index
    with torch.cuda.device(index) if index != torch.cuda.current_device() else contextlib.nullcontext():
        added = [bias] if bias is not None else []
        into(x, weight, *downs, *ups, *added, alphas=alphas, tiles=tiles, out=out)
    return out


def into(x: Tensor, weight: Tensor, *more: Tensor, alphas: Sequence[float], tiles: str, out: Tensor) -> None:
    """The op into `out`, contiguous, of a call that was checked, on the current device.

    more: the downs, the ups, and the bias where there is one
    """
    count = len(alphas)
    downs, ups, (bias,) = more[:count], more[count : 2 * count], more[2 * count :] or (None,)
    if not out.is_cuda:
        out.copy_(reference(x, weight, bias, downs, ups, alphas))
        return
    if tiles:
        gemm.into(x, weight, bias, act="none", tiles=tiles, out=out)
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
    for down, up, alpha in zip(downs, ups, alphas, strict=True):
        out.addmm_(down, up.t(), alpha=alpha)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    alphas: Sequence[float],
    tiles: str = "",
) -> Tensor:
    _check(x, weight, bias, downs, ups, alphas, tiles)
    return x.new_empty((x.shape[0], weight.shape[0]))


_library = torch.library.Library("dkfuse", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
torch.library.register_fake("dkfuse::adapted_linear", _fake, lib=_library)
_library.impl("adapted_linear", reference, "CompositeExplicitAutograd")
_library.impl("adapted_linear", _cuda, "CUDA")
