"""The command line: every exit code with its sentence, formats, files, and one real trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dkfuse.cli import main as cli
from dkfuse.errors import TraceError
from dkfuse.reporting import recording
from dkfuse.reporting.report import Coverage, Graph, Reason, Site, Status
from dkfuse.reporting.weightless import FakeTensor
from dkfuse.settings import Settings

pytest.importorskip("diffusers")

MODEL = """
import torch
from torch import nn
from helper import WIDTH

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)

    def forward(self, x, scale, shift):
        return self.norm(x) * (1 + scale) + shift

class Broken(nn.Module):
    def forward(self, x):
        return x @ x

def model(dtype=torch.float32):
    kwargs = {name: torch.randn(1, 4, WIDTH, dtype=dtype) for name in ("x", "scale", "shift")}
    return Model(), kwargs

def meta():
    with torch.device("meta"):
        return model()

def broken():
    return Broken(), {"x": torch.randn(2, 3)}

def raising():
    raise ValueError("the weights are on another planet")

def wrong():
    return Model()

def also_wrong():
    return Model(), (1, 2)

NUMBER = 3
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("WIDTH = 64\n")
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    return file


def report(*statuses: Status) -> Coverage:
    sites = [Site(f"s{i}", "norm_modulate", s, "norm_modulate", source="m.py:1") for i, s in enumerate(statuses)]
    return Coverage("flux (tiny)", torch.__version__, "cpu", [Graph(0, 10, 0.1, sites=sites)])


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the trace by a report with three of four sites fused; keeps what it was called with."""
    calls: dict[str, Any] = {}

    def coverage(module: Any, *args: Any, settings: Settings, **kwargs: Any) -> Coverage:
        calls.update(module=module, settings=settings, kwargs=kwargs)
        return calls.get("found") or report(Status.FUSED, Status.FUSED, Status.FUSED, Status.REJECTED)

    monkeypatch.setattr(recording, "coverage", coverage)
    return calls


Run = Callable[..., tuple[int, str, str]]


def fails(run: Run, code: int, *arguments: Any) -> str:
    """Run, expect this exit code, and return the one sentence on stderr."""
    found, _, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("dkfuse: ")]
    assert (found, len(lines)) == (code, 1), err
    return lines[0].removeprefix("dkfuse: ")


def test_text_report(run: Run, traced: dict[str, Any]) -> None:
    code, out, _ = run("coverage", "flux", "--target", "sm90")
    assert code == 0
    assert "3 of 4 sites fused (75.0 %)" in out
    assert traced["settings"].target == "sm90"
    assert isinstance(next(traced["module"].parameters()), FakeTensor)


def test_zoo_options(run: Run, traced: dict[str, Any]) -> None:
    assert run("coverage", "Flux", "--layers", 1, "--dtype", "fp16", "--size", "full")[0] == 0
    module, kwargs = traced["module"], traced["kwargs"]
    assert len(module.transformer_blocks) == len(module.single_transformer_blocks) == 1
    assert kwargs["hidden_states"].shape == (1, 4096, 64)
    assert run("coverage", "hunyuan-video:480p", "--layers", 1)[0] == 0  # full, which it is a size of
    assert traced["kwargs"]["hidden_states"].shape == (1, 16, 16, 60, 106)
    assert kwargs["hidden_states"].dtype is torch.float16


@pytest.mark.parametrize(
    ("format", "start"),
    [("json", '{\n "schema"'), ("markdown", "## dkfuse"), ("html", "<!doctype"), ("text", "dkfuse")],
)
def test_formats_to_stdout_and_file(run: Run, traced: dict[str, Any], tmp_path: Path, format: str, start: str) -> None:
    code, out, err = run("coverage", "flux", "--format", format)
    assert (code, out[: len(start)]) == (0, start)
    assert "dkfuse:" not in err
    target = tmp_path / "report"
    code, out, err = run("coverage", "flux", "-f", format, "-o", target)
    assert (code, out) == (0, "")
    assert "3 of 4 sites fused" in err
    assert target.read_text().startswith(start)


def test_format_by_extension_of_the_file(run: Run, traced: dict[str, Any], tmp_path: Path) -> None:
    run("coverage", "flux", "-o", tmp_path / "a.md")
    run("coverage", "flux", "-o", tmp_path / "a.json")
    assert (tmp_path / "a.md").read_text().startswith("## ")
    assert json.loads((tmp_path / "a.json").read_text())["model"] == "flux (tiny)"


def test_fail_under(run: Run, traced: dict[str, Any]) -> None:
    assert run("coverage", "flux", "--fail-under", 75)[0] == 0
    assert "75.0 % of the sites" in fails(run, 2, "coverage", "flux", "--fail-under", 75.5)
    traced["found"] = Coverage()
    assert "0.0 % of the sites" in fails(run, 2, "coverage", "flux", "--fail-under", 1)


def test_baseline(run: Run, traced: dict[str, Any], tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    run("coverage", "flux", "-o", baseline)
    assert run("coverage", "flux", "--baseline", baseline)[0] == 0
    traced["found"] = report(Status.FUSED, Status.REJECTED, Status.FUSED, Status.FUSED)
    code, out, err = run("coverage", "flux", "--baseline", baseline, "--fail-under", 99)
    assert code == 1  # a regression comes first
    assert "1 regression against the baseline" in out
    assert "1 of the sites that" in err
    _, _, err = run("coverage", "ltx", "--baseline", baseline)
    assert "note: the baseline is of flux (tiny), this report of ltx (tiny)" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("nonsense", "invalid JSON"), ("{}", "schema is None"), (b"\xff\xfe", "codec")],
)
def test_bad_baseline(run: Run, traced: dict[str, Any], tmp_path: Path, text: Any, message: str) -> None:
    baseline = tmp_path / "baseline.json"
    if text is not None:
        baseline.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in fails(run, 64, "coverage", "flux", "--baseline", baseline)
    assert traced == {}


def test_wrong_names(run: Run, model_file: Path) -> None:
    assert "no model 'flx' in the zoo; did you mean 'flux'" in fails(run, 64, "coverage", "flx")
    assert "no file 'nothing.py'" in fails(run, 64, "coverage", "nothing.py:model")
    assert "no size '48p' of hunyuan-video; did you mean '480p'" in fails(run, 64, "coverage", "hunyuan-video:48p")
    assert "no model 'fluxx' in the zoo; did you mean 'flux'" in fails(run, 64, "coverage", "fluxx:480p")
    assert "has no function 'modle'; did you mean 'model'" in fails(run, 64, "coverage", f"{model_file}:modle")
    message = fails(run, 64, "coverage", model_file)
    assert "give path/to/file.py:function" in message
    assert "model, meta, broken" in message
    assert "is a int, not a function" in fails(run, 64, "coverage", f"{model_file}:NUMBER")
    assert "is a module class" in fails(run, 64, "coverage", f"{model_file}:Model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coverage"], "missing"),
        (["coverage", "flux", "--siez", "full"], "--siez"),
        (["coverage", "flux", "--size", "huge"], "'huge'"),
        (["coverage", "flux", "--dtype", "int8"], "'int8'"),
        (["coverage", "flux", "--layers", "-1"], "--layers"),
        (["coverage", "flux", "--layers", "two"], "--layers"),
        (["coverage", "flux", "--fail-under", "101"], "--fail-under"),
        (["coverage", "flux", "--format", "pdf"], "'pdf'"),
        (["coverage", "flux", "--target", "sm70"], "--target sm70 is not allowed: give one of current, cpu, sm80"),
        (["covrage", "flux"], "covrage"),
    ],
)
def test_usage(run: Run, arguments: list[str], message: str) -> None:
    assert message in fails(run, 64, *arguments)


def test_wrong_settings_in_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DKFUSE_FUEL", "lots")
    assert fails(run, 64, "coverage", "flux").startswith("DKFUSE_FUEL='lots' is not allowed")


def test_factories_that_fail(run: Run, model_file: Path) -> None:
    message = fails(run, 3, "coverage", f"{model_file}:raising")
    line = 1 + MODEL[: MODEL.index("raise ValueError")].count("\n")
    assert f"raised ValueError: the weights are on another planet ({model_file}, line {line})" in message
    assert "it returned Model" in fails(run, 64, "coverage", f"{model_file}:wrong")
    assert "it returned (Model, tuple)" in fails(run, 64, "coverage", f"{model_file}:also_wrong")
    assert "has no parameter 'layers'" in fails(run, 64, "coverage", f"{model_file}:model", "--layers", 2)
    model_file.write_text("import nothing_of_this_name\n")
    assert "No module named 'nothing_of_this_name'" in fails(run, 3, "coverage", f"{model_file}:model")
    model_file.write_text("def model(:\n")
    assert f"{model_file}, line 1" in fails(run, 3, "coverage", f"{model_file}:model")


def test_model_that_cannot_be_traced_shows_the_users_error_and_line(run: Run, model_file: Path) -> None:
    message = fails(run, 3, "coverage", f"{model_file}:broken")
    line = 1 + MODEL[: MODEL.index("x @ x")].count("\n")
    assert f"{model_file}, line {line}" in message
    assert "must have same reduction dim" in message or "cannot be multiplied" in message


def test_unwritable_outputs(run: Run, traced: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no folder" in fails(run, 4, "coverage", "flux", "-o", tmp_path / "no" / "x.json")
    assert "it is a folder" in fails(run, 4, "coverage", "flux", "-o", tmp_path)
    assert traced == {}  # found out before the trace
    if os.geteuid():
        tmp_path.chmod(0o500)
        assert "permission denied" in fails(run, 4, "coverage", "flux", "-o", tmp_path / "x.json")
        tmp_path.chmod(0o700)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "write", full)
    assert "No space left on device" in fails(run, 4, "coverage", "flux", "-o", tmp_path / "x.json")


def test_missing_diffusers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install 'dkfuse[diffusers]'" in fails(run, 4, "coverage", "flux")


def test_internal_error_hides_its_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def coverage(*_: object, **__: object) -> Coverage:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(recording, "coverage", coverage)
    message = fails(run, 70, "coverage", "flux")
    assert message == "internal error, please report it: RuntimeError: two (DKFUSE_DEBUG=1 shows the traceback)"
    monkeypatch.setenv("DKFUSE_DEBUG", "1")
    assert cli.run(["coverage", "flux"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_trace_error_without_a_users_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def coverage(*_: object, **__: object) -> Coverage:
        raise TraceError(RuntimeError("no line here"))

    monkeypatch.setattr(recording, "coverage", coverage)
    assert fails(run, 3, "coverage", "flux").startswith("flux (tiny) cannot be traced: RuntimeError: no line here")


def test_file_model_for_real(run: Run, model_file: Path) -> None:
    for function in ("model", "meta"):
        code, out, err = run("coverage", f"{model_file}:{function}", "--format", "json", "--fail-under", 100)
        assert code == 0, err
        found = Coverage.from_json(out)
        found.assert_fused("norm_modulate", exactly=1)
        assert found.sites[0].source is not None
        assert found.sites[0].source.endswith(f"model.py:{1 + MODEL[: MODEL.index('self.norm(x)')].count(chr(10))}")


def test_zoo_model_for_real_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from dkfuse.cli.main import main; main()"]
    command += ["coverage", "sd3-medium", "--target", "sm90", "-f", "json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = Coverage.from_json(done.stdout)
    assert (found.model, found.target) == ("sd3-medium (tiny)", "sm90")
    found.assert_fused("modulate", at_least=4)
    assert all(isinstance(site.reason, Reason) for site in found.sites if site.status is not Status.FUSED)


def test_model_file_may_be_anywhere(run: Run, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_file.parent)
    Path("relative.py").write_text(textwrap.dedent("from model import broken as it\n"))
    assert fails(run, 3, "coverage", "relative.py:it").count("\n") == 0
