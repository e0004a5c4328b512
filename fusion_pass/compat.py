"""Every private torch import of dkfuse, here and in other `compat_*`; canary for upgrades: `tests/test_compat.py`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true as _statically_known_true

from .compat_direct import direct_calls
from .compat_triton import workers_told, writes_known


def statically_known_true(condition: Any) -> bool:
    """True when `condition` holds for every value of the symbols in it; never adds a guard."""
    return condition if isinstance(condition, bool) else _statically_known_true(condition)


def hint(size: Any) -> int | None:
    """What a symbolic size was in the example inputs, without a guard; None where no input backs it."""
    if isinstance(size, int):
        return size
    value = getattr(size.node, "_hint", None)
    if value is None and getattr(size.node, "shape_env", None) is not None:
        from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

        if not has_free_unbacked_symbols(size):
            value = size.node.hint
    return int(value) if isinstance(value, int) else None


def real_tensors() -> AbstractContextManager[Any]:
    """Inside, tensors are real though a graph is being compiled."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def stable_topological_sort(graph: fx.Graph) -> None:
    """Order `graph` so that every node follows its inputs, moving as little as possible."""
    from torch._inductor.pattern_matcher import stable_topological_sort as sort

    sort(graph)


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for `mode` (with None torch would return those of all modes)."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode is not None else {}


def inductor(gm: fx.GraphModule, inputs: Any, options: dict[str, Any]) -> Any:
    """Compile with Inductor a graph that a pass of ours will see, whose `pass_uuid` keeps it apart in caches."""
    with writes_known(), workers_told(), direct_calls():
        return plain_inductor(gm, inputs, options)


def plain_inductor(gm: fx.GraphModule, inputs: Any, options: dict[str, Any]) -> Any:
    """Compile with Inductor as torch.compile would: its caches may give others the same code."""
    import torch._inductor

    return torch._inductor.compile(gm, inputs, options=options)


def lower_with(gm: fx.GraphModule, inputs: Any, inner: Callable[[fx.GraphModule, Any], Any], options: dict) -> Any:
    """Trace `gm` exactly as Inductor would, and give each functional ATen graph to `inner`: no code is generated."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    def inner_compile(graph_module: fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
        view_to_reshape(graph_module)
        graph_module.graph.eliminate_dead_code()
        _count_in_int32(graph_module.graph)
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


def _count_in_int32(graph: fx.Graph) -> None:
    """Torch writes `torch.eye` as uint16 numbers that are compared, which Inductor can count and eager mode cannot."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.prims.iota.default):
        if node.kwargs.get("dtype") == torch.uint16:
            node.kwargs = {**node.kwargs, "dtype": torch.int32}


def inductor_config(name: str) -> Any:
    """A value of Inductor's configuration as it is now."""
    import torch._inductor.config as config

    return getattr(config, name)


TIMING = ("max_autotune", "max_autotune_pointwise")


def modes(options: Mapping[str, Any]) -> tuple[bool, ...]:
    """Inductor's settings that our choices depend on, as they will be under `options`."""
    names = (*TIMING, "deterministic", "triton.cudagraphs")
    return tuple(bool(options.get(name, inductor_config(name))) for name in names)


def autotunes_pointwise() -> bool:
    """Whether Inductor is to time what it generates, and not forbidden to for the sake of equal results."""
    return any(inductor_config(name) for name in TIMING) and not inductor_config("deterministic")


def keep_busy(cycles: int) -> None:
    """Have the GPU do nothing for so many of its cycles, while more is queued."""
    torch.cuda._sleep(cycles)


def forget_compilations() -> None:
    """Forget every compiled function and all that Inductor holds in memory: what is compiled next comes from disk."""
    torch._dynamo.reset()
    forget_kernels()


def forget_kernels() -> None:
    """Forget what Inductor holds in memory of the kernels it compiled; compiled functions go on as they are."""
    from torch._inductor.utils import clear_caches

    clear_caches()


def skip_vector_trial() -> None:
    """Let Inductor write scalar code for what a graph computes on the CPU, unless the environment says otherwise.

    Else the first side of a comparison pays for the C++ compiler's trial of what vectors the CPU has, once per set of
    caches: a minute on a large host, for the rotary tables that some models make on the CPU.
    """
    import torch._inductor.config as config

    if config.cpp.vec_isa_ok is None:
        config.cpp.vec_isa_ok = False


def quiet_autotuning() -> None:
    """No table on stderr for each matrix product that max-autotune tries kernels for."""
    import torch._inductor.select_algorithm as select_algorithm

    select_algorithm.PRINT_AUTOTUNE = False


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


def environment_fingerprint() -> str:
    """Torch, its CUDA, cuDNN, the current GPU, and whether Triton is interpreted: what is stored is for these only.

    cuDNN is a package of its own, and whether attention may be its depends on its version.
    """
    parts = [torch.__version__, str(torch.version.cuda), os.environ.get("TRITON_INTERPRET", "")]
    if torch.cuda.is_available():
        parts += [torch.cuda.get_device_name(), str(torch.cuda.get_device_capability())]
        parts += [str(torch.backends.cudnn.version())]
    return "|".join(parts)


# -- inputs of compiled graphs ---------------------------------------------------------------------------------------


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether `tensor` stands for one without its memory."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is (or, faked, stands for) plain memory, not a class of its own over other tensors."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or is_fake(tensor)
    own_data = type(tensor) is not torch.nn.Parameter or is_fake(tensor) or type(tensor.data) is torch.Tensor
    return plain and own_data and tensor.layout is torch.strided and not tensor.is_quantized


def same_pointers(tensors: list[Any], pointers: list[int], indices: list[int]) -> bool:
    """Whether ``tensors[i]`` lies at ``pointers[i]`` for every i of `indices`: in C++ where torch is built for CUDA."""
    if _pointers_equal is not None:
        return _pointers_equal(tensors, pointers, indices)
    return all(tensors[i].data_ptr() == pointers[i] for i in indices)


_pointers_equal = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)


def input_names(module: fx.GraphModule) -> list[tuple[str, bool]]:
    """Of each placeholder of a graph of Dynamo: its name in the model, and whether its memory stays where it is."""
    found = []
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        source = getattr(node, "_dynamo_source", None)
        name = getattr(source, "name", None)
        text = name() if callable(name) else name
        static = bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))
        found.append((_model_name(text or node.name), static))
    return found


def _model_name(source: str) -> str:
    """``L['self']._modules['blocks']._modules['0']._parameters['weight']`` as ``blocks.0.weight``."""
    parts = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", source)
    return ".".join(parts) or source
