"""The bench on a real GPU, on small models and shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dkfuse.bench import kernels, measure, targets
from dkfuse.bench.classify import kind
from dkfuse.bench.device import Cuda
from dkfuse.bench.results import OURS
from dkfuse.bench.sides import Options

pytestmark = pytest.mark.gpu

pytest.importorskip("diffusers")


def test_a_tiny_model_on_all_sides() -> None:
    options = Options(("inductor", "eager"), layers=1, rounds=3, profiles=3, size="tiny")
    device = Cuda()
    measure.prime(device)
    result = measure.measure(targets.Target("flux", "zoo"), options, device)
    ours, theirs, eager = (result.sides[name] for name in (OURS, "inductor", "eager"))
    assert result.coverage["fused"] > 0
    assert ours.split["dkfuse"] > 0
    assert theirs.split["dkfuse"] == 0
    assert all(side.gemm > 0 and side.attention > 0 for side in (ours, theirs, eager))
    assert all(not kernel.startswith("triton_") for kernel in eager.kernels)
    assert ours.cpu is not None
    assert 0 < ours.cpu <= ours.wall
    assert ours.compile_warm < ours.compile_cold  # type: ignore[operator]
    assert result.reference == "fp32"
    assert ours.error <= 1.5 * eager.error  # type: ignore[operator]
    norms = [site for site in result.sites if site.op != "norm_rope"]
    assert norms
    assert all(site.microseconds > 0 and 0 < site.of_copy < 3 for site in result.sites)
    spent = sum(site.microseconds * site.sites for site in result.sites) / 1000
    assert spent == pytest.approx(ours.split["dkfuse"], rel=0.2)


def test_cuda_graphs() -> None:
    options = Options(layers=1, rounds=3, profiles=2, mode="reduce-overhead", size="tiny", fp32=False)
    result = measure.measure(targets.Target("dit-xl-2", "zoo"), options, Cuda())
    assert result.reference == "eager"
    assert all(side.gpu > 0 and side.cpu is not None for side in result.sides.values())
    assert all(side.error is not None and side.error < 0.1 for side in result.sides.values())
    assert any(kind(name) == "dkfuse" for name in result.sides[OURS].kernels)


def test_a_profile_holds_one_call_after_others() -> None:
    x = torch.randn(512, 512, device="cuda")
    device, calls = Cuda(), []

    def run() -> torch.Tensor:
        calls.append(1)
        return torch.tanh(x @ x)

    run()
    device.synchronize()
    alone, after = device.profiled(run), device.profiled(run, 20)
    assert [k.name for k in alone] == [k.name for k in after]
    assert 2 <= len(alone) <= 4  # a product, split perhaps, and the tanh
    assert len(calls) == 1 + 1 + 21


def test_a_row_of_the_kernel_bench() -> None:
    pytest.importorskip("triton")
    (case,) = kernels.chosen(["norm_modulate"], "Flux text")
    row = kernels.measure(case, peak=2.5e6, peers=True)
    ours, inductor = row["providers"]["triton"], row["rivals"]["inductor"]
    assert ours["error"] < 4e-3
    assert 0 < ours["of_copy"] < 2
    assert inductor["microseconds"] > 0
    assert row["best"] in row["providers"]
    assert all("microseconds" in found or "problem" in found for found in row["providers"].values())


def test_norms_alone_by_libraries_and_peers() -> None:
    pytest.importorskip("triton")
    for op in ("norm_modulate", "residual_norm_modulate"):
        (case,) = kernels.chosen([op], "LTX RMSNorm")
        row = kernels.measure(case, peak=2.5e6, wanted=["triton", "sgl", "flashinfer"], peers=True)
        for name, found in row["providers"].items():
            assert found["error"] < 4e-3 if "error" in found else "not installed" in found["problem"], name
        assert "microseconds" in row["providers"]["triton"]
        assert all("microseconds" in peer for peer in row["peers"]), row["peers"]


def test_without_the_warm_compile() -> None:
    against = ("inductor", "plain", "eager")
    options = Options(against, layers=1, rounds=2, profiles=2, size="tiny", fp32=False, warm=False)
    result = measure.measure(targets.Target("dit-xl-2", "zoo"), options, Cuda())
    assert all(side.compile_warm is None for side in result.sides.values())
    assert result.sides[OURS].split["dkfuse"] > 0 and result.sides["plain"].split["dkfuse"] > 0
    assert result.sides["inductor"].split["dkfuse"] == 0
    assert result.sides["inductor"].compile_cold > 0.3  # type: ignore[operator]  # not what dkfuse left in memory
    assert all(side.gpu > 0 for side in result.sides.values())
    assert all(result.sides[name].error < 0.1 for name in (OURS, "inductor", "plain"))  # type: ignore[operator]
    assert result.depth == (1,)


def test_another_size_of_a_video_model() -> None:
    options = Options(layers=1, rounds=1, profiles=1, fp32=False, warm=False)
    result = measure.measure(targets.find("hunyuan-video:480p")[0], options, Cuda())
    assert result.coverage["fused"] > 0
    assert any(25440 in site.shapes["x"] for site in result.sites if "x" in site.shapes)


def test_commands(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    files: list[Any] = ["--json", tmp_path / "a.json", "--picture", tmp_path / "a.svg"]
    code, out, err = run("bench", "model", "convnet", "--size", "tiny", "--rounds", 2, *files)
    assert code == 0, err
    assert "the speed of inductor" in out
    assert json.loads((tmp_path / "a.json").read_text())["schema"] == "dkfuse.bench.model/1"
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    kernel = ["--op", "norm_modulate", "--case", "Flux text", "--json", tmp_path / "k.json"]
    assert run("bench", "kernels", *kernel)[0] == 0
    code, out, err = run("bench", "show", tmp_path / "a.json", tmp_path / "k.json", "--format", "markdown")
    assert code == 0, err
    assert "| convnet |" in out and "cudnn" in out.splitlines()[0]
    assert "| Flux text | 1x512x3072 |" in out
