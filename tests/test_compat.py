"""The canary: what dkfuse expects of torch's internals and of the graphs that reach the hook.

When a torch upgrade changes one of these, the failure here says which; every other test may then fail for that reason.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dkfuse import compat, compat_triton

aten = torch.ops.aten


def graph_at_the_hook(function, *inputs):
    """The ATen graph that dkfuse's pass sees, as ``{op name: count}`` and the graph."""
    seen = []

    def backend(gm, example_inputs):
        def inner(graph_module, _):
            seen.append(graph_module.graph)
            return graph_module.forward

        return compat.lower_with(gm, example_inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=False)(*inputs)
    (graph,) = seen
    return graph


def targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


X = torch.randn(2, 4, 8, dtype=torch.bfloat16)


def test_layer_norm_arrives_decomposed():
    found = targets(graph_at_the_hook(lambda x: F.layer_norm(x, (8,)) @ torch.ones(8, 8, dtype=x.dtype), X))
    for op in (torch.ops.prims.convert_element_type.default, aten.var_mean.correction, aten.rsqrt.default):
        assert op in found, f"{op} is no longer in the graph of a LayerNorm: {found}"


def test_rms_norm_arrives_decomposed():
    found = targets(graph_at_the_hook(lambda x: F.rms_norm(x, (8,)), X))
    assert aten.mean.dim in found and aten.rsqrt.default in found, f"RMSNorm is spelled differently now: {found}"


def test_values_are_fake_and_carry_strides():
    graph = graph_at_the_hook(lambda x: x.transpose(0, 1) + 1, X)
    (add,) = [n for n in graph.nodes if n.target is aten.add.Tensor]
    assert tuple(add.meta["val"].stride()) == (8, 32, 1), "elementwise results no longer keep their input's strides"


def test_nodes_say_where_they_come_from():
    graph = graph_at_the_hook(lambda x: F.layer_norm(x, (8,)), X)
    (norm,) = [n for n in graph.nodes if n.target is aten.var_mean.correction]
    assert "test_compat.py" in norm.meta.get("stack_trace", ""), "nodes lost their stack_trace: reports have no source"


def test_split_and_chunk_are_one_of_the_known_splits():
    from dkfuse.matching.readers import SPLITS
    from dkfuse.matching.views import VIEW_READERS

    graph = graph_at_the_hook(lambda x: torch.cat(x.chunk(2, -1)[::-1], -1), X)
    producers = {n.target for n in graph.nodes if n.op == "call_function"} & ({*SPLITS} | set(VIEW_READERS))
    assert producers, f"chunk is spelled differently now: {targets(graph)}"


def test_mode_options():
    assert compat.mode_options(None) == {}
    assert compat.mode_options("reduce-overhead") == {"triton.cudagraphs": True}


def test_inductor_still_launches_user_kernels_statically():
    assert compat_triton.launch_options(), "static_launch_user_defined_triton_kernels is gone: launches cost 7 us more"


def test_the_hook_exists():
    assert compat.inductor_config("post_grad_custom_pre_pass") is None


def test_triton_nodes_are_functional_and_torch_keeps_their_strides():
    """Torch must hand ``eager_input_vals`` on to the mutating node, or padded buffers would reach kernels."""
    import inspect

    from torch._inductor import graph

    target = compat_triton.triton_call_target()
    assert target is torch.ops.higher_order.triton_kernel_wrapper_functional
    assert "eager_input_vals" in inspect.getsource(graph), "Inductor no longer reads eager_input_vals"


@pytest.mark.parametrize("condition", [True, False])
def test_statically_known_true_on_plain_booleans(condition):
    assert compat.statically_known_true(condition) is condition


def test_torch_is_told_what_a_kernel_of_ours_writes(monkeypatch):
    from torch._higher_order_ops import triton_kernel_wrap
    from torch._inductor import config

    name = next(n for n in compat_triton.ANALYSES if hasattr(triton_kernel_wrap, n))  # StopIteration: torch renamed it
    monkeypatch.setattr(triton_kernel_wrap, name, lambda kernel, kwargs, metadata: "analysed")

    def kernel():
        return type("Kernel", (), {"arg_names": ["x", "out", "n", "sum"], "fn": lambda: None})()

    def asked(kernel):
        found = getattr(triton_kernel_wrap, name)(kernel, {"x": x, "out": x, "n": 3, "sum": x}, {})
        return found if isinstance(found, (list, str)) else [dep.name for dep in found.read_writes.writes]

    x, ours, twice, foreign = torch.empty(2), kernel(), kernel(), kernel()
    tuned = type("Autotuner", (), {"arg_names": ours.arg_names, "fn": ours})()
    compat_triton.register_triton_kernel(tuned, {}, ["sum", "out"])
    for written in (["out"], ["sum"]):
        compat_triton.register_triton_kernel(twice, {}, written)
    with compat_triton.writes_known():
        assert asked(ours) == asked(tuned) == ["out", "sum"]
        assert asked(foreign) == asked(twice) == "analysed"
        if hasattr(config, "epilogue_fusion_user_defined_triton_kernel"):
            with config.patch(epilogue_fusion_user_defined_triton_kernel=True):
                assert asked(ours) == "analysed", "which says more than what is written"
    assert asked(ours) == "analysed"


def test_torchs_worker_processes_are_told_how_kernels_are_launched(monkeypatch):
    """Through torch's own call of a worker: what it is told is what it decides the launcher by."""
    from concurrent.futures import Future

    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.compile_worker.subproc_pool import SubprocPool

    told = []

    def submit(pool, job, *args):
        told.append((job.__name__, args[-1]))
        return Future()

    monkeypatch.setattr(SubprocPool, "submit", submit)
    monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda cls: True))
    monkeypatch.setattr(AsyncCompile, "process_pool", staticmethod(lambda: object.__new__(SubprocPool)))
    AsyncCompile().triton("torchs", "source of torch's")
    with compat_triton.workers_told():
        AsyncCompile().triton("ours", "source of ours")
    (job, before), (_, after) = told
    assert job == compat_triton.WORKER_JOB
    assert set(after) - set(before) == set(compat_triton.launch_options()), (
        "torch tells them by itself: drop workers_told"
    )
    assert before.items() <= after.items() and SubprocPool.submit is submit


def test_the_cpus_vectors_are_not_tried_where_a_bench_says_so(monkeypatch):
    """Picking what vectors the CPU has builds nothing once the trial is skipped; a user's own word stays."""
    from torch._inductor import config, cpu_vec_isa

    def built(*_):
        raise AssertionError("the C++ compiler was tried")

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", built)
    with config.patch({"cpp.vec_isa_ok": None}):
        compat.skip_vector_trial()
        asked = cpu_vec_isa.VecISA.__bool__  # the kinds' own keep what was answered before, by other tests
        assert not any(asked(isa) for isa in cpu_vec_isa.supported_vec_isa_list)
    with config.patch({"cpp.vec_isa_ok": True}):
        compat.skip_vector_trial()
        assert config.cpp.vec_isa_ok is True


def test_torch_can_be_asked_to_trace_again_with_a_float_as_a_constant():
    from torch._dynamo import exc, symbolic_convert

    assert issubclass(exc.TensorifyScalarRestartAnalysis, exc.RestartAnalysis)
    assert callable(symbolic_convert.TensorifyState.specialize)
