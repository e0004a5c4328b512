"""`dkfuse::joint_linear`: linears of several streams, their results one after the other as joint attention reads them.

    out[b] = cat([x_1[b] @ weight_1.T + bias_1, x_2[b] @ weight_2.T + bias_2, ...])

Shapes: x_i [B*S_i, K_i], the rows of a sample together; weight_i [N, K_i]; bias_i [N] or None; batch is B. The result
is [B, S_1 + S_2 + ..., N], contiguous. Any strides and addresses.
Dtypes: all of one floating dtype; sums in fp32 (fp64 for fp64), rounded once.
tiles: for each stream how quack's GEMM is cut (`gemm_kernels.TILES`), or "" for cuBLAS.

Each product is written where it belongs: rows of one sample are one matrix in the result, so that there is a GEMM for
each stream and sample, and no copy.
Errors: ValueError where shapes, dtypes or tiles do not fit; ImportError where quack is missing. On a CPU the result is
the definition.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm, gemm_quack
from .gemm_kernels import TILES
from .linear_ops import check, widened

SCHEMA = "joint_linear(Tensor[] xs, Tensor[] weights, Tensor?[] biases, int batch, str[] tiles) -> Tensor"


def _check(
    xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], batch: int, tiles: Sequence[str]
) -> None:
    if not len(xs) == len(weights) == len(biases) == len(tiles) or not xs:
        found = f"{len(xs)} xs, {len(weights)} weights, {len(biases)} biases, {len(tiles)} tiles"
        raise ValueError(f"dkfuse::joint_linear: {found}; one of each is needed for every stream.")
    for x, weight, bias in zip(xs, weights, biases, strict=True):
        check("joint_linear", (x,), weight, bias)
        if x.dtype != xs[0].dtype or weight.shape[0] != weights[0].shape[0]:
            raise ValueError("dkfuse::joint_linear: the streams differ in dtype or in the columns of their results.")
        if batch < 1 or x.shape[0] % batch:
            raise ValueError(f"dkfuse::joint_linear: {x.shape[0]} rows cannot be those of {batch} samples.")
    if unknown := [name for name in tiles if name and name not in TILES]:
        raise ValueError(f"dkfuse::joint_linear: there are no tiles {unknown[0]!r}; known: {', '.join(TILES)}")


def reference(
    xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], batch: int, tiles: Sequence[str]
) -> Tensor:
    """The definition: fp32 inside (fp64 for fp64), one rounding."""
    _check(xs, weights, biases, batch, tiles)
    parts = []
    for x, weight, bias in zip(xs, weights, biases, strict=True):
        product = F.linear(widened(x), widened(weight), None if bias is None else widened(bias)).to(x.dtype)
        parts.append(product.view(batch, -1, weight.shape[0]))
    return torch.cat(parts, 1)


def _empty(xs: Sequence[Tensor], weights: Sequence[Tensor], batch: int) -> Tensor:
    return xs[0].new_empty((batch, sum(x.shape[0] // batch for x in xs), weights[0].shape[0]))


def _cuda(
    xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], batch: int, tiles: Sequence[str]
) -> Tensor:
    _check(xs, weights, biases, batch, tiles)
    out = _empty(xs, weights, batch)
    index = out.device.index
    with torch.cuda.device(index) if index != torch.cuda.current_device() else contextlib.nullcontext():
        _write(xs, weights, biases, batch, tiles, out)
    return out


def into(*tensors: Tensor, biased: Sequence[bool], batch: int, tiles: Sequence[str], out: Tensor) -> None:
    """The op into `out`, contiguous, of a call that was checked, on the current device.

    tensors: every stream's x, every one's weight, the biases that there are; biased: which streams have one
    """
    streams, added = len(tiles), iter(tensors[2 * len(tiles) :])
    biases = [next(added) if has else None for has in biased]
    xs, weights = tensors[:streams], tensors[streams : 2 * streams]
    if out.is_cuda:
        _write(xs, weights, biases, batch, tiles, out)
    else:
        out.copy_(reference(xs, weights, biases, batch, tiles))


def places(rows: Sequence[int], batch: int) -> list[tuple[int, int, int]]:
    """(stream, sample, first row in the result) of each product, of streams with `rows` in a sample; not of none."""
    starts = list(itertools.accumulate(rows, initial=0))
    products = itertools.product(range(len(rows)), range(batch))
    return [(i, sample, sample * starts[-1] + starts[i]) for i, sample in products if rows[i]]


def into_pieces(*tensors: Tensor, pieces: Sequence[tuple[int, int, bool, str]], out: Tensor) -> None:
    """The op into `out`, contiguous, of a call that was checked and whose sizes are known, on the current device.

    pieces: a product each, of one stream and sample: where its rows start in the result, how many they are, whether a
    bias is added, and how quack's GEMM is cut. tensors: every piece's a, b and bias, for cuBLAS [rows, K], [K, N] and
    [N], for quack as `gemm.into_batched` takes them.
    """
    columns, operands, begin = out.shape[2], iter(tensors), out.storage_offset()
    for start, rows, biased, cut in pieces:
        a, b, bias = next(operands), next(operands), next(operands) if biased else None
        size, stride = (rows, columns), (columns, 1)
        if cut:
            place = out.as_strided((*size, 1), (*stride, rows * columns), begin + start * columns)
            gemm.into_batched(a, b, bias, act="none", tiles=cut, out=place)
        elif bias is None:
            torch.mm(a, b, out=out.as_strided(size, stride, begin + start * columns))
        else:
            torch.addmm(bias, a, b, out=out.as_strided(size, stride, begin + start * columns))


def _write(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    batch: int,
    tiles: Sequence[str],
    out: Tensor,
) -> None:
    tensors: list[Tensor] = []
    pieces: list[tuple[int, int, bool, str]] = []
    rows = [x.shape[0] // batch for x in xs]
    for i, sample, start in places(rows, batch):
        part, weight, bias, cut = xs[i].narrow(0, sample * rows[i], rows[i]), weights[i], biases[i], tiles[i]
        if cut:
            tensors += [gemm_quack.batched(gemm_quack.readable(t)) for t in (part, weight)]
        else:
            tensors += [part, weight.t()]
        if bias is not None:
            tensors.append(gemm_quack.vector(bias, "none") if cut else bias)
        pieces.append((start, rows[i], bias is not None, cut))
    into_pieces(*tensors, pieces=pieces, out=out)


def _fake(
    xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], batch: int, tiles: Sequence[str]
) -> Tensor:
    _check(xs, weights, biases, batch, tiles)
    return _empty(xs, weights, batch)


_library = torch.library.Library("dkfuse", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
torch.library.register_fake("dkfuse::joint_linear", _fake, lib=_library)
_library.impl("joint_linear", reference, "CompositeExplicitAutograd")
_library.impl("joint_linear", _cuda, "CUDA")
