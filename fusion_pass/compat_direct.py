"""Calls of GEMMs and attentions in the code that Inductor writes, past torch's dispatcher.

    buf = torch.ops.dkfuse.linear.default(x, weight, bias, act="gelu", ...)      what Inductor writes for an op
    extern_kernels.dkfuse_linear(x, weight, bias, act="gelu", ..., out=buf)      what it writes for cuBLAS, and here

An op's call costs the CPU 11 us more, as long as the GEMM's own launch takes, and its result is memory that Inductor
did not plan. Operands are made the views that kernels want by Inductor, which has to make some in any case.

Graphs written as C++, calls of kernels that have no such function, and devices but CUDA's and the CPU stay with the op.
Registered only while a graph of ours is compiled: one of the ops is torch's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten


class Call(NamedTuple):
    """A call in generated code: the function's name, its tensors, its keywords, and the view of the result it gets."""

    function: str
    tensors: Sequence[Any]
    keywords: dict[str, Any]
    view: Callable[[Any], Any] | None = None


def linear(
    x: Any, weight: Any, bias: Any = None, *, act: str = "none", using: str = "cublas", tiles: str = ""
) -> Call | None:
    from dkfuse.kernels.gemm_kernels import DEFAULT_TILES, GATED, QUACK

    if using != QUACK:
        return None
    keywords = {"act": act, "tiles": tiles or DEFAULT_TILES}
    tensors = [_realized(t) for t in (x, weight, bias) if t is not None]
    if not all(map(_rows_of_vectors, tensors)) or (bias is not None and act in GATED):
        return Call("dkfuse_linear", tensors, keywords)
    matrices, vectors = tensors[:2], tensors[2:]
    views = [*map(_batched, matrices), *map(_row, vectors)]
    return Call("dkfuse_linear_batched", views, keywords, _batched)


def joint_linear(xs: Any, weights: Any, biases: Any, batch: int, tiles: Sequence[str]) -> Call:
    given = zip(xs, weights, biases, strict=True)
    streams = [[_realized(t) if t is not None else None for t in stream] for stream in given]
    if (call := _in_pieces(streams, batch, tiles)) is not None:
        return call
    biased = [bias is not None for bias in biases]
    tensors = [stream[i] for i in range(3) for stream in streams if stream[i] is not None]
    return Call("dkfuse_joint_linear", tensors, {"biased": biased, "batch": batch, "tiles": list(tiles)})


def _in_pieces(streams: list[list[Any]], batch: int, tiles: Sequence[str]) -> Call | None:
    """The call with a view for each operand of each product; None where sizes are symbols, or quack needs copies."""
    tensors: list[Any] = []
    pieces: list[tuple[int, int, bool, str]] = []
    numbers = [n for stream in streams for t in stream if t is not None for n in (*_size(t), *t.get_layout().stride)]
    if _symbolic(batch, *numbers):
        return None
    rows = [int(_size(x)[0]) // int(batch) for x, *_ in streams]
    for sample in range(int(batch)):
        for i, ((x, weight, bias), cut) in enumerate(zip(streams, tiles, strict=True)):
            given = [t for t in (x, weight, bias) if t is not None]
            if not rows[i] or (cut and not all(map(_rows_of_vectors, given))):
                return None
            (_, columns), (outer, inner) = _size(x), x.get_layout().stride
            part = _viewed(x, [rows[i], columns], [outer, inner], sample * rows[i] * outer)
            tensors += [_batched(part), _batched(weight)] if cut else [part, _transposed(weight)]
            if bias is not None:
                tensors.append(_row(bias) if cut else bias)
            pieces.append((sample * sum(rows) + sum(rows[:i]), rows[i], bias is not None, cut))
    return Call("dkfuse_joint_linear_pieces", tensors, {"pieces": pieces})


def split_linear(parts: Any, weight: Any, bias: Any) -> Call | None:
    tensors, matrix, start = [_realized(t) for t in parts], _realized(weight), 0
    (outputs, _), (outer, inner) = _size(matrix), matrix.get_layout().stride
    pairs = []
    for part in tensors:
        width = _size(part)[1]
        if _symbolic(width):
            return None
        pairs.append((part, _viewed(matrix, [width, outputs], [inner, outer], start * inner)))
        start += width
    pairs.sort(key=lambda pair: int(_size(pair[0])[1]))  # narrowest first, as the op adds them
    flat = [matrix for pair in pairs for matrix in pair]
    return Call("dkfuse_sum_of_products", [*flat, *([_realized(bias)] if bias is not None else [])], {})


def addmm_gelu(bias: Any, x: Any, weight: Any, *, beta: Any = 1, alpha: Any = 1, use_gelu: bool = False) -> Call | None:
    if (beta, alpha, use_gelu) != (1, 1, True):
        return None
    return Call("dkfuse_addmm_activation", [_realized(t) for t in (bias, x, weight)], {"use_gelu": True})


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
    from torch._inductor import lowering

    from dkfuse.kernels.attention_fa4 import known

    if using != "fa4" or mask is not None or not known():
        return None
    permute = lowering.lowerings[aten.permute.default]
    tensors = [_realized(permute(t, [0, 2, 1, 3])) for t in (q, k, v)]
    tensors += [_realized(key_lengths)] if key_lengths is not None else []
    layouts = [(_size(t), list(t.get_layout().stride)) for t in tensors]
    known_sizes = not _symbolic(*(n for lists in layouts for numbers in lists for n in numbers))
    facts = (layouts, [str(t.get_dtype()) for t in tensors], causal, scale)
    key = repr(facts) if known_sizes else None
    keywords = {"causal": causal, "scale": scale, "gqa": gqa, "bounded": bounded, "key": key}
    return Call("dkfuse_attention", tensors, keywords, _tokens_first)


# -- views -------------------------------------------------------------------------------------------------------------


def _realized(tensor: Any) -> Any:
    """`tensor` as a buffer in memory or a view of one, whose layout is settled."""
    from torch._inductor import ir

    found = ir.ExternKernel.realize_input(tensor)
    ir.as_storage_and_layout(found)
    return found


def _size(tensor: Any) -> list[Any]:
    return list(tensor.get_layout().size)


def _viewed(tensor: Any, size: Sequence[Any], stride: Sequence[Any], start: Any = 0) -> Any:
    """The same memory in another shape, from its element `start` on."""
    from torch._inductor import ir

    storage, layout = ir.as_storage_and_layout(tensor)
    other = ir.FixedLayout(layout.device, layout.dtype, list(size), list(stride), layout.offset + start)
    return ir.ReinterpretView(data=storage, layout=other)


def _batched(matrix: Any) -> Any:
    """[rows, columns] as [rows, columns, 1], as `gemm_quack.batched` makes it."""
    (rows, columns), (outer, _) = _size(matrix), matrix.get_layout().stride
    return _viewed(matrix, [rows, columns, 1], [outer, 1, rows * outer])


def _row(vector: Any) -> Any:
    (columns,) = _size(vector)
    return _viewed(vector, [1, columns], [columns, 1])


def _transposed(matrix: Any) -> Any:
    return _viewed(matrix, _size(matrix)[::-1], list(matrix.get_layout().stride)[::-1])


def _symbolic(*numbers: Any) -> bool:
    return any(getattr(n, "free_symbols", ()) for n in numbers)


def _tokens_first(out: Any) -> Any:
    (batch, heads, tokens, width), strides = _size(out), out.get_layout().stride
    return _viewed(out, [batch, tokens, heads, width], [strides[i] for i in (0, 2, 1, 3)])


def _rows_of_vectors(tensor: Any) -> bool:
    """Whether the rows of a matrix, or a vector, are dense and begin at whole 16 bytes, as far as its layout says."""
    from torch._inductor.virtualized import V

    from dkfuse.kernels.gemm_kernels import ALIGNMENT

    layout, sizes = tensor.get_layout(), V.graph.sizevars
    *outer, inner = layout.stride
    whole = all(sizes.statically_known_multiple_of(n, ALIGNMENT) for n in (*outer, layout.offset))
    return whole and sizes.statically_known_equals(inner, 1)


# -- lowerings ---------------------------------------------------------------------------------------------------------


def _ops() -> dict[Any, Callable[..., Call | None]]:
    from torch._inductor.select_algorithm import extern_kernels

    from dkfuse.kernels import attention as _attention
    from dkfuse.kernels import gemm as _gemm
    from dkfuse.kernels import joint_linear as _joint_linear
    from dkfuse.kernels import linear_ops as _linear_ops

    functions = {
        "dkfuse_linear": _gemm.into,
        "dkfuse_linear_batched": _gemm.into_batched,
        "dkfuse_joint_linear": _joint_linear.into,
        "dkfuse_joint_linear_pieces": _joint_linear.into_pieces,
        "dkfuse_sum_of_products": _linear_ops.sum_of_products,
        "dkfuse_addmm_activation": torch._addmm_activation,
        "dkfuse_attention": _attention.into,
    }
    for name, function in functions.items():
        setattr(extern_kernels, name, function)
    return {
        torch.ops.dkfuse.linear.default: linear,
        torch.ops.dkfuse.joint_linear.default: joint_linear,
        torch.ops.dkfuse.split_linear.default: split_linear,
        torch.ops.dkfuse.attention.default: attention,
        aten._addmm_activation.default: addmm_gelu,
    }


@functools.cache
def _lowerings() -> dict[Any, Any]:
    """What Inductor does with each op; the functions are where code from its cache finds them, too."""
    from torch._inductor import lowering

    found: dict[Any, Any] = {}
    for op, call in _ops().items():
        lower = _lowering(op, call, lowering.fallback_handler(op))
        lowering.register_lowering(op, type_promotion_kind=None, lowering_dict=found)(lower)
    return found


@contextlib.contextmanager
def direct_calls() -> Iterator[None]:
    """Inside, Inductor writes direct calls."""
    from torch._inductor import lowering

    known, ours = lowering.lowerings, _lowerings()
    before = {op: known[op] for op in ours if op in known}
    known.update(ours)
    try:
        yield
    finally:
        for op in ours:
            known.pop(op, None)
        known.update(before)


def _lowering(op: Any, direct: Callable[..., Call | None], fallback: Callable[..., Any]) -> Callable[..., Any]:
    def lower(*args: Any, **kwargs: Any) -> Any:
        from torch._inductor import ir
        from torch._inductor.virtualized import V

        result = V.graph.current_node.meta["val"]
        possible = result.device.type in ("cuda", "cpu") and not V.graph.cpp_wrapper
        call = direct(*args, **kwargs) if possible else None
        if call is None:
            return fallback(*args, **kwargs)
        size, stride = (ir.convert_shape_to_inductor(n) for n in (result.shape, result.stride()))
        out = ir.ExternKernelOut(
            layout=ir.FixedLayout(result.device, result.dtype, size, stride),
            inputs=call.tensors,
            kwargs=call.keywords,
            python_kernel_name=f"extern_kernels.{call.function}",
        )
        box = ir.TensorBox.create(out)
        if call.view is not None:
            out.output_view = call.view(box)  # its own parameter of that name is not used
        return box

    return lower
