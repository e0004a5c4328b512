"""How launches are timed: on which tensors, how many, and what a failing one does. Without a GPU."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dkfuse.choosing import tuning_clock
from dkfuse.kernels import launch
from dkfuse.kernels.launch import Launch
from dkfuse.kernels.rope_launch import Call, candidates, plan_group

from .norm_plans import BF16, meta, norm_call
from .rope_plans import rope_call
from .timed_launches import run_by_filling

pytest.importorskip("triton")

CPU = torch.device("cpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Launches overwrite what they are given, on the CPU; how many sets of tensors each round rotated among."""
    rounds: list[int] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tuning_clock, "_free", lambda device: 1 << 40)
    monkeypatch.setattr(tuning_clock, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(tuning_clock, "compile_together", lambda launches, tensors: None)
    monkeypatch.setattr(tuning_clock, "run", run_by_filling(7.0))

    def once(launch: Launch, sets: Any) -> float:
        rounds.append(len(sets))
        assert len({t.data_ptr() for tensors in sets for t in tensors.values()}) == len(sets) * len(sets[0])
        for tensors in sets:
            tuning_clock.run(launch, tensors)
        return float(len(rounds))

    monkeypatch.setattr(tuning_clock, "_round", once)
    return rounds


def launches(count: int = 2) -> list[Launch]:
    call = norm_call(meta(4, 512), weight=meta(512))
    outputs = {"out": meta(4, 512)}
    return [
        launch.plan("norm_modulate", call, outputs, sm_count=132, config=c)
        for c in launch.candidates("norm_modulate", call, outputs)[:count]
    ]


def tensors() -> dict[str, torch.Tensor]:
    return {
        name: torch.ones(*size, dtype=BF16) for name, size in {"x": (4, 512), "weight": (512,), "out": (4, 512)}.items()
    }


def test_candidates_take_turns_on_cold_tensors(as_on_a_gpu: list[int]) -> None:
    found = tuning_clock.times(launches(), tensors())
    per_set = 2 * (4 * 512 * 2 + 512)
    assert set(as_on_a_gpu) == {math.ceil((1 << 16) / per_set)}
    assert len(as_on_a_gpu) == 2 * 2 * tuning_clock.ROUNDS
    # rounds are numbered from 1 and alternate: medians of 1 3 5 7 9 and 11 13 ..., of 2 4 6 8 10 and 12 14 ...
    assert found == [(5.0, 15.0), (6.0, 16.0)]


def test_nothing_of_the_callers_is_touched(as_on_a_gpu: list[int]) -> None:
    mine, state = tensors(), torch.get_rng_state()
    assert tuning_clock.times(launches(), mine) is not None
    assert all(torch.equal(t, torch.ones_like(t)) for t in mine.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_fake_tensors_will_do(as_on_a_gpu: list[int]) -> None:
    with FakeTensorMode():
        fakes = tensors()
        assert tuning_clock.times(launches(), fakes) is not None


def test_a_candidate_that_fails_is_left_out(as_on_a_gpu: list[int], monkeypatch: Any, caplog: Any) -> None:
    first, second = launches()

    def run(launch: Launch, tensors: Any) -> None:
        if launch is second:
            raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(tuning_clock, "run", run)
    with caplog.at_level(logging.DEBUG, "dkfuse"):
        found = tuning_clock.times([first, second], tensors())
    assert found is not None and all(map(math.isfinite, found[0])) and found[1] == (math.inf, math.inf)
    assert f"configuration {second.config_text} does not run: " in caplog.text and "and more" not in caplog.text


def test_too_little_memory(as_on_a_gpu: list[int], monkeypatch: Any) -> None:
    monkeypatch.setattr(tuning_clock, "_free", lambda device: 100_000)
    assert tuning_clock.times(launches(), tensors()) is None and as_on_a_gpu == []


def test_memory_that_is_gone_all_the_same(as_on_a_gpu: list[int], monkeypatch: Any) -> None:
    def copies(tensors: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning_clock, "_copies", copies)
    assert tuning_clock.times(launches(), tensors()) is None and as_on_a_gpu == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool])
def test_tensors_like_those_of_the_call(dtype: torch.dtype) -> None:
    base = torch.zeros(3, 5, 48).to(dtype)
    views = {
        "whole": base,
        "turned": base.transpose(0, 1),
        "part": base[:, :, 3:19],
        "row": base[:1, :1].expand(3, 5, 48),
        "one": base[0, 0, 1],
    }
    first = tuning_clock.like(views, torch.Generator().manual_seed(0))
    for found in (first, tuning_clock._copies(first)):
        for name, view in views.items():
            own = found[name]
            assert (own.shape, own.stride(), own.dtype) == (view.shape, view.stride(), view.dtype)
            assert own.data_ptr() % 16 == view.data_ptr() % 16 == tuning_clock.misalignment(view)
            assert own.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
        assert found["whole"].double().std() > 0.3, "random"
    assert all(torch.equal(a, b) for a, b in zip(first.values(), found.values(), strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first.values(), found.values(), strict=True))


def test_numbers_of_rows_are_of_rows_that_there_are() -> None:
    """A table may have one row; a mask chooses between two."""
    tensors = {"number": torch.full((1, 64, 1), 5), "mask": torch.zeros(1, 64, 1, dtype=torch.bool)}
    found = tuning_clock.like(tensors, torch.Generator().manual_seed(0))
    assert not found["number"].any() and 16 < found["mask"].sum() < 48


@pytest.fixture
def driver(sm90: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's front end asks a driver for up to a launch."""
    from triton.runtime import driver

    active = type(driver.active)
    monkeypatch.setattr(active, "get_current_device", lambda self: 0, raising=False)
    monkeypatch.setattr(active, "get_current_stream", lambda self, device: 0, raising=False)


def test_candidates_are_compiled_together(driver: None, caplog: pytest.LogCaptureFixture) -> None:
    """For sm90, in threads, and then found by launches; one that cannot be compiled keeps nothing from the others."""
    from dataclasses import replace

    from triton.compiler import CompilationError, CompiledKernel

    good = launches(2)
    x = meta(1, 4, 6, 32)
    call = Call(rope_call(x, 4, 1), x)
    rope = [plan_group([call], config=c) for c in candidates([call])[:1]]
    bad = replace(good[0], constants={**good[0].constants, "CHUNK": 384})  # no power of two
    for together, own in (
        ([good[0], bad, good[1]], tensors()),
        (
            rope,
            {
                n: torch.zeros(t.shape, dtype=t.dtype)
                for n, t in {**call.arguments, "out": x}.items()
                if hasattr(t, "shape")
            },
        ),
    ):
        own = {n: own[n.removeprefix("0.")] for n in together[0].tensors.values()}
        with caplog.at_level(logging.DEBUG, "dkfuse"):
            tuning_clock.compile_together(together, own)
        assert "one by one" not in caplog.text
    assert caplog.text.count("not compiled") == 1, caplog.text
    # Triton 3.8, of torch 2.14, keeps the failed compilation in a kernel's place: it is raised where that is launched.
    compiled = [k for k in good[0].kernel.device_caches[0][0].values() if isinstance(k, CompiledKernel)]
    assert {k.metadata.num_warps for k in compiled} >= {x.num_warps for x in good}
    assert len(compiled) >= 2 and all("ld.global" in k.asm["ptx"] for k in compiled)
    assert rope[0].kernel.device_caches[0][0]
    with pytest.raises(CompilationError):
        launch.run(bad, {n: tensors()[n] for n in bad.tensors.values()})


@pytest.mark.parametrize(
    "failures, cause, compiled", [(2, SystemError, True), (3, SystemError, False), (1, OSError, False)]
)
def test_what_the_parser_fails_at_beside_others_is_tried_again(
    failures: int, cause: type[Exception], compiled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    left = [cause("AST constructor recursion depth mismatch")] * failures

    def compile_it() -> str:
        if left:
            raise ValueError("at 4:4") from left.pop()
        return "kernel"

    with caplog.at_level(logging.DEBUG, "dkfuse"), tuning_clock._Compilers(1) as pool:
        future = pool.submit(compile_it)
    assert (future.exception() is None) == compiled
    assert ("recursion depth" in caplog.text) != compiled


def test_the_bench_says_which_entries_could_be_mended() -> None:
    from dkfuse.bench.tune import line

    row: dict[str, Any] = {"op": "norm_modulate", "case": "Flux", "shape": [1, 4096, 3072]}
    times = {"4 warps": [20.0, 20.1], "8 warps": [19.0, 18.9]}
    row["candidates"] = [{"config": name, "microseconds": own} for name, own in times.items()]
    assert line({**row, "taken": 1, "gain": 1.053}).endswith("1.058  4 warps  <- 8 warps, 1.05x")
    assert line({**row, "taken": 0, "gain": 1.0}).endswith("4 warps  (8 warps within the noise)")
    assert line({**row, "problem": "too little memory"}).endswith("1x4096x3072        too little memory")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_bench_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from dkfuse.bench import tune
    from dkfuse.bench.kernels import NO_GPU

    assert tune.main([]) == NO_GPU and "needs an NVIDIA GPU" in capsys.readouterr().err
