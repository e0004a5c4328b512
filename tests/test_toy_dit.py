"""Whole small transformers: sites counted, results against fp64; graph breaks, symbolic lengths, regional compile."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import dkfuse

from .harness import check_numerics, compiled, counts, parse, run, spell
from .toy_blocks import AdaLNZero, CrossAttention, DoubleStream, PerToken, SingleStream, Toy, toy, toy_inputs

# Two blocks and the final layer. All gated residuals go with the norm that follows but those of PerToken that the
# cross-attention reads first. The first norm has no residual before it. From batch 2 on, the projection of a slice of
# the joint attention ends in ``+ bias``, which the kernel of the next norm adds.
GATED = "residual_gate_norm_modulate"
EXPECTED: dict[type[nn.Module], str] = {
    AdaLNZero: f"norm_modulate=1 {GATED}=4 absorbed=4",
    CrossAttention: f"norm_modulate=1 {GATED}=2 residual_norm_modulate=2 residual_gate_norm=2 absorbed=4",
    PerToken: f"norm_modulate=1 {GATED}=2 residual_norm_modulate=2 gated_residual=2 absorbed=2",
    SingleStream: f"norm_modulate=1 {GATED}=2 absorbed=2 qk_norm=4",
    DoubleStream: f"norm_modulate=2 {GATED}=6 absorbed=6",
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("block", EXPECTED, ids=lambda block: block.__name__)
def test_two_blocks(block: type[nn.Module], batch: int) -> None:
    model, inputs = toy(block), toy_inputs(batch)
    results, coverage = run(model, inputs)
    assert counts(coverage) == parse(EXPECTED[block]), str(coverage)
    check_numerics(model, inputs, results)


class Broken(Toy):
    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> Tensor:
        x, text = self.blocks[0](x, text, c)
        torch._dynamo.graph_break()
        x, text = self.blocks[1](x, text, c)
        torch._dynamo.graph_break()
        return self.final(x, c)


def test_graph_breaks() -> None:
    """Each block is a graph of its own, whose last gated residual has no norm to go with."""
    model, inputs = toy(AdaLNZero, kind=Broken), toy_inputs()
    results, coverage = run(model, inputs)
    per_graph = [counts(dkfuse.Coverage(graphs=[graph])) for graph in coverage.graphs]
    block = parse(f"norm_modulate {GATED} gated_residual absorbed")
    assert per_graph == [block, block, {"norm_modulate": 1}], str(coverage)
    check_numerics(toy(AdaLNZero), inputs, results)


# -- symbolic lengths --------------------------------------------------------------------------------------------------


def compilations(reference: Any, function: Any, inputs_of: Callable[[int], tuple[Tensor, ...]], mark: bool) -> int:
    """How many graphs are compiled for inputs of three lengths."""
    counters.clear()
    with torch.no_grad():
        for tokens in (12, 20, 31):
            inputs = inputs_of(tokens)
            if mark:
                torch._dynamo.mark_dynamic(inputs[0], 1)
            check_numerics(reference, inputs, (function(*inputs),))
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("block", "dynamic", "mark", "graphs"),
    [
        (AdaLNZero, True, False, 1),
        (AdaLNZero, None, True, 1),
        (AdaLNZero, None, False, 2),
        (CrossAttention, None, True, 1),
        (DoubleStream, None, True, 1),
    ],
)
def test_every_length_fuses_the_same_sites(
    block: type[nn.Module], dynamic: bool | None, mark: bool, graphs: int
) -> None:
    model = toy(block)
    torch.compiler.reset()
    with dkfuse.record() as coverage:
        count = compilations(model, compiled(model, dynamic=dynamic), lambda tokens: toy_inputs(tokens=tokens), mark)
    assert count == len(coverage.graphs) == graphs
    for graph in coverage.graphs:
        found = counts(dkfuse.Coverage(graphs=[graph]))
        assert found == parse(EXPECTED[block]), str(coverage)


def test_as_many_compilations_as_inductor() -> None:
    """Shapes are compared without adding guards, so a length that needs no recompilation needs none here."""

    def function(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        x = x + gate * y
        return (F.layer_norm(x, x.shape[-1:]) * (1 + scale)) @ weight

    def inputs_of(tokens: int) -> tuple[Tensor, ...]:
        x, y, gate, scale, weight = spell("x:B1D y:B1D gate:B1D scale:B1D weight:DD")
        return x.repeat(1, tokens, 1), y.repeat(1, tokens, 1), gate, scale, weight

    found = []
    for backend in ("inductor", "dkfuse"):
        torch.compiler.reset()
        found.append(compilations(function, torch.compile(function, backend=backend), inputs_of, mark=False))
    assert found == [2, 2]


# -- regional compilation ----------------------------------------------------------------------------------------------


def test_blocks_compiled_one_by_one() -> None:
    """Equal blocks share one compilation, as with every backend."""
    torch.compiler.reset()
    model, inputs = toy(DoubleStream, depth=3), toy_inputs(1)
    for block in model.blocks:
        block.compile(backend="dkfuse", fullgraph=True, dynamic=False, options={"dkfuse.remainder": "eager"})
    with dkfuse.record() as coverage, torch.no_grad():
        result = model(*inputs)
    assert len(coverage.graphs) == 1
    assert counts(coverage) == parse(f"norm_modulate=2 {GATED}=2 gated_residual=2 absorbed=2"), str(coverage)
    check_numerics(toy(DoubleStream, depth=3), inputs, (result,))


def test_diffusers_repeated_blocks() -> None:
    """As many graphs as Dynamo makes for any backend: a double block, and a single block for each input layout."""
    pytest.importorskip("diffusers")
    from dkfuse import zoo

    model, inputs = zoo.build("flux")
    counter = CompileCounter()
    results = []
    with torch.no_grad(), dkfuse.record() as coverage:
        for options in ({"backend": counter}, {"backend": "dkfuse", "options": {"dkfuse.remainder": "eager"}}):
            torch.compiler.reset()
            model.compile_repeated_blocks(fullgraph=True, **options)
            results.append(model(**inputs)[0])
    assert len(coverage.graphs) == counter.frame_count
    single = parse("norm_modulate gated_residual norm_rope=2 absorbed=2")
    double = parse(f"norm_modulate=2 {GATED}=2 gated_residual=2 norm_rope=2 absorbed=6")
    per_graph = [counts(dkfuse.Coverage(graphs=[graph])) for graph in coverage.graphs]
    assert per_graph == [double, *[single] * (counter.frame_count - 1)], str(coverage)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0.05 * results[0].abs().max().item())


# -- beside other passes, and the example ------------------------------------------------------------------------------


def test_a_users_own_pass_still_runs() -> None:
    seen = []

    def users_pass(graph: torch.fx.Graph) -> None:
        seen.append(sum(node.op == "call_function" for node in graph.nodes))

    model, inputs = toy(AdaLNZero, depth=1), toy_inputs()
    torch.compiler.reset()
    options = {"post_grad_custom_pre_pass": users_pass}
    with dkfuse.record() as coverage, torch.no_grad():
        result = torch.compile(model, backend="dkfuse", options=options)(*inputs)
    assert len(seen) == 1
    assert counts(coverage) == parse(f"norm_modulate=1 {GATED}=2 absorbed=2"), str(coverage)
    check_numerics(model, inputs, (result,))


def test_the_example_runs(root: pathlib.Path) -> None:
    command = [sys.executable, str(root / "examples" / "toy_dit.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "17 of 17 sites fused" in done.stdout
    assert float(done.stdout.split()[-1]) < 2e-2
