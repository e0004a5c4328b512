"""The bench of compile times: processes of their own, and the command around them."""

from __future__ import annotations

import json
import textwrap
import time
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dkfuse.bench import starts
from dkfuse.bench.results import OURS
from dkfuse.bench.sides import Options
from dkfuse.bench.starts import StartError
from dkfuse.bench.targets import Target
from dkfuse.cli import bench as cli_bench

MODEL = """
    import torch
    from torch import nn

    def small():
        module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()).bfloat16()
        return module, {"input": torch.randn(32, 64).bfloat16()}

    def broken():
        raise OSError("no weights here")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(textwrap.dedent(MODEL))
    return path


def test_two_processes_of_which_the_second_finds_what_the_first_left(file: Path) -> None:
    said: list[str] = []
    row = starts.measure(Target(f"{file}:small", "file"), Options((), rounds=1, pack=True), "cpu", said.append)
    assert said == [f"{file}:small: dkfuse, {which}" for which in ("cold", "warm", "warm", "warm")]
    (times,) = row["sides"].values()
    assert 0 < times["warm"] < times["cold"] and row["ratios"] == {}


def test_processes_keep_bytecode_as_an_installation_would(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout has none at first; without it each start compiles the sources of dkfuse, and torch's never."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    file.write_text("import sys\nassert not sys.dont_write_bytecode\n" + file.read_text())
    assert starts.seconds(Target(f"{file}:small", "file"), Options(()), OURS, "cpu", file.parent) > 0


@pytest.mark.parametrize("slow", ["torch.compile", "the first forward"])
def test_what_is_timed(slow: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """torch.compile is: for Inductor it imports most of what Inductor is, where other backends do so later."""

    def runner(*_: Any) -> Callable[[], None]:
        time.sleep(0.2 if slow == "torch.compile" else 0.0)
        return lambda: time.sleep(0.2 if slow == "the first forward" else 0.0)

    monkeypatch.setattr(starts, "runner", runner)
    target, options = Target(f"{file}:small", "file"), Options()
    starts.main({"target": asdict(target), "options": asdict(options), "side": "inductor", "device": "cpu"})
    assert float(capsys.readouterr().out) >= 0.2


def test_a_process_that_fails(file: Path, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"compiles it for inductor ended with 1: .*no weights here"):
        starts.seconds(Target(f"{file}:broken", "file"), Options(), "inductor", "cpu", tmp_path)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Path]]:
    """Processes that take no time; what was asked of them."""
    asked: list[tuple[str, str, Path]] = []

    def seconds(target: Target, options: Options, side: str, device: str, folder: Path) -> float:
        asked.append((target.name, side, folder))
        if target.name == "sana":
            raise StartError("sana: it ended with 1: no memory")
        warm = any(folder == other for *_, other in asked[:-1])
        return {("dkfuse", False): 30.0, ("dkfuse", True): 4.0, ("inductor", False): 40.0}.get((side, warm), 5.0)

    monkeypatch.setattr(starts, "seconds", seconds)
    monkeypatch.setattr(cli_bench, "_device", lambda: types.SimpleNamespace(name="a <GPU>", kind="cpu"))
    return asked


def test_the_command(run: Run, made_up: list[Any], tmp_path: Path) -> None:
    json_ = tmp_path / "x.json"
    code, out, err = run("bench", "start", "flux@2", "sana", "--layers", 3, "--rounds", 2, "--json", json_)
    assert code == 3 and "1 of 2 models were measured; sana: it ended with 1: no memory" in err
    lines = {tuple(line.split()) for line in out.splitlines()}
    assert {("flux@2", "3", "+", "3", "dkfuse", "30.0", "4.0"), ("inductor", "40.0", "5.0", "0.75x", "0.80x")} <= lines
    data = json.loads(json_.read_text())
    assert data["schema"] == "dkfuse.bench.start/1" and data["device"] == "a <GPU>"
    (row,) = data["models"]
    assert (row["batch"], row["layers"], row["depth"]) == (2, 3, [3, 3])
    assert row["ratios"] == {"inductor": {"cold": 0.75, "warm": 0.8}}
    folders = [folder for name, _, folder in made_up if name == "flux"]
    assert len(folders) == 4 * (1 + starts.WARM) and len(set(folders)) == 4, (
        "each side of each round has caches of its own"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["flx"], 64, "did you mean 'flux'"),
        (["flux", "--against", "eager"], 64, "--against eager is not allowed"),
        (["flux", "--mode", "fast"], 64, "--mode fast is not allowed"),
        (["flux", "--json", "/no/such/folder/x.json"], 4, "there is no folder"),
        (["flux"], 4, "needs a CUDA GPU, and torch sees none here"),
    ],
)
def test_errors(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, out, err = run("bench", "start", *arguments)
    assert (found, out) == (code, "") and message in err and err.count("\n") == 1
