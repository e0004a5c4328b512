"""Graphs with attention for the tests of its seam: as a GPU traces them (fake tensors, no GPU needed), and on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dkfuse import Settings, compat, seams
from dkfuse.kernels import attention_kernels
from dkfuse.reporting.report import Site
from dkfuse.seams import attention_choice, attention_table, cpu_bound
from dkfuse.seams.attention_table import Row

aten = torch.ops.aten
BF16 = torch.bfloat16
# what the choice is tested on, apart from what was measured
ROWS = (
    Row(90, 128, 24, 4096, 4096, {"cudnn": 600, "fa4": 660, "flash": 300}),
    Row(90, 128, 24, 16384, 16384, {"cudnn": 600, "fa4": 601, "flash": 300}),
    Row(90, 64, 8, 256, 256, {"cudnn": 100, "fa4": 400, "flash": 90}),
    Row(90, 64, 8, 16, 16, {"cudnn": 1e-6, "fa4": 2e-6, "flash": 1e-6}),  # as slow as a long one
)
OPS = {
    "cudnn": lambda q, k, v, causal, dropout: aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, False, dropout, causal, False
    ),
    "flash": lambda q, k, v, causal, dropout: aten._scaled_dot_product_flash_attention(q, k, v, dropout, causal, False),
    "efficient": lambda q, k, v, causal, dropout: aten._scaled_dot_product_efficient_attention(
        q, k, v, None, False, dropout, causal
    ),
}


def on_gpu(
    q: tuple[int, ...],
    k: tuple[int, ...] | None = None,
    *,
    traced: str = "cudnn",
    dtype: torch.dtype = BF16,
    causal: bool = False,
    dropout: float = 0.0,
    reads: int = 0,
    view: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
) -> fx.GraphModule:
    """The graph of ``attention(q, k, v)`` of `[B, H, S, d]` sizes, from tensors that are `[B, S, H, d]` in memory.

    traced: the kernel that torch chose; reads: the result that is read besides; view: what is done to q before.
    """
    with FakeTensorMode():
        batch, heads, tokens, dim = q
        query = torch.empty(batch, tokens, heads, dim, device="cuda", dtype=dtype)
        batch, heads, tokens, dim = k or q
        key, value = (torch.empty(batch, tokens, heads, dim, device="cuda", dtype=dtype) for _ in "kv")

    def attention(query: Any, key: Any, value: Any) -> Any:
        q, k, v = view(query.transpose(1, 2)), key.transpose(1, 2), value.transpose(1, 2)
        results = OPS[traced](q, k, v, causal, dropout)
        out = results[0].transpose(1, 2)
        return (out.reshape(*out.shape[:2], -1), *([results[reads]] if reads else []))

    return make_fx(attention)(query, key, value)


def on_cpu(function: Callable, *inputs: torch.Tensor, dynamic: bool = False) -> fx.GraphModule:
    """The ATen graph of `function` as dkfuse's pass sees it."""
    seen = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        def inner(module: fx.GraphModule, _: Any) -> Callable:
            seen.append(module)
            return module.forward

        return compat.lower_with(gm, example_inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    (module,) = seen
    return module


def rewritten(module: fx.GraphModule, target: str = "sm90", **settings: Any) -> Site:
    """Rewrite the seams of a graph with one attention; its record."""
    (site,) = [s for s in seams.run(module.graph, Settings(target=target, **settings)) if s.family == "attention"]
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return site


def targets(module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


def install(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    """Pretend that these versions of the kernels' packages are installed, and no other packages."""

    def version_of(name: str) -> str | None:
        return torch.__version__ if not attention_kernels.KERNELS[name].distributions else found.get(name)

    for module in (attention_kernels, attention_choice):
        monkeypatch.setattr(module, "version_of", version_of)


def use_rows(monkeypatch: pytest.MonkeyPatch, rows: tuple[Row, ...] = ROWS) -> None:
    monkeypatch.setattr(attention_table, "TABLE", rows)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """Attention of `[B, S, H, d]` tensors, as diffusers writes it."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that launches cost the CPU nothing, for graphs so small that they would be all there is."""
    monkeypatch.setattr(cpu_bound.Load, "too_slow", lambda *_: None)


def in_fp64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a model, floating tensors in fp64."""

    def real(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_floating_point()

    return {name: value.double() if real(value) else value for name, value in inputs.items()}
