"""Every private torch import of dkfuse, in one file; `tests/test_compat.py` is the canary for torch upgrades."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true as _statically_known_true


def statically_known_true(condition: Any) -> bool:
    """True when `condition` holds for every value of the symbols in it; never adds a guard."""
    return condition if isinstance(condition, bool) else _statically_known_true(condition)


def stable_topological_sort(graph: fx.Graph) -> None:
    """Order `graph` so that every node follows its inputs, moving as little as possible."""
    from torch._inductor.pattern_matcher import stable_topological_sort as sort

    sort(graph)


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for `mode` (with None torch would return those of all modes)."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode is not None else {}


def launch_options() -> dict[str, Any]:
    """Options under which Inductor launches a kernel node of ours like its own: 2 us on top of it instead of 9."""
    import torch._inductor.config as config

    name = "static_launch_user_defined_triton_kernels"
    return {name: True} if hasattr(config, name) else {}


def inductor(gm: fx.GraphModule, inputs: Any, options: dict[str, Any]) -> Any:
    """Compile with Inductor."""
    import torch._inductor

    return torch._inductor.compile(gm, inputs, options=options)


def lower_with(gm: fx.GraphModule, inputs: Any, inner: Callable[[fx.GraphModule, Any], Any], options: dict) -> Any:
    """Trace `gm` exactly as Inductor would, and give each functional ATen graph to `inner`: no code is generated."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    def inner_compile(graph_module: fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
        view_to_reshape(graph_module)
        graph_module.graph.eliminate_dead_code()
        compiled = inner(graph_module, example_inputs)

        def run(*args: Any) -> Any:
            values = list(args[0]) if len(args) == 1 and isinstance(args[0], list) else args
            if len(args) == 1 and isinstance(args[0], list):
                args[0].clear()
            return compiled(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    disabled = {"freezing": False, "cpp_wrapper": False, "force_disable_caches": True}
    return compile_fx(gm, inputs, inner_compile=inner_compile, config_patches={**options, **disabled})


def inductor_config(name: str) -> Any:
    """A value of Inductor's configuration as it is now."""
    import torch._inductor.config as config

    return getattr(config, name)


def cache_folder() -> str:
    """Inductor's cache folder."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    return cache_dir()


def graph_pass(function: Callable[[fx.Graph], None], uuid: Any) -> Any:
    """`function` as a graph pass of Inductor; a None `uuid` keeps the graph out of Inductor's cache."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            function(graph)

        def uuid(self) -> Any:
            return uuid

    return Pass()


def pass_uuid(user_pass: Any) -> Any:
    """The cache identity of a user's own pass, None when it has none."""
    return user_pass.uuid() if hasattr(user_pass, "uuid") else None


def decompositions() -> dict:
    """Inductor's decomposition table: what graphs at the hook have been through."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


# -- Triton kernels inside an FX graph -------------------------------------------------------------------------------


def triton_call_target() -> Any:
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional

    return triton_kernel_wrapper_functional


def register_triton_kernel(kernel: Any, constants: dict[str, Any]) -> tuple[int, int]:
    """``(kernel_idx, constant_args_idx)`` of a kernel and its constants in torch's side table."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    return kernel_side_table.add_kernel(kernel), kernel_side_table.add_constant_args(constants)


def triton_kernel_name(node: fx.Node) -> str:
    """The name of the kernel that a kernel node launches, as profiles show it."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    return getattr(kernel, "fn", kernel).fn.__name__


def real_tensors() -> Any:
    """A context in which tensors are real, also where torch traces with fake ones."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def environment_fingerprint() -> str:
    """Torch, Triton and GPU: what a stored record is only valid for."""
    parts = [torch.__version__, str(torch.version.cuda), os.environ.get("TRITON_INTERPRET", "")]
    if torch.cuda.is_available():
        parts += [torch.cuda.get_device_name(), str(torch.cuda.get_device_capability())]
    return "|".join(parts)
