"""The pass is a function over an `fx.Graph`: it serves exported programs as well as compiled ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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
