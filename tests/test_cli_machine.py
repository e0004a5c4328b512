"""The commands that look at the machine rather than a model, help, and progress."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import typer
from rich.console import Console
from typer.models import OptionInfo

from dkfuse import zoo
from dkfuse.cli import doctor
from dkfuse.cli.main import app
from dkfuse.reporting.progress import progress
from dkfuse.reporting.report import Coverage, Graph, Site, Status

Run = Callable[..., tuple[int, str, str]]


def commands(app: typer.Typer) -> list[Callable[..., None]]:
    inner = [c for group in app.registered_groups if group.typer_instance for c in commands(group.typer_instance)]
    return inner + [c.callback for c in app.registered_commands if c.callback is not None]


def test_options_are_named_as_written() -> None:
    """typer 0.27 takes an option's name from its metavar where the two differ only in case, so that is spelled out."""
    found = {}
    for command in commands(app):
        for name, hint in get_type_hints(command, include_extras=True).items():
            for info in getattr(hint, "__metadata__", ()):
                if isinstance(info, OptionInfo) and (info.metavar or "").lower() == name:
                    found[command.__module__, name] = (info.default, *info.param_decls)
    assert {("dkfuse.cli.bench", "mode"), ("dkfuse.cli.bench", "op"), ("dkfuse.cli.main", "target")} <= set(found)
    assert all(f"--{name}" in declared for (_, name), declared in found.items()), found


def test_zoo_list(run: Run) -> None:
    code, out, _ = run("zoo")
    assert code == 0
    assert all(name in out for name in zoo.MODELS)
    rows = json.loads(run("zoo", "--json")[1])
    assert [row["name"] for row in rows] == list(zoo.MODELS)
    assert next(row["variants"] for row in rows if row["name"] == "hunyuan-video") == {"480p": "25440 video + 256 text"}
    assert "hunyuan-video:480p" in out


def test_doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DKFUSE_TARGET", "sm89")
    monkeypatch.setenv("DKFUSE_TAGRET", "sm89")
    code, out, _ = run("doctor")
    assert code == 0
    for part in ("torch", "triton", "CuTe DSL", "sgl-kernel", "FlashInfer", "diffusers", "GPU", "Inductor cache"):
        assert part in out
    data = json.loads(run("doctor", "--json")[1])
    rows = {row["variable"]: row for row in data["settings"]}
    assert (rows["DKFUSE_TARGET"]["value"], rows["DKFUSE_TARGET"]["origin"]) == ("sm89", "environment")
    assert rows["DKFUSE_DISABLE"]["origin"] == "default"
    assert "DKFUSE_DEBUG" in rows
    assert any(check["name"] == "DKFUSE_TAGRET" for check in data["folders"])


def test_doctor_reports_what_makes_dkfuse_unusable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DKFUSE_FUEL", "lots")
    code, out, _ = run("doctor")
    assert code == 4
    assert "DKFUSE_FUEL='lots' is not allowed" in " ".join(out.split())
    monkeypatch.delenv("DKFUSE_FUEL")
    versions = {"torch": "2.10.0"}
    monkeypatch.setattr(doctor, "installed", lambda *names: next(filter(None, map(versions.get, names)), None))
    found = doctor.diagnose()
    by_name = {check.name: check for check in found.checks}
    assert by_name["torch"].state == "error"
    assert "pip install 'torch>=2.11'" in by_name["torch"].hint
    assert by_name["FlashInfer"].hint.startswith("pip install 'dkfuse[flashinfer]'")
    assert not found.usable


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU")
def test_doctor_says_which_compiler_links_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clang").touch(mode=0o755)
    monkeypatch.delenv("CC", raising=False)
    for folder, value in ((tmp_path, str(tmp_path / "clang")), (tmp_path / "empty", "not found")):
        monkeypatch.setenv("PATH", str(folder))
        (check,) = (check for check in doctor.diagnose().software if check.name == "C compiler")
        assert check.value == value
    assert check.state == "optional" and "set CC, or install gcc; Triton builds launchers with it" in check.hint


def test_doctor_sees_a_gpu_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.65.06, 81559 MiB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = doctor.diagnose()
    by_name = {check.name: check for check in found.devices}
    assert by_name["NVIDIA driver"].value == "580.65.06"
    assert by_name["GPU"].value == "NVIDIA H100 80GB HBM3, not usable by torch"
    assert by_name["GPU"].state == "error"
    assert not found.usable
    program.write_text("#!/bin/sh\nexit 9\n")
    assert doctor.diagnose().devices[0].value == "not found"


def test_help_and_version(run: Run) -> None:
    for arguments in ([], ["--help"], ["coverage", "-h"]):
        code, out, _ = run(*arguments)
        assert code == 0
        assert "Usage: dkfuse" in out
    assert run("--version")[1].startswith("dkfuse 0.")


def test_progress_lines_without_a_terminal() -> None:
    seen = Coverage(graphs=[Graph(0, 10, 0.1, sites=[Site("a", "norm", Status.FUSED)])])
    stream = io.StringIO()
    with progress("tracing flux", Console(file=stream, width=80), seen, interval=0.05):
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 2
    assert lines[0] == "tracing flux: 0 s, 1 graph, 1 site"


def test_progress_on_a_terminal_leaves_nothing_behind() -> None:
    stream = io.StringIO()
    with progress("tracing flux", Console(file=stream, width=80, force_terminal=True), Coverage()):
        time.sleep(0.3)
    assert "tracing flux: 0 s" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")
