"""Which ops get a direct call in the code that Inductor writes (`compat_direct`), and which operands each is given.

Sizes are Inductor's, numbers or symbols. What a function wants that a layout does not promise, it sees to itself, so
that None is said only where another kernel is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import dkfuse.kernels.adapted_linear
import dkfuse.kernels.attention
import dkfuse.kernels.gemm
import dkfuse.kernels.linear_ops  # noqa: F401  (all of them register ops)
from dkfuse.kernels import cute_ahead
from dkfuse.kernels.gemm_kernels import CUBLAS, DEFAULT_TILES, GATED, QUACK
from dkfuse.kernels.joint_linear import places

from ..compat_direct import (
    Call,
    batched,
    permuted,
    realized,
    row,
    rows_of_vectors,
    size,
    symbolic,
    tokens_first,
    transposed,
    viewed,
)

aten = torch.ops.aten


def linear(
    x: Any, weight: Any, bias: Any = None, *, act: str = "none", using: str = CUBLAS, tiles: str = DEFAULT_TILES
) -> Call | None:
    if using != QUACK:
        return None
    keywords = {"act": act, "tiles": tiles}
    tensors = [realized(t) for t in (x, weight, bias) if t is not None]
    if not all(map(rows_of_vectors, tensors)) or (bias is not None and act in GATED):
        return Call("gemm.into", tensors, keywords)
    matrices, vectors = tensors[:2], tensors[2:]
    views = [*map(batched, matrices), *map(row, vectors)]
    return Call("gemm.into_batched", views, keywords, batched)


def joint_linear(xs: Any, weights: Any, biases: Any, batch: int, tiles: Sequence[str]) -> Call:
    given = zip(xs, weights, biases, strict=True)
    streams = [[realized(t) if t is not None else None for t in stream] for stream in given]
    if (call := _in_pieces(streams, batch, tiles)) is not None:
        return call
    biased = [bias is not None for bias in biases]
    tensors = [stream[i] for i in range(3) for stream in streams if stream[i] is not None]
    return Call("joint_linear.into", tensors, {"biased": biased, "batch": batch, "tiles": list(tiles)})


def _in_pieces(streams: list[list[Any]], batch: int, tiles: Sequence[str]) -> Call | None:
    """The call with a view for each operand of each product; None where sizes are symbols, or quack needs copies."""
    numbers = [n for stream in streams for t in stream if t is not None for n in (*size(t), *t.get_layout().stride)]
    if symbolic(batch, *numbers):
        return None
    rows = [int(size(x)[0]) // int(batch) for x, *_ in streams]
    by_quack = [t for stream, cut in zip(streams, tiles, strict=True) if cut for t in stream if t is not None]
    if not all(rows) or not all(map(rows_of_vectors, by_quack)):
        return None
    tensors: list[Any] = []
    pieces: list[tuple[int, int, bool, str]] = []
    for i, sample, start in places(rows, int(batch)):
        (x, weight, bias), cut = streams[i], tiles[i]
        (_, columns), (outer, inner) = size(x), x.get_layout().stride
        part = viewed(x, [rows[i], columns], [outer, inner], sample * rows[i] * outer)
        tensors += [batched(part), batched(weight)] if cut else [part, transposed(weight)]
        if bias is not None:
            tensors.append(row(bias) if cut else bias)
        pieces.append((start, rows[i], bias is not None, cut))
    return Call("joint_linear.into_pieces", tensors, {"pieces": pieces})


def adapted_linear(
    x: Any, weight: Any, bias: Any, downs: Any, ups: Any, alphas: Sequence[float], tiles: str = ""
) -> Call:
    added = [bias] if bias is not None else []
    tensors = [realized(t) for t in (x, weight, *downs, *ups, *added)]
    return Call("adapted_linear.into", tensors, {"alphas": list(alphas), "tiles": tiles})


def split_linear(parts: Any, weight: Any, bias: Any) -> Call | None:
    tensors, matrix, start = [realized(t) for t in parts], realized(weight), 0
    (outputs, _), (outer, inner) = size(matrix), matrix.get_layout().stride
    pairs = []
    for part in tensors:
        width = size(part)[1]
        if symbolic(width):
            return None
        pairs.append((part, viewed(matrix, [width, outputs], [inner, outer], start * inner)))
        start += width
    pairs.sort(key=lambda pair: int(size(pair[0])[1]))  # narrowest first, as the op adds them
    flat = [matrix for pair in pairs for matrix in pair]
    return Call("linear_ops.sum_of_products", [*flat, *([realized(bias)] if bias is not None else [])], {})


def addmm_gelu(bias: Any, x: Any, weight: Any, *, beta: Any = 1, alpha: Any = 1, use_gelu: bool = False) -> Call | None:
    if (beta, alpha, use_gelu) != (1, 1, True):
        return None
    return Call("torch._addmm_activation", [realized(t) for t in (bias, x, weight)], {"use_gelu": True})


def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    key_lengths: Any = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    gqa: bool = False,
    using: str = "sdpa",
    sure: int = 0,
    bounded: bool = False,
) -> Call | None:
    if using != "fa4" or mask is not None or not cute_ahead.fa4_is_known():
        return None
    tensors = [realized(permuted(t, (0, 2, 1, 3))) for t in (q, k, v)]
    tensors += [realized(key_lengths)] if key_lengths is not None else []
    layouts = [(size(t), list(t.get_layout().stride)) for t in tensors]
    known_sizes = not symbolic(*(n for lists in layouts for numbers in lists for n in numbers))
    facts = (layouts, [str(t.get_dtype()) for t in tensors], causal, scale)
    key = repr(facts) if known_sizes else None
    keywords = {"causal": causal, "scale": scale, "gqa": gqa, "bounded": bounded, "key": key}
    return Call("attention.into", tensors, keywords, tokens_first)


OPS: dict[Any, Callable[..., Call | None]] = {  # their arguments as those of a direct call; None: called as an op
    torch.ops.dkfuse.linear.default: linear,
    torch.ops.dkfuse.joint_linear.default: joint_linear,
    torch.ops.dkfuse.split_linear.default: split_linear,
    torch.ops.dkfuse.adapted_linear.default: adapted_linear,
    torch.ops.dkfuse.attention.default: attention,
    aten._addmm_activation.default: addmm_gelu,
}
