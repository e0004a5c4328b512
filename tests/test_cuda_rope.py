"""The CUDA kernel of norm_rope without a GPU: its constraints, its code run by an emulator, its build by NVRTC."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dkfuse.kernels import cuda_compile, cuda_rope
from dkfuse.kernels.ops import reference_outputs
from dkfuse.kernels.provider_cuda import HEAD_DIMS, IMPLEMENTATIONS
from dkfuse.kernels.rounding import Rounding

from . import cuda_emulation as emulation
from .rope_calls import call_of, tables
from .tensors import random

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {BF16: 2.4e-3, FP16: 3e-4, FP32: 1e-6}
(ROPE,) = IMPLEMENTATIONS

X = random(2, 3, 5, 128)
HALF = tables("half", 128, 3, 1)


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("head_dim", call_of(random(2, 3, 5, 96))),
        ("head_dim", call_of(random(2, 3, 5, 2048))),
        ("across", call_of(X, norm="rms", across=2)),
        ("roundings", call_of(X, norm="rms", roundings=int(Rounding.NORM))),
        ("weight", call_of(X, norm="rms", weight=random(5, 128))),
        ("weight", call_of(X, norm="rms", weight=random(256)[::2])),
        ("weight", call_of(X, norm="layer", bias=random(1))),
        ("tables", call_of(X, **tables("matrix", 128, 3, 1))),
        ("tables", call_of(X, **tables("half", 128, 3, 1, dtype=FP64))),
        ("tables", call_of(X, **{**HALF, "sin": HALF["sin"].to(BF16)})),
        ("tables", call_of(X, **{**HALF, "sin": random(3, 1, 128, dtype=FP32)[..., ::2]})),
        ("rotated", call_of(X, **tables("half", 4, 3, 1))),
        ("rotated", call_of(X, **tables("half", 24, 3, 1, rotation="half"))),
        ("call", call_of(random(2, 3, 128, 5).transpose(2, 3))),
        ("call", call_of(torch.empty(0, 5, 128))),
    ],
)
def test_refused(code: str, arguments: dict[str, Any]) -> None:
    problem = ROPE.problem(arguments)
    assert problem is not None
    assert problem.code == code


@pytest.mark.parametrize("kind", ["half", "full", "complex"])
def test_taken(kind: str) -> None:
    for rotation, d in (("interleaved", 64), ("half", 1024)):
        rope = tables(kind, d // 2, 3, 1, rotation=rotation)
        more = {"weight": random(d, dtype=FP32), "norm_last": True, "weight_offset": 1.0}
        assert ROPE.problem(call_of(random(2, 3, 5, d), norm="rms", **more, **rope)) is None


def test_symbolic_tokens_are_taken_without_a_guard() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    x, table = (mode.from_tensor(t, static_shapes=False) for t in (random(2, 9, 24, 128), random(9, 1, 64)))
    tokens = x.shape[1]
    with mode:
        x = x.new_empty(2, tokens, 24, 128)
        table = x.new_empty(tokens, 1, 64, dtype=FP32)
    guards = len(shapes.guards)
    assert ROPE.problem(call_of(x, norm="rms", rotation="interleaved", cos=table, sin=table)) is None
    assert len(shapes.guards) == guards


def cases() -> list[tuple[str, dict[str, Any]]]:
    """One for each way through the kernel; an odd number of rows in most."""
    weight, bias = random(128), random(128, dtype=FP16, seed=5)
    odd = random(1, 3, 5, 129)[..., 1:]
    heads_first = random(2, 3, 6, 64, dtype=FP16).transpose(1, 2)
    return [
        ("interleaved", call_of(X, norm="rms", eps=1e-6, weight=weight, **tables("full", 96, 3, 1))),
        (
            "half",
            call_of(X, norm="layer", eps=1e-5, weight=weight, bias=bias, **tables("full", 96, 3, 1, rotation="half")),
        ),
        ("unaligned", call_of(odd, norm="rms", weight_offset=1.0, weight=random(129)[1:], **HALF)),
        ("row tables", call_of(heads_first, norm="rms", norm_last=True, **tables("complex", 64, 2, 6, 3))),
        ("long", call_of(random(3, 3, 1024, dtype=FP32), **tables("half", 320, 3, 1, dtype=BF16, rotation="half"))),
    ]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_rope, "_kernel", emulation.emulator(tmp_path))
    monkeypatch.setattr(cuda_rope, "_plans", {})


@emulation.needs_compiler
@pytest.mark.parametrize(("name", "arguments"), cases())
@pytest.mark.usefixtures("emulated")
def test_the_source_computes_the_op(name: str, arguments: dict[str, Any]) -> None:
    """Also in place, and between other tokens of a joint result."""
    assert ROPE.problem(arguments) is None
    x = arguments["x"]
    expected = reference_outputs("norm_rope", arguments, compute=FP64)["out"]
    joint = torch.zeros(*x.shape[:-3], x.shape[-3] + 2, *x.shape[-2:], dtype=x.dtype)
    out = joint[..., 1:-1, :, :]
    cuda_rope.run(arguments, {"out": out})
    assert (out.double() - expected).norm() < LIMIT[x.dtype] * expected.norm()
    assert joint[..., :1, :, :].count_nonzero() + joint[..., -1:, :, :].count_nonzero() == 0
    cuda_rope.run(arguments, {"out": x})
    torch.testing.assert_close(x, out, rtol=0, atol=0)


@pytest.mark.skipif(not cuda_compile.has_nvrtc(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_nvrtc_builds_it(d: int, arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DKFUSE_CACHE_DIR", str(tmp_path))
    for rotation, kind in (("none", "half"), ("interleaved", "full"), ("half", "half"), ("half", "complex")):
        rope = tables(kind, d, 3, 1, rotation=rotation) if rotation != "none" else {}
        arguments = call_of(random(2, 3, 5, d), norm="layer", weight=random(d), bias=random(d), **rope)
        rows, axes = cuda_rope._rows(arguments, arguments["x"])
        settings = cuda_rope.macros(
            arguments,
            arguments["x"],
            rows,
            axes,
            dict.fromkeys((*cuda_rope.NAMES, "out"), True),
            cuda_rope.choose(rows, axes),
        )
        assert cuda_compile.cubin(cuda_rope.source(), settings, arch).startswith(b"\x7fELF")
    assert len(list(tmp_path.rglob("*.bin"))) == 4


@pytest.mark.skipif(not cuda_compile.has_nvrtc(), reason="NVRTC is not installed")
def test_what_does_not_compile_is_said_with_the_log() -> None:
    for build in (cuda_compile._cuda_core, cuda_compile._nvrtc):
        try:
            _, compiler = build()
        except (ImportError, OSError):
            continue
        with pytest.raises(RuntimeError, match="identifier"):
            compiler('extern "C" __global__ void f() { nothing; }', (), 90)


def test_without_nvrtc_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise OSError("libnvrtc.so.13 is not found")

    for name in ("_cuda_core", "_nvrtc"):
        monkeypatch.setattr(cuda_compile, name, missing)
    cuda_compile._compiler.cache_clear()
    try:
        with pytest.raises(ImportError, match="install cuda-core or nvidia-cuda-nvrtc"):
            cuda_compile.cubin("", {}, 90)
        assert not cuda_compile.has_nvrtc()
    finally:
        cuda_compile._compiler.cache_clear()


def test_no_gpu_prepares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda_rope, "cubin", None)  # calling it would fail
    cuda_rope.prepare({"x": X, "out_dtype": BF16}, {"out": X})


def test_prepare_builds_what_run_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[dict[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_rope, "_arch", lambda device: 90)
    monkeypatch.setattr(cuda_rope, "cubin", lambda source, settings, arch: built.append(settings))
    kernel = SimpleNamespace(launch=lambda *values: None)
    monkeypatch.setattr(cuda_rope, "_kernel", lambda settings, device: built.append(dict(settings)) or kernel)
    monkeypatch.setattr(cuda_rope, "_plans", {})
    arguments = call_of(X, norm="rms", weight=random(128), **HALF)
    cuda_rope.prepare(arguments, {"out": torch.empty_like(X)})
    cuda_rope.run(arguments, {"out": torch.empty_like(X)})
    assert built[0] == built[1]
