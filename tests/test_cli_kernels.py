"""The commands `dkfuse kernels` and `dkfuse cache`: what they list, who would run a call, and usage errors."""

from __future__ import annotations

import json
import re

import pytest
import torch

from dkfuse.choosing.example_calls import example, parse_shape
from dkfuse.kernels import registry
from dkfuse.kernels.registry import Constraint, Implementation
from dkfuse.kernels.support import OPERANDS


def test_list_of_kernels(run, fake_cute):
    code, out, _ = run("kernels")
    assert code == 0 and all(op in out for op in OPERANDS) and "cute" in out
    rows = json.loads(run("kernels", "norm_modulate", "--json")[1])
    cute = next(row for row in rows if row["provider"] == "cute")
    assert cute["constraints"] == [{"code": "width", "text": "D <= 4096"}] and cute["devices"] == ["sm90 and newer"]
    assert {row["op"] for row in rows} == {"norm_modulate"}


@pytest.mark.parametrize("width", [80, 140])
def test_the_list_keeps_brackets_and_fits(run, monkeypatch, width):
    """Constraints have brackets, which rich would take for markup."""
    monkeypatch.setenv("COLUMNS", str(width))
    constraint = Constraint(
        "operands", "weight [D] and bias [..., r] or [1|B,1,D]; " + "dense rows, " * 12, lambda _: "x"
    )
    registry.register(Implementation("norm_modulate", "mine", (constraint,), print, devices=("cpu",)))
    try:
        code, out, _ = run("kernels", "norm_modulate")
        _, brief, _ = run("kernels")
        _, full, _ = run("kernels", "--constraints")
        line = ("kernels", "norm_modulate", "--shape", "1x64x512", "--target", "cpu")
        _, verdict, _ = run(*line)
    finally:
        registry.unregister("mine")
    assert code == 0 and "- weight [D] and bias [..., r] or [1|B,1,D]; dense" in out
    assert "[D]" in full and "[D]" not in brief and "norm_rope" in full
    assert "pip install 'dkfuse[flashinfer]'" in brief, "in one piece"
    assert all(len(line) <= width for text in (out, brief, full, verdict) for line in text.splitlines())
    assert verdict.startswith("norm_modulate 1x64x512 bf16 on cpu: native\n") and "  mine " in verdict


def test_who_would_run_a_call(run, fake_cute, monkeypatch):
    line = ("kernels", "norm_modulate", "--shape", "1x4096x3072", "--shape", "1x64x8192", "--target", "sm90")
    code, out, _ = run(*line)
    assert code == 0 and "norm_modulate 1x4096x3072 bf16 on sm90: triton" in out
    first, second = json.loads(run(*line, "--json")[1])
    assert first["provider"] == second["provider"] == "triton"
    assert {o["provider"]: o["code"] for o in first["others"]} == {"cute": "not_faster", "native": "not_asked"}
    assert {o["provider"]: o["code"] for o in second["others"]} == {"cute": "width", "native": "not_asked"}
    monkeypatch.setenv("DKFUSE_KERNELS", "cute,triton")
    asked = json.loads(run(*line, "--json")[1])[0]
    assert asked["provider"] == "cute"
    assert {o["provider"]: o["code"] for o in asked["others"]} == {"triton": "not_first", "native": "not_asked"}
    (nobody,) = json.loads(run("kernels", "norm_rope", "--shape", "1x8x2x40000", "--target", "sm90", "--json")[1])
    assert nobody["provider"] is None and nobody["reason"]


@pytest.mark.parametrize("op", OPERANDS)
def test_an_example_call_is_a_call_that_the_op_takes(op):
    shape = (2, 16, 4, 64) if op == "norm_rope" else (2, 16, 64)
    for tables in ("half", "full", "complex", "matrix") if op == "norm_rope" else ("half",):
        call = example(op, shape, torch.float16, tables=tables)
        results = getattr(torch.ops.dkfuse, op)(**call)
        assert (results if isinstance(results, torch.Tensor) else results[0]).shape == shape


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (("nrom_rope",), "did you mean 'norm_rope'"),
        (("norm_rope", "--shape", "1x2y3"), "1x2y3 is not a shape"),
        (("norm_rope", "--shape", "1x8x2x64", "--dtype", "int8"), "bf16, fp16, fp32"),
        (("norm_rope", "--shape", "1x8x2x64", "--target", "sm70"), "sm80"),
        (("--shape", "1x2"), "OP"),
        (("norm_modulate", "--norm", "none"), "norm_rope"),
    ],
)
def test_usage_errors(run, line, named):
    code, _, err = run("kernels", *line)
    assert code == 64 and err.count("\n") == 1 and named in err


def test_shapes():
    assert parse_shape("1x4096x3072") == parse_shape("1×4096×3072") == (1, 4096, 3072)
    with pytest.raises(ValueError, match="is not a shape"):
        parse_shape("")


def test_cache_commands(run, tmp_path, monkeypatch):
    from dkfuse.kernels import disk_cache

    monkeypatch.setenv("DKFUSE_CACHE_DIR", str(tmp_path))
    disk_cache.use(None)
    disk_cache.put(("a",), b"x" * 1000)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "r.json").write_text("{}")
    (tmp_path / "mine.txt").write_text("not dkfuse's")
    found = json.loads(run("cache", "info", "--json")[1])
    assert found["path"] == str(tmp_path)
    assert (found["kernels"]["files"], found["records"]["files"]) == (1, 1) and found["kernels"]["bytes"] > 1000
    assert "1 compiled kernel," in run("cache", "info")[1]
    code, out, _ = run("cache", "clear")
    assert code == 0 and out.startswith("2 files, ")
    assert json.loads(run("cache", "info", "--json")[1])["kernels"]["files"] == 0
    assert (tmp_path / "mine.txt").exists()
    disk_cache.use(None)


@pytest.mark.parametrize(("op", "shape"), [("norm_modulate", "1x4096x3072"), ("norm_rope", "1x4096x24x128")])
def test_how_it_would_be_launched(run, op, shape):
    """The table's configuration; that of other providers is their own."""
    arguments = ["kernels", op, "--shape", shape, "--dtype", "bf16", "--target"]
    code, out, _ = run(*arguments, "sm90")
    assert code == 0 and re.search(r"triton, 4 warps, 3 x (1024 columns|8 rows)", out)
    code, out, _ = run(*arguments, "cpu", "--json")
    (verdict,) = json.loads(out)
    assert (verdict["provider"], verdict["config"]) == ("native", None)
