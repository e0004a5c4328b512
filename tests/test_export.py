"""The pass is a function over an `fx.Graph`: it serves exported programs as well as compiled ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dkfuse
from dkfuse.fuse import plan, run
from dkfuse.reporting.report import Status
from dkfuse.settings import Settings

D = 32
CPU = Settings(target="cpu")


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(D, elementwise_affine=False)
        self.project, self.modulation = torch.nn.Linear(D, D), torch.nn.Linear(D, 5 * D)

    def forward(self, x, t):
        scale, shift, gate, scale2, shift2 = self.modulation(F.silu(t)).chunk(5, -1)
        y = self.project(self.norm(x) * (1 + scale[:, None]) + shift[:, None])
        x = x + gate[:, None] * y
        return x, self.project(self.norm(x) * (1 + scale2[:, None]) + shift2[:, None])


@pytest.fixture
def exported():
    torch.manual_seed(0)
    module = Block().bfloat16().eval()
    values = torch.randn(2, 6, D).bfloat16(), torch.randn(2, D).bfloat16()
    return module, values, torch.export.export(module, values)


@pytest.mark.parametrize("decomposed", [False, True], ids=["aten", "core_aten"])
def test_an_exported_graph_is_planned(exported, decomposed):
    _, _, program = exported
    program = program.run_decompositions() if decomposed else program
    before = str(program.graph)
    sites = plan(program.graph, CPU).record.sites
    assert [s.rule for s in sites if s.with_site is None] == ["norm_modulate", "residual_gate_norm_modulate"]
    assert all(s.status is Status.FUSED and "test_export.py" in (s.source or "") for s in sites)
    assert sites[0].module == "norm"
    assert str(program.graph) == before, "planning changed the graph"


def test_an_exported_program_runs_fused(exported):
    module, values, program = exported
    program = program.run_decompositions()
    run(program.graph, CPU, lowered=False)
    program.graph_module.recompile()
    ops = [str(n.target) for n in program.graph.nodes if "dkfuse" in str(n.target)]
    assert ops == ["dkfuse.norm_modulate.default", "dkfuse.residual_norm_modulate.default"]
    with torch.no_grad():
        for ours, eager in zip(program.module()(*values), module(*values), strict=True):
            torch.testing.assert_close(ours, eager, atol=0.05, rtol=0.02)


class Casting(torch.nn.Module):
    """Wan's norm in fp32, whose casts an exported program asserts."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(D, D)

    def forward(self, x, shift, scale):
        h = F.layer_norm(x.float(), (D,)).to(torch.float32)
        return self.project((h * (1 + scale) + shift).type_as(x))


def test_what_an_exported_program_asserts_is_no_reader(fresh_compiler):
    row = torch.randn(1, 1, D)
    values = torch.randn(2, 6, D).bfloat16(), row, row.flip(-1)
    module = Casting().bfloat16().eval()
    program = torch.export.export(module, values)
    assert "_assert_tensor_metadata" in str(program.graph)
    with torch.no_grad(), dkfuse.record() as coverage:
        compiled = torch.compile(program.module(), backend="dkfuse", options={"dkfuse.remainder": "eager"})
        torch.testing.assert_close(compiled(*values), module(*values), atol=0.05, rtol=0.02)
    coverage.assert_fused("norm_modulate", exactly=1)
