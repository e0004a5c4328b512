"""A helper compiles quack's and FlashAttention 4's kernels on a GPU host: who compiled, same results, warm starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dkfuse.kernels import attention_kept, gemm_kernels
from dkfuse.kernels.attention_kernels import version_of

from .on_device import capability

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("compile_ahead_model.py")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gemm_kernels.version() is None, reason="quack is not installed"),
    pytest.mark.skipif(not torch.cuda.is_available() or capability() != 90, reason="no sm90"),
]
needs_fa4 = pytest.mark.skipif(version_of("fa4") not in attention_kept.VERSIONS, reason="FlashAttention 4 is not there")


def compiled(folder: Path, *how: str, attention: str = "sdpa", threads: int | None = None) -> dict[str, Any]:
    """What the program says, with the caches in `folder`; "result": the model's."""
    environment = {
        **os.environ,
        "DKFUSE_CACHE_DIR": str(folder / "dkfuse"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    if threads is not None:
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    command = [sys.executable, str(PROGRAM), str(folder / "result.pt"), attention, *how]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(how, json.dumps(found))
    found["result"] = torch.load(folder / "result.pt")
    assert found["error"] <= 1.05 and found["fused"].count("swiglu_epilogue") == 1, found
    assert found["fused"].count("gemm_kernel") >= 5 and found["problem"] is None, found
    return found


def test_a_helper_compiles_quacks_kernels(tmp_path: Path) -> None:
    alone = compiled(tmp_path / "alone", threads=1)
    assert alone["started"] == 0 and alone["helped"] == {}
    kinds = alone["kernels"]
    assert kinds >= 4 and alone["compiled"] == kinds

    cold = compiled(tmp_path / "cold", "wait")
    assert cold["started"] == 1 and not cold["gpu"]
    assert len(cold["helped"]) >= kinds, "and those that are likely"
    assert all(error is None for *_, error in cold["helped"].values())
    assert cold["pid"] not in {pid for pid, *_ in cold["helped"].values()}
    assert (cold["kernels"], cold["compiled"], cold["imported"]) == (kinds, 0, []), "as the helper left them"
    assert torch.equal(cold["result"], alone["result"])

    warm = compiled(tmp_path / "cold")
    assert (warm["started"], warm["helped"], warm["kernels"], warm["compiled"]) == (0, {}, kinds, 0)
    assert warm["imported"] == [] and torch.equal(warm["result"], alone["result"])

    # another model, with kernels of the same kinds: Inductor's cache is cold, that of kernels is not
    (tmp_path / "cold" / "inductor").rename(tmp_path / "inductor")
    (tmp_path / "cold" / "dkfuse" / "records").rename(tmp_path / "records")
    again = compiled(tmp_path / "cold")
    assert (again["started"], again["kernels"], again["compiled"], again["imported"]) == (0, kinds, 0, [])
    assert torch.equal(again["result"], alone["result"])


def test_whoever_is_first_compiles(tmp_path: Path) -> None:
    """As it is used: what the helper has not begun when Inductor is done is compiled here, and nothing twice."""
    found = compiled(tmp_path)
    assert found["started"] >= 1 and found["compiled"] + len(found["helped"]) >= 4
    assert found["kernels"] == compiled(tmp_path)["kernels"]


def test_a_helper_that_compiles_nothing(tmp_path: Path) -> None:
    found = compiled(tmp_path, "wait", "broken")
    assert all("no_such_module_of_dkfuse" in error for *_, error in found["helped"].values()) and found["helped"]
    assert found["compiled"] == found["kernels"] >= 4


def test_without_a_linker_it_is_compiled_each_time(tmp_path: Path) -> None:
    """What is not kept is called as it was compiled."""
    kept = compiled(tmp_path, threads=1)
    (tmp_path / "dkfuse").rename(tmp_path / "before")
    found = compiled(tmp_path, "unlinked", threads=1)
    assert found["compiled"] == found["kernels"] == kept["kernels"]
    assert torch.equal(found["result"], kept["result"])


@needs_fa4
def test_a_helper_compiles_flash_attention(tmp_path: Path) -> None:
    alone = compiled(tmp_path / "alone", attention="fa4", threads=1)
    assert "attention" in alone["fused"] and alone["compiled"] == alone["kernels"] + 1

    cold = compiled(tmp_path / "cold", "wait", attention="fa4")
    assert "attention" in cold["fused"] and cold["compiled"] == 0 and not cold["gpu"]
    assert any(name.startswith("bfloat16 128 1 False False") for name in cold["helped"]), cold["helped"]
    assert all(error is None for *_, error in cold["helped"].values())
    assert torch.equal(cold["result"], alone["result"])

    warm = compiled(tmp_path / "cold", attention="fa4")
    assert (warm["started"], warm["compiled"], warm["imported"]) == (0, 0, []), "the call that was read, from disk"
    assert torch.equal(warm["result"], alone["result"])
