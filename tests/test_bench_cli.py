"""The bench of models: text, JSON and picture of a result, and the command line."""

from __future__ import annotations

import io
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from dkfuse.bench import measure, show_models, targets
from dkfuse.bench.results import OURS, ModelResult, Side, SiteTime, report
from dkfuse.cli import bench as cli_bench
from dkfuse.errors import ModelError


@pytest.fixture
def result() -> ModelResult:
    ours = Side({"gemm": 4.0, "attention": 2.0, "dkfuse": 0.5}, 7.0, 0.9, 40, 20.0, 3.0, 9.5, 2e-3, {"nvjet": 4.0})
    theirs = Side({"gemm": 4.1, "attention": 2.0, "inductor": 0.9, "copy": 0.1}, 7.5, 1.0, 50, 19.0, 3.1, 9.5, 3e-3)
    eager = Side({"gemm": 4.2, "attention": 2.0, "other": 2.0}, 9.0, None, 90, None, None, 12.0, 3e-3)
    found = [SiteTime("norm_rope", "triton", {"x": [1, 4096, 24, 128]}, 8, 12.5, 50_000_000, 0.97, True)]
    coverage = {"sites": 11, "fused": 11}
    names = {OURS: ours, "inductor": theirs, "eager": eager}
    return ModelResult("<flux>", names, 2, 1, note="the model does not fit in fp32", coverage=coverage, sites=found)


def test_text(result: ModelResult) -> None:
    result.sides[OURS].loop, result.sides["inductor"].loop = 6.0, 7.5
    out = io.StringIO()
    show_models.print_result(result, Console(file=out, width=150))
    text = out.getvalue()
    for part in ("<flux>", "batch 2", "11 of 11 sites fused", "GEMM, ms", "does not fit in fp32", "12.5*", "0.97"):
        assert part in text
    line = next(line for line in text.splitlines() if line.strip().startswith("glue"))
    assert line.split()[-4:] == ["0.500", "1.000", "2.000", "0.500"]
    assert (
        "1.092x the speed of inductor (1.250x in a loop), +8.5 % of its GPU time saved: glue +7.0 %, GEMM +1.4 %"
        in text
    )
    assert "1 layer ·" in text or "1 layer," in text


def test_blocks_and_the_better_of_inductors_modes_in_the_text(result: ModelResult) -> None:
    result.sides = {OURS: result.sides[OURS], "inductor": result.sides["inductor"], "max-autotune": Side({"gemm": 6.8})}
    result.depth, result.size = (5, 4), "tiny"
    out = io.StringIO()
    show_models.print_result(result, Console(file=out, width=150))
    assert "5 + 4 layers, tiny" in out.getvalue()
    assert "1.046x the speed of max-autotune, the better of Inductor's modes, +4.4 %" in out.getvalue()


def test_json(result: ModelResult) -> None:
    data = json.loads(json.dumps(report([result], "a GPU")))
    assert data["schema"] == "dkfuse.bench.model/1"
    (row,) = data["models"]
    assert set(row["sides"]) == set(row["ratios"]) | {OURS}
    assert row["sides"]["inductor"]["glue"] == pytest.approx(1.0)
    assert row["ratios"]["inductor"]["glue"] == pytest.approx(0.5)
    assert row["ratios"]["eager"]["compile_cold"] is None
    assert row["sites"][0]["shapes"]["x"] == [1, 4096, 24, 128]
    assert data["versions"]["dkfuse"]
    assert ModelResult.from_dict(row) == result


def test_picture(result: ModelResult) -> None:
    root = ElementTree.fromstring(show_models.picture([result, result], "H100 <80GB> & more"))
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "GPU time of one forward, H100 <80GB> & more"
    assert texts.count("<flux>, batch 2") == 2
    bars = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.find("{*}title") is not None]
    assert len(bars) == 2 * (3 + 4 + 3)
    widths = [float(bar.attrib["width"]) for bar in bars[:7]]
    assert sum(widths[:3]) / sum(widths[3:]) == pytest.approx(6.5 / 7.1, abs=1e-2)


Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["flx"], 64, "did you mean 'flux'"),
        (["flux", "--against", "eager,tensorrt"], 64, "--against tensorrt is not allowed"),
        (["flux", "--against", ","], 64, "--against names nothing"),
        (["flux", "--mode", "fast"], 64, "--mode fast is not allowed"),
        (["flux", "--rounds", "0"], 64, "'--rounds'"),
        (["flux", "--json", "/no/such/folder/x.json"], 4, "there is no folder"),
        (["flux"], 4, "needs a CUDA GPU, and torch sees none here"),
    ],
)
def test_model_errors(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, out, err = run("bench", "model", *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1


def test_help(run: Run) -> None:
    code, out, _ = run("bench")
    assert code == 0
    assert "model" in out
    assert "kernels" in out


ERROR = "dkfuse: mochi has no such thing\n"


def test_a_model_that_fails_does_not_end_the_bench(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: ModelResult
) -> None:
    def measured(target: targets.Target, *_: Any, **__: Any) -> ModelResult:
        if target.name == "sana":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nmore")
        if target.name == "mochi":
            raise ModelError("mochi has no such thing")
        return result

    monkeypatch.setattr(cli_bench, "_device", lambda: types.SimpleNamespace(name="a <GPU>", kind="cpu"))
    monkeypatch.setattr(measure, "prime", lambda _: None)
    monkeypatch.setattr(measure, "measure", measured)
    files = ["--json", tmp_path / "x.json", "--picture", tmp_path / "x.svg"]
    code, out, err = run("bench", "model", "sana", "flux@2", "--top", 1, *files)
    assert code == 3
    assert "1 of 2 models were measured; sana: OutOfMemoryError: CUDA out of memory." in err
    assert run("bench", "model", "mochi") == (64, "a <GPU>, torch " + torch.__version__ + "\n\n", ERROR)
    assert "1 of 2 models were measured; mochi: ModelError: mochi has" in run("bench", "model", "mochi", "flux")[2]
    assert "the speed of inductor" in out
    assert "4.000 ms  nvjet" in out
    assert len(json.loads((tmp_path / "x.json").read_text())["models"]) == 1
    ElementTree.parse(tmp_path / "x.svg")
