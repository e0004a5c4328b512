"""compute-sanitizer's memcheck watches every provider's kernels on odd calls, and finds a breach where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dkfuse.kernels.providers import BUILT_IN

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("memcheck_calls.py")
FOUND = 99
CLEAN = "ERROR SUMMARY: 0 errors"
# padding: the byte behind an allocation belongs to no other one. Return codes of the driver's calls are not asked for:
# torch and Triton handle them, and a failed launch makes a result wrong.
OPTIONS = f"--tool memcheck --padding 512 --error-exitcode {FOUND} --report-api-errors no"
PROCESS = "--target-processes application-only --launch-timeout 120 --print-limit 20"


def sanitizer() -> str:
    """The path of compute-sanitizer; skips the test where it is not installed."""
    homes = [os.environ.get("CUDA_HOME", ""), *map(str, sorted(Path("/usr/local").glob("cuda*"), reverse=True))]
    folders = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))
    if found is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit (package cuda-sanitizer-13-0)")
    return found


def ran(*command: str) -> tuple[int, str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("provider", BUILT_IN)
def test_no_access_outside_of_an_allocation(provider: str) -> None:
    if (missing := BUILT_IN[provider].problem()) is not None:
        pytest.skip(missing.message)
    code, text = ran(sanitizer(), *OPTIONS.split(), *PROCESS.split(), sys.executable, str(PROGRAM), provider)
    assert code == 0, text[-6000:]
    assert CLEAN in text and " calls, 0 wrong" in text, text[-6000:]


def test_a_breach_is_found() -> None:
    """The same program with a kernel that reads one element too many: nothing is wrong, but memcheck says so."""
    pytest.importorskip("triton")
    assert ran(sys.executable, str(PROGRAM), "breach")[0] == 0
    code, text = ran(sanitizer(), *OPTIONS.split(), *PROCESS.split(), sys.executable, str(PROGRAM), "breach")
    assert code == FOUND, text[-6000:]
    assert "Invalid __global__ read" in text and CLEAN not in text, text[-6000:]
