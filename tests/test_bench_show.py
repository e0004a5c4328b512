"""`dkfuse bench show`: saved measurements as tables, in markdown and text, and what it says of files it cannot read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dkfuse.bench import kernels, results, saved, sections, sections_kernels, sections_models
from dkfuse.bench.results import OURS, ModelResult, Side
from dkfuse.bench.sections import Column, Section, tabulated
from dkfuse.errors import ReportError

Run = Callable[..., tuple[int, str, str]]


def model(name: str, glue: float, batch: int = 1, **more: Any) -> ModelResult:
    """dkfuse takes `glue` ms beside 6 of GEMM and attention, Inductor 1 ms, max-autotune 0.9, a plain install 0.8."""

    def side(time: float, kind: str) -> Side:
        return Side({"gemm": 4.0, "attention": 2.0, kind: time}, 8.0 + time, 1.0, 9, 10.0 + time, None, 4.0, 1e-3)

    sides = {OURS: side(glue, "dkfuse"), "inductor": side(1.0, "inductor")}
    sides.update({"max-autotune": side(0.9, "inductor"), "plain": side(0.8, "dkfuse")})
    return ModelResult(name, sides, batch, 5, pack=True, depth=(5, 4), **more)


def entry(us: float, error: float = 1e-3) -> dict[str, float]:
    return {"microseconds": us, "of_copy": 20 / us, "of_peak": 18 / us, "error": error}


def kernel_row(case: str, triton: float | None, **more: Any) -> dict[str, Any]:
    providers = {"triton": entry(triton) if triton else {"problem": "no GPU"}, "sgl": entry(25.0)}
    rivals = {"eager": entry(100.0, 2e-3), "inductor": entry(40.0), "max-autotune": {"problem": "slow | broken"}}
    peers = [{"name": "quack", "part": "RMSNorm alone", **entry(16.0)}, {"name": "Liger", "part": "x", "problem": "y"}]
    row = {"op": "norm_modulate", "case": case, "shape": [1, 8, 64], "providers": providers, "rivals": rivals}
    found = {**row, "peers": peers, **more}
    return {**found, "best": kernels.best(found)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A file of models and one of kernels."""
    found = [model("flux", 0.5), model("sd35|large", 0.4, 2, note="does not fit"), model("none", 0.7)]
    for name, loop in (("dkfuse", 6.0), ("inductor", 7.2), ("plain", 6.4)):
        found[0].sides[name].loop = loop
    one, two = tmp_path / "a.json", tmp_path / "k.json"
    one.write_text(json.dumps(results.report(found, "a <GPU>")))
    rows = [kernel_row("Flux", 20.0), kernel_row("wide", 10.0), kernel_row("norm", 20.0, op="gated_residual", peers=[])]
    two.write_text(json.dumps(kernels.report(rows, "a <GPU>", 3e6)))
    return one, two


def table(text: str, heading: str) -> list[dict[str, str]]:
    """The rows of the markdown table below a heading, by column."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("#") and heading in line)
    end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("#")), len(lines))
    cells = [
        [c.strip() for c in re.split(r"(?<!\\)[|]", line[1:-1])] for line in lines[start:end] if line.startswith("| ")
    ]
    assert len({len(row) for row in cells}) == 1
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


def test_models_as_markdown(files: tuple[Path, Path], run: Run) -> None:
    code, out, err = run("bench", "show", files[0], "--format", "markdown")
    assert (code, err) == (0, "")
    heading = out.splitlines()[0]
    assert heading.startswith("## Models: a <GPU>, torch 2.")
    assert f"dkfuse {results.versions()['dkfuse']}" in heading and heading.endswith(results.today())
    flux, large, _, mean = table(out, "Models")
    assert (flux["model"], flux["blocks"], large["model"]) == ("flux", "5 + 4", "sd35\\|large, batch 2")
    assert flux["gain, weights packed"] == f"{7 / 6.5:.3f}x"
    assert flux["gain, plain install"] == f"{7 / 6.8:.3f}x"
    assert (flux["in a loop, plain install"], flux["in a loop, weights packed"]) == ("1.125x", "1.200x")
    assert large["in a loop, weights packed"] == ""  # a file that was saved before loops were timed
    assert (flux["better of Inductor's modes"], flux["gain over it, plain install"]) == (
        "max-autotune",
        f"{6.9 / 6.8:.3f}x",
    )
    assert flux["saved: glue, GEMM, attention"] == "7.1 %, 0.0 %, 0.0 %"
    assert flux["saved of it: glue, GEMM, attention"] == "5.8 %, 0.0 %, 0.0 %"
    assert (flux["glue of Inductor's"], flux["wall"], flux["compile, cold"]) == ("0.50", "0.94", "0.95")
    assert "compile, warm" not in flux  # nowhere measured
    assert mean["model"] == "geometric mean of 3"
    assert mean["glue of Inductor's"] == f"{(0.5 * 0.4 * 0.7) ** (1 / 3):.2f}"
    assert "- sd35|large: does not fit; errors are against fp32" in out


def test_ways_of_measuring_have_tables_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    other = model("flux", 0.5)
    other.sides = {OURS: other.sides[OURS], "eager": other.sides["inductor"]}
    path.write_text(json.dumps(results.report([model("flux", 0.5), other, model("ltx", 0.5)], "g")))
    first, second = sections_models.sections(saved.read(path))
    assert [row[0] for row in first.rows] == ["flux", "ltx", "geometric mean of 2"]
    assert [row[0] for row in second.rows] == ["flux"]
    assert "glue of eager's" in second.titles and "better of Inductor's modes" not in second.titles
    path.write_text(json.dumps(results.report([], "g")))
    assert sections_models.sections(saved.read(path))[0].caption == "No model was measured."


def test_parts_of_a_bench_make_one_table(tmp_path: Path, run: Run) -> None:
    paths = []
    for name in ("flux", "ltx", "mochi"):
        paths.append(tmp_path / f"{name}.json")
        device = "another" if name == "mochi" else "g"
        paths[-1].write_text(json.dumps(results.report([model(name, 0.5)], device)))
    first, second = saved.merged([saved.read(path) for path in paths])
    assert ([r.model for r in first.models], [r.model for r in second.models]) == (["flux", "ltx"], ["mochi"])
    out = run("bench", "show", *paths, "-f", "markdown")[1]
    assert [line[:14] for line in out.splitlines() if line.startswith("#")] == ["## Models: g, ", "## Models: ano"]
    assert "geometric mean of 2" in out


def test_kernels_as_markdown(files: tuple[Path, Path], run: Run) -> None:
    code, out, _ = run("bench", "show", *files, "-f", "markdown")
    assert code == 0
    assert "large copy 3.00 TB/s" in out
    flux, wide = table(out, "norm_modulate")
    assert (flux["shape"], flux["of copy"], flux["x Inductor"], flux["x eager"]) == ("1x8x64", "1.00", "2.00x", "5.00x")
    assert (flux["sgl"], flux["best"], flux["error, eager's"]) == ("0.80", "triton", "1.0e-03, 2.0e-03")
    assert flux["peers"] == "RMSNorm alone: quack 1.25"
    assert wide["x Inductor"] == "4.00x"
    assert "x max-autotune" not in flux
    means = {row["op"]: row for row in table(out, "Geometric means")}
    assert means["norm_modulate"]["x Inductor"] == f"{8**0.5:.2f}x"
    assert "x max-autotune" not in means["norm_modulate"]
    assert (means["gated_residual"]["cases"], means["gated_residual"]["of copy"]) == ("1", "1.00")


def test_where_triton_was_not_timed(tmp_path: Path) -> None:
    nothing = kernel_row("nothing", None, providers={"triton": {"problem": "no GPU"}})
    path = tmp_path / "k.json"
    path.write_text(json.dumps(kernels.report([kernel_row("sgl only", None), nothing], "g", 3e6)))
    _, section, means = sections_kernels.sections(saved.read(path))
    (line,) = section.rows
    assert dict(zip(section.titles, line, strict=True))["x Inductor"] == "1.60x"
    assert "sgl" not in section.titles  # nothing to compare it with
    assert section.notes == ["nothing: no kernel was timed (triton: no GPU)"]
    assert means.rows[0][:2] == ["norm_modulate", "1"]


def test_text(files: tuple[Path, Path], run: Run) -> None:
    code, out, _ = run("bench", "show", *files)
    assert code == 0
    for part in ("Models: a <GPU>", "sd35|large", "note: sd35|large: does not fit", "Geometric means", "quack 1.25"):
        assert part in out
    assert "##" not in out and "| " not in out
    assert "…" not in out  # nothing is cut off
    head = next(line for line in out.splitlines() if line.startswith("model"))
    assert "saved of it: glue, GEMM, attention" in head and len(head) > 150


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has schema None; give files of `dkfuse bench model --json` (dkfuse.bench.model/1)"),
        ('{"schema": "dkfuse.coverage/1"}', "has schema 'dkfuse.coverage/1'"),
        ('{"schema": "dkfuse.bench.model/1"}', "is damaged (KeyError: 'device'); measure again"),
    ],
)
def test_files_that_are_something_else(run: Run, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    code, out, err = run("bench", "show", path)
    assert (code, out) == (64, "")
    assert f"{path} {message}" in err
    assert err.count("\n") == 1


def test_a_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    code, _, err = run("bench", "show", tmp_path / "x.json")
    assert code == 64
    assert f"cannot read {tmp_path / 'x.json'}: No such file" in err


@pytest.mark.parametrize("lost", ["case", "providers", "peers"])
def test_rows_that_lack_something(tmp_path: Path, lost: str) -> None:
    row = kernel_row("Flux", 20.0)
    del row[lost]
    path = tmp_path / "k.json"
    path.write_text(json.dumps(kernels.report([row], "g", 3e6)))
    with pytest.raises(ReportError, match=f"is damaged .KeyError: '{lost}'."):
        saved.read(path)


def test_files_of_older_versions_can_be_read(files: tuple[Path, Path]) -> None:
    data = json.loads(files[0].read_text())
    del data["versions"]
    for row in data["models"]:
        for name in ("depth", "size", "dtype", "better"):
            row.pop(name, None)
    files[0].write_text(json.dumps(data))
    (section,) = sections_models.sections(saved.read(files[0]))
    assert section.rows[0][:2] == ["flux", "5"]


def test_columns() -> None:
    rows = [{"a": 2.0, "b": None, "c": "x"}, {"a": 8.0, "b": None, "c": "y|z"}]
    made = [Column(name.upper(), lambda row, name=name: row[name]) for name in "cab"]  # type: ignore[misc]
    titles, cells = tabulated(made, rows, "mean")
    assert titles == ["C", "A"]
    assert cells == [["x", "2.00"], ["y|z", "8.00"], ["mean", "4.00"]]
    assert tabulated(made, rows[:1], "mean")[1] == [["x", "2.00"]]
    text = sections.to_markdown([Section("h", "c", titles, cells, ["n"])])
    assert text == "## h\n\nc\n\n| C | A |\n|---|---|\n| x | 2.00 |\n| y\\|z | 8.00 |\n| mean | 4.00 |\n\n- n\n"
