"""What Inductor is told that our kernels write, against what it finds out by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from dkfuse import Settings, compat, compat_triton, fuse, zoo
from dkfuse.rewriting import lower

pytest.importorskip("triton")
pytest.importorskip("diffusers")
wrap = pytest.importorskip("torch._higher_order_ops.triton_kernel_wrap")

NAME = next(n for n in compat_triton.ANALYSES if hasattr(wrap, n))  # StopIteration: torch renamed it
WRAPPER = compat_triton.triton_call_target()


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, sm90: Any) -> None:
    monkeypatch.setattr(lower, "_device", lambda call: torch.device("cuda"))


def launches(model: str) -> dict[Any, fx.Node]:
    """The kernel nodes of a small model as Inductor gets them on a GPU, one of each kernel."""
    module, kwargs = zoo.build(model)
    found: list[fx.Node] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        def inner(graph_module: fx.GraphModule, _: Any) -> Any:
            fuse.run(graph_module.graph, Settings(target="sm90"))
            found.extend(graph_module.graph.find_nodes(op="call_function", target=WRAPPER))
            results = [node.meta["val"] for node in graph_module.graph.output_node().args[0]]
            return lambda *_: [torch.zeros(v.shape, dtype=v.dtype) for v in results]  # the kernels cannot run here

        return compat.lower_with(gm, inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=False)(**kwargs)
    return {wrap.kernel_side_table.get_kernel(node.kwargs["kernel_idx"]): node for node in found}


def written(kernel: Any, node: fx.Node) -> list[str]:
    """As Inductor asks for it."""
    tensors = {name: v.meta["val"] if isinstance(v, fx.Node) else v for name, v in node.kwargs["kwargs"].items()}
    constants = wrap.kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
    found = getattr(wrap, NAME)(kernel.fn, {**tensors, **constants}, {})
    return found if isinstance(found, list) else [dep.name for dep in found.read_writes.writes]


@pytest.mark.parametrize("model", ["flux", "ltx2", "qwen-image-edit", "wan22-5b", "z-image"])
def test_what_is_said_is_what_is_found(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = launches(model)
    assert len(kernels) > 2
    found = {kernel: written(kernel, node) for kernel, node in kernels.items()}
    monkeypatch.setattr(wrap, "generate_ttir", lambda *_: pytest.fail("the kernel was analysed"))
    with compat_triton.writes_known():
        assert {kernel: written(kernel, node) for kernel, node in kernels.items()} == found
