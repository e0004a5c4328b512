"""Which ops get a direct call in the code that Inductor writes (`compat_direct`), and which operands each is given.

Sizes are Inductor's, numbers or symbols. What a function wants that a layout does not promise, it sees to itself, so
that None is said only where another kernel is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

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
    x: Any, weight: Any, bias: Any = None, *, act: str = "none", using: str = "cublas", tiles: str = ""
) -> Call | None:
    from dkfuse.kernels.gemm_kernels import DEFAULT_TILES, GATED, QUACK

    if using != QUACK:
        return None
    keywords = {"act": act, "tiles": tiles or DEFAULT_TILES}
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
    tensors: list[Any] = []
    pieces: list[tuple[int, int, bool, str]] = []
    numbers = [n for stream in streams for t in stream if t is not None for n in (*size(t), *t.get_layout().stride)]
    if symbolic(batch, *numbers):
        return None
    rows = [int(size(x)[0]) // int(batch) for x, *_ in streams]
    for sample in range(int(batch)):
        for i, ((x, weight, bias), cut) in enumerate(zip(streams, tiles, strict=True)):
            given = [t for t in (x, weight, bias) if t is not None]
            if not rows[i] or (cut and not all(map(rows_of_vectors, given))):
                return None
            (_, columns), (outer, inner) = size(x), x.get_layout().stride
            part = viewed(x, [rows[i], columns], [outer, inner], sample * rows[i] * outer)
            tensors += [batched(part), batched(weight)] if cut else [part, transposed(weight)]
            if bias is not None:
                tensors.append(row(bias) if cut else bias)
            pieces.append((sample * sum(rows) + sum(rows[:i]), rows[i], bias is not None, cut))
    return Call("joint_linear.into_pieces", tensors, {"pieces": pieces})


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
    from dkfuse.kernels.attention_fa4 import known

    if using != "fa4" or mask is not None or not known():
        return None
    tensors = [realized(permuted(t, (0, 2, 1, 3))) for t in (q, k, v)]
    tensors += [realized(key_lengths)] if key_lengths is not None else []
    layouts = [(size(t), list(t.get_layout().stride)) for t in tensors]
    known_sizes = not symbolic(*(n for lists in layouts for numbers in lists for n in numbers))
    facts = (layouts, [str(t.get_dtype()) for t in tensors], causal, scale)
    key = repr(facts) if known_sizes else None
    keywords = {"causal": causal, "scale": scale, "gqa": gqa, "bounded": bounded, "key": key}
    return Call("attention.into", tensors, keywords, tokens_first)


@functools.cache
def ops() -> dict[Any, Callable[..., Call | None]]:
    """By op, its arguments as those of a direct call; None where it is to be called as an op."""
    from dkfuse.kernels import attention as _attention  # noqa: F401  (they register the ops)
    from dkfuse.kernels import gemm, linear_ops  # noqa: F401
    from dkfuse.kernels import joint_linear as _joint_linear  # noqa: F401

    ours = torch.ops.dkfuse
    return {
        ours.linear.default: linear,
        ours.joint_linear.default: joint_linear,
        ours.split_linear.default: split_linear,
        ours.attention.default: attention,
        aten._addmm_activation.default: addmm_gelu,
    }
