"""Calls of GEMMs and attentions past torch's dispatcher, in the code that Inductor writes: how it is made to.

    buf = torch.ops.dkfuse.linear.default(x, weight, bias, act="gelu", ...)      what Inductor writes for an op
    extern_kernels.addmm(bias, x, weight, ..., out=buf)                          what it writes for cuBLAS
    _dkfuse_gemm.into(x, weight, bias, act="gelu", ..., out=buf)                 what it writes here

An op's call costs the CPU 11 us more, as long as the GEMM's own launch takes, and its result is memory that Inductor
did not plan. Which calls there are is said by `rewriting.direct_calls`; operands are made the views that they want by
Inductor, which has to make some in any case.

Graphs written as C++, calls of kernels that have no such function, and devices but CUDA's and the CPU stay with the op.
Registered only while a graph of ours is compiled: one of the ops is torch's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

# Of a module's name in generated code. Kernels that fail in a first launch are known by `dkfuse_` (`choosing.watch`),
# and answered by a compilation without them: what is called here has no other to take its place.
PREFIX = "_dkfuse_"


class Call(NamedTuple):
    """A call in generated code: a module of `dkfuse.kernels`, or torch, and its function, the tensors and what else it
    is given, and the view of the result that it writes to."""

    function: str
    tensors: Sequence[Any]
    keywords: dict[str, Any]
    view: Callable[[Any], Any] | None = None


Ops = Mapping[Any, Callable[..., Call | None]]  # by overload, its arguments as those of a direct call; None: it is none
_inside: list[contextlib.ExitStack] = []  # of compilations, what is undone when they end


@contextlib.contextmanager
def direct_calls() -> Iterator[None]:
    """Inside, after `begin`, Inductor writes direct calls."""
    with contextlib.ExitStack() as stack:
        _inside.append(stack)
        stack.callback(_inside.pop)
        yield


def begin(ops: Ops) -> None:
    """Have Inductor write direct calls for `ops` until the `direct_calls` around ends, if there is one.

    For a graph that is compiled: of one from its cache Inductor does not load its lowerings, which takes 0.3 s.
    """
    if not _inside:
        return
    from torch._inductor import lowering

    ours: dict[Any, Any] = {}
    for op, call in ops.items():
        lower = _lowering(call, lowering.fallback_handler(op))
        lowering.register_lowering(op, type_promotion_kind=None, lowering_dict=ours)(lower)
    known = lowering.lowerings
    for op, lower in ours.items():
        before = known.get(op)
        known[op] = lower
        _inside[-1].callback(known.pop if before is None else known.__setitem__, op, before)


def _lowering(direct: Callable[..., Call | None], fallback: Callable[..., Any]) -> Callable[..., Any]:
    def lower(*args: Any, **kwargs: Any) -> Any:
        from torch._inductor import ir
        from torch._inductor.virtualized import V

        result = V.graph.current_node.meta["val"]
        python = not V.graph.cpp_wrapper and not getattr(V.graph, "fx_wrapper", False)
        possible = python and result.device.type in ("cuda", "cpu")
        call = direct(*args, **kwargs) if possible else None
        if call is None:
            return fallback(*args, **kwargs)
        sizes, strides = (ir.convert_shape_to_inductor(n) for n in (result.shape, result.stride()))
        out = _node()(
            layout=ir.FixedLayout(result.device, result.dtype, sizes, strides),
            inputs=call.tensors,
            kwargs=call.keywords,
            python_kernel_name=call.function if call.function.startswith("torch.") else PREFIX + call.function,
        )
        box = ir.TensorBox.create(out)
        if call.view is not None:
            out.output_view = call.view(box)  # its own parameter of that name is not used
        return box

    return lower


@functools.cache
def _node() -> Any:
    """Inductor's node of a call that writes into memory given to it, which has the function's module imported."""
    from torch._inductor import ir

    class DirectCall(ir.ExternKernelOut):
        def codegen(self, wrapper: Any) -> None:
            prefix, _, _ = str(self.python_kernel_name).partition(".")
            if prefix != "torch":
                wrapper.add_import_once(f"import dkfuse.kernels.{prefix.removeprefix(PREFIX)} as {prefix}")
            super().codegen(wrapper)

    return DirectCall


# -- views -------------------------------------------------------------------------------------------------------------


def realized(tensor: Any) -> Any:
    """`tensor` as a buffer in memory or a view of one, whose layout is settled."""
    from torch._inductor import ir

    found = ir.ExternKernel.realize_input(tensor)
    ir.as_storage_and_layout(found)
    return found


def size(tensor: Any) -> list[Any]:
    return list(tensor.get_layout().size)


def permuted(tensor: Any, dims: Sequence[int]) -> Any:
    from torch._inductor.lowering import lowerings

    return lowerings[torch.ops.aten.permute.default](tensor, list(dims))


def viewed(tensor: Any, sizes: Sequence[Any], strides: Sequence[Any], start: Any = 0) -> Any:
    """The same memory in another shape, from its element `start` on."""
    from torch._inductor import ir

    storage, layout = ir.as_storage_and_layout(tensor)
    other = ir.FixedLayout(layout.device, layout.dtype, list(sizes), list(strides), layout.offset + start)
    return ir.ReinterpretView(data=storage, layout=other)


def batched(matrix: Any) -> Any:
    """[rows, columns] as [rows, columns, 1], as `gemm_quack.batched` makes it."""
    (rows, columns), (outer, _) = size(matrix), matrix.get_layout().stride
    return viewed(matrix, [rows, columns, 1], [outer, 1, rows * outer])


def row(vector: Any) -> Any:
    (columns,) = size(vector)
    return viewed(vector, [1, columns], [columns, 1])


def transposed(matrix: Any) -> Any:
    return viewed(matrix, size(matrix)[::-1], list(matrix.get_layout().stride)[::-1])


def symbolic(*numbers: Any) -> bool:
    return any(getattr(n, "free_symbols", ()) for n in numbers)


def tokens_first(out: Any) -> Any:
    (batch, heads, tokens, width), strides = size(out), out.get_layout().stride
    return viewed(out, [batch, tokens, heads, width], [strides[i] for i in (0, 2, 1, 3)])


def rows_of_vectors(tensor: Any) -> bool:
    """Whether the rows of a matrix, or a vector, are dense and begin at whole 16 bytes, as far as its layout says."""
    from torch._inductor.virtualized import V

    from dkfuse.kernels.gemm_kernels import ALIGNMENT

    layout, known = tensor.get_layout(), V.graph.sizevars
    *outer, inner = layout.stride
    whole = all(known.statically_known_multiple_of(n, ALIGNMENT) for n in (*outer, layout.offset))
    return whole and known.statically_known_equals(inner, 1)
