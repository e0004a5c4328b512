"""Launch configurations timed on a GPU: right results for each, one timing for each distinct launch, warm starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code

import dkfuse
from dkfuse.bench.cases import CASES, Case
from dkfuse.bench.rope_cases import ROPE_CASES, RopeCase
from dkfuse.choosing import tuning, tuning_clock
from dkfuse.kernels import disk_cache
from dkfuse.kernels.launch import run

from ..toy_providers import block, inputs

pytestmark = pytest.mark.gpu

QUICK = {"max_autotune_gemm_backends": "ATEN", "dkfuse.kernels": "triton"}  # GEMM templates are not what is tested


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> Any:
    """Empty caches, and nothing known."""
    monkeypatch.setattr(tuning, "_known", {})
    with fresh_cache():
        yield tmp_path
    disk_cache.use(None)


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


SMALL = [
    Case("norm", "norm_modulate", (2, 100, 1152)),
    Case("gate", "residual_norm_modulate", (1, 64, 3072), residual=torch.float32, parameters=torch.float32),
    Case("sandwich", "residual_norm_modulate", (1, 64, 3840), norm="rms", weight=True, shift=False, branch=True),
    Case("dual", "residual_norm_modulate_dual", (2, 32, 2432)),
    Case("sum", "gated_residual", (1, 100, 5120)),
    RopeCase("joint", (20, 77), 24, 128, projections=2),
    RopeCase("across", (60,), 12, 128, across=True, tables="half"),
    RopeCase("halves", (60,), 38, 64, rotation="half"),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_candidate_computes_the_same(case: Any) -> None:
    launching = case.launch(case.inputs(0))
    launches = [launching.plan(config) for config in launching.configs()]
    tuning_clock.compile_together(launches, {n: launching.tensors[n] for n in launches[0].tensors.values()})
    run(launches[0], launching.tensors)
    expected = [result.clone() for result in launching.results]
    for launch in launches[1:]:
        for result in launching.results:
            result.fill_(float("nan"))
        run(launch, launching.tensors)
        for result, wanted in zip(launching.results, expected, strict=True):
            assert relative(result, wanted) < 1e-3, launch.config_text


@pytest.mark.parametrize("case", [CASES[0], ROPE_CASES[3]], ids=lambda case: case.name)
def test_times_are_those_of_a_copy_or_so(case: Any) -> None:
    """Neither the CPU's launches nor the L2 cache are what is timed; memory and random numbers stay as they were."""
    from dkfuse.bench.timing import copy_microseconds

    operands = case.inputs(0)
    launching = case.launch(operands)
    launches = [launching.plan(config) for config in launching.configs()[:2]]
    tensors = {name: launching.tensors[name] for name in launches[0].tensors.values()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    state, held = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    found = tuning_clock.times(launches, tensors)
    assert torch.cuda.memory_allocated() == held
    assert torch.equal(torch.cuda.get_rng_state(), state)
    copy = copy_microseconds(case.traffic(operands))
    assert found is not None
    assert 0.85 * copy < min(found[0]) <= max(found[0]) < 1.4 * copy, (found, copy)
    assert all(torch.equal(before[n].nan_to_num(), t.nan_to_num()) for n, t in tensors.items())


@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs", "max-autotune"])
def test_a_model_under_max_autotune(folder: Path, mode: str) -> None:
    values = inputs("cuda")
    options = {"mode": mode, "dkfuse.cache_dir": str(folder), **QUICK}
    with torch.no_grad(), dkfuse.record() as coverage:
        program = torch.compile(block, backend="dkfuse", dynamic=False, options=options)
        results = [program(*values).clone() for _ in range(4)]
        exact, eager = block(*(v.double() for v in values)), block(*values)
    launched = [site for site in coverage.fused() if site.kernel == "triton" and site.with_site is None]
    assert launched and all(site.config and site.config_by == "timing" for site in launched), launched
    assert 0 < len(disk_cache.contents()["launches"]) <= len(launched)
    for result in results:
        assert relative(result, exact) <= 1.02 * relative(eager, exact)


def test_what_is_taken_is_what_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another candidate than the table's, in every launch of the generated code."""
    timed = []

    def times(launches: Any, tensors: Any) -> list[tuple[float, float]]:
        timed.append(launches)
        return [(100.0, 100.0), *[(50.0, 50.0)] * (len(launches) - 1)]

    monkeypatch.setattr(tuning_clock, "times", times)
    values = inputs("cuda")
    options = {"max_autotune_pointwise": True, "dkfuse.cache_dir": str(folder), "dkfuse.kernels": "triton"}
    with torch.no_grad(), dkfuse.record() as coverage:
        program = torch.compile(block, backend="dkfuse", dynamic=False, options=options)
        result, (code, *_) = run_and_get_code(program, *values)
        exact, eager = block(*(v.double() for v in values)), block(*values)
    assert timed and {s.config_gain for s in coverage.fused() if s.config} == {2.0}
    for launches in timed:
        name, taken = launches[0].kernel.fn.__name__, launches[1]
        assert name in code
        if taken.constants:  # of norm_rope they are part of the source
            assert re.search(rf"'CHUNK'\W+{taken.constants['CHUNK']}\b", code), name
    assert relative(result, exact) <= 1.02 * relative(eager, exact)


PROCESS = """
import json, sys, torch, dkfuse
import torch.nn.functional as F
from dkfuse import compat, tuning, tuning_clock
timed, times = [], tuning_clock.times
tuning_clock.times = lambda launches, tensors: timed.append(launches[0].config_text) or times(launches, tensors)
options = {"max_autotune_pointwise": True, "dkfuse.cache_dir": sys.argv[1], "dkfuse.kernels": "triton"}

def model(x, s, w):
    for _ in range(3):  # the same launch three times, and one more
        x = (F.layer_norm(x, (1152,)) * (1 + s) + s) @ w
    return F.rms_norm(x, (1152,)) @ w

def compiled():
    with torch.no_grad(), dkfuse.record() as coverage:
        torch.compile(model, backend="dkfuse", dynamic=False, options=options)(*values)
    return [[site.config, site.config_by, site.config_gain] for site in coverage.fused()]

values = [torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((2, 64, 1152), (1152,), (1152, 1152))]
cold = compiled()
compat.forget_compilations()
tuning._known.clear()
print(json.dumps({"timed": len(timed), "cold": cold, "warm": compiled()}))
"""


def test_another_process_times_nothing(folder: Path, root: Path) -> None:
    """Neither with Inductor's cache, nor without it, by what is kept of the launches alone."""

    def compiled(inductor: str) -> dict[str, Any]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / inductor), "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", PROCESS, str(folder / "dkfuse")]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    first, other = compiled("first"), compiled("second")
    assert (first["timed"], other["timed"]) == (2, 0)
    assert len(first["cold"]) == 4 and {by for _, by, _ in first["cold"]} == {"timing"}
    assert first["cold"] == first["warm"] == other["cold"] == other["warm"]
