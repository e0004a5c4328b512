"""Models that are no diffusion transformers go through the backend as well: results no worse than eager's."""

from __future__ import annotations

import pytest
import torch

import dkfuse
from dkfuse.bench.others import OTHERS

pytest.importorskip("transformers")
SITES = {"bert": (5, 4), "vit": (5, 5), "llama": (9, 9), "convnet": (0, 0)}  # found, fused


@pytest.mark.parametrize("target", ["cpu", "sm90"])
@pytest.mark.parametrize("name", OTHERS)
def test_results_are_no_worse_than_eagers(name: str, target: str) -> None:
    torch.manual_seed(0)
    module, inputs = OTHERS[name](True, 2, None)
    module = module.eval().bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    options = {"dkfuse.remainder": "eager", "dkfuse.target": target}
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        found = [
            run(**inputs) for run in (module, torch.compile(module, backend="dkfuse", options=options, dynamic=False))
        ]
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        found.append(module.double()(**wide))
    eager, ours, exact = ((f if torch.is_tensor(f) else f[0]).double() for f in found)
    assert (len(coverage.sites), coverage.totals["fused"]) == SITES[name], str(coverage)
    assert (ours - exact).norm() <= 1.05 * (eager - exact).norm()
