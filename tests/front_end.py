"""What compilers see of a launch: the tensors that Inductor finds written, and the PTX that Triton makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dkfuse.kernels.launch import Launch


def written(launch: Launch, tensors: Mapping[str, Any]) -> set[str]:
    """The kernel's parameters that Inductor takes to be written; `tensors` by the names that the launch has for them.

    A kernel that its analysis does not understand counts as writing every operand, which costs a copy of each.
    """
    import torch._higher_order_ops.triton_kernel_wrap as wrap

    kwargs = {**{p: tensors[n] for p, n in launch.tensors.items()}, **launch.scalars, **launch.constants}
    if hasattr(wrap, "identify_mutated_tensors"):  # torch 2.11
        return set(wrap.identify_mutated_tensors(launch.kernel, kwargs, {}))
    accesses = wrap.identify_accessed_tensors(launch.kernel, kwargs, {})
    return {dep.name for dep in accesses.read_writes.writes}


def ptx_of(launch: Launch, target: Any, dtypes: Mapping[str, str] | None = None) -> str:
    """Compiled for `target` with aligned pointers: to masks where they pick, else of `dtypes`, by default bf16."""
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    names = list(launch.kernel.arg_names)
    pointers = dict.fromkeys(launch.tensors, "*bf16") | {"pick": "*i1"} | dict(dtypes or {})
    signature = {n: pointers[n] if n in launch.tensors else "constexpr" for n in names}
    signature.update(dict.fromkeys(launch.scalars, "i32"))
    constants = {(names.index(n),): v for n, v in launch.constants.items()}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in launch.tensors}
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=aligned)
    return compile_kernel(source, target=target, options={"num_warps": launch.num_warps}).asm["ptx"]
