"""`python -m dkfuse.bench.seams`: every case has the seam that it is named after, and a GPU is asked for."""

from __future__ import annotations

import pytest
import torch

import dkfuse
from dkfuse.bench import seams


@pytest.mark.parametrize("case", seams.CASES, ids=lambda case: f"{case.seam}-{case.name}")
def test_a_case_is_what_it_is_named_after(case: seams.Case) -> None:
    with torch.device("meta"):
        module = case.make().to(seams.BF16).requires_grad_(False)
        names = module.forward.__code__.co_varnames[1 : 1 + len(case.shapes)]
        kwargs = {n: torch.empty(s, dtype=seams.BF16) for n, s in zip(names, case.shapes, strict=True)}
    coverage = dkfuse.coverage(module, settings=dkfuse.Settings(target="sm90"), **kwargs)
    sites = [site for site in (*coverage.sites, *coverage.seams) if not site.with_site]
    (site,) = [site for site in sites if case.seam in (site.family, site.rule)]
    loses = "batch 4" in case.name  # which is why it is there
    assert (site.status is dkfuse.Status.FUSED) != loses, site.reason


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert seams.main([]) != 0
    assert "no CUDA device" in capsys.readouterr().err
