"""Launch configurations timed at compile time: what is timed, what is taken, and where it is kept."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from dkfuse import compat
from dkfuse.choosing import tuning
from dkfuse.kernels import disk_cache, launch, providers
from dkfuse.kernels.configs import CANDIDATES
from dkfuse.kernels.rope_launch import Call, plan_group
from dkfuse.kernels.rope_launch import candidates as rope_candidates

from .norm_plans import meta, norm_call
from .rope_plans import rope_call
from .timed_launches import INF, Clock, on_a_gpu

pytest.importorskip("triton")

ROW = meta(1, 1, 3072)
CALL = norm_call(meta(1, 4096, 3072), scale=ROW, shift=ROW)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Clock:
    disk_cache.use(None)
    return on_a_gpu(monkeypatch, tmp_path)


def tuned(arguments: dict[str, Any] = CALL, op: str = "norm_modulate") -> tuning.Tuned:
    outputs = {"out": torch.empty(arguments["x"].shape, dtype=torch.bfloat16, device="meta")}
    return tuning.tuned(
        lambda config: launch.plan(op, arguments, outputs, sm_count=132, config=config),
        lambda: launch.candidates(op, arguments, outputs),
        {**arguments, **outputs},
    )


def candidates() -> list[Any]:
    return launch.candidates("norm_modulate", CALL, {"out": CALL["x"]})


# -- candidates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 64, 1152, 2432, 3072, 5120, 16384])
def test_few_candidates_the_table_first(width: int) -> None:
    call = norm_call(meta(4, width))
    found = launch.candidates("norm_modulate", call, {"out": call["x"]})
    assert found[0] == launch.plan("norm_modulate", call, {"out": call["x"]}, sm_count=132).config[0]
    assert 2 <= len(found) == len(set(found)) <= CANDIDATES or width == 1
    for config in found:
        assert config.chunk & (config.chunk - 1) == 0 and config.num_warps in (1, 2, 4, 8, 16)
        assert width <= config.chunk * config.chunks < width + config.chunk


@pytest.mark.parametrize("heads", [1, 12, 24, 40])
@pytest.mark.parametrize("across", [None, 2])
def test_candidates_of_a_group(heads: int, across: int | None) -> None:
    x, text = meta(1, 64, heads, 128), meta(1, 8, heads, 128)
    calls = [Call(rope_call(t, t.shape[1], 1, across=across), t) for t in (x, text, x)]
    found = rope_candidates(calls)
    assert found[0] == plan_group(calls).config
    assert 2 <= len(found) == len(set(found)) <= CANDIDATES
    for configs in found:
        assert len({c.num_warps for c in configs}) == 1 and len(configs) == 3
        assert plan_group(calls, config=configs).config == configs
        assert all(not across or c.rows * c.blocks >= heads for c in configs)


# -- the choice --------------------------------------------------------------------------------------------------------


def test_the_fastest_is_taken(clock: Clock) -> None:
    clock.of = {2: (90.0, 95.0), 3: (80.0, 85.0)}
    best = tuned()
    assert best.launch.config == (candidates()[3],) and best.gain == pytest.approx(100 / 85, abs=1e-3)
    assert best.launch.num_warps == candidates()[3].num_warps
    assert best.launch.constants["CHUNK"] == candidates()[3].chunk
    assert [x.config[0] for x in clock.series[0]] == candidates()


@pytest.mark.parametrize(
    "times",
    [
        {},  # all alike
        {1: (98.5, 98.5)},  # within the noise
        {1: (60.0, 99.0)},  # in one series only
        {1: (INF, INF), 2: (50.0, INF)},  # failed
    ],
)
def test_the_table_stays(clock: Clock, times: dict[int, tuple[float, float]]) -> None:
    clock.of = times
    best = tuned()
    assert best.launch.config == (candidates()[0],) and best.gain == 1.0


def test_a_table_that_fails_is_replaced(clock: Clock) -> None:
    clock.of = {0: (INF, INF), 2: (90.0, 90.0)}
    best = tuned()
    assert best.launch.config == (candidates()[2],) and best.gain == 1.0


def test_without_a_candidate_that_runs_nothing_is_kept(clock: Clock, tmp_path: Any) -> None:
    clock.of = dict.fromkeys(range(CANDIDATES), (INF, INF))
    assert [tuned().launch.config, tuned().gain] == [(candidates()[0],), None]
    assert len(clock.series) == 1, "what fails is not tried for every site"
    assert not disk_cache.contents()["launches"]


def test_too_little_memory_is_not_remembered(clock: Clock) -> None:
    clock.memory, clock.of = False, {1: (50.0, 50.0)}
    assert tuned().gain is None and not disk_cache.contents()["launches"]
    clock.memory = True
    assert tuned().gain == 2.0


def test_nothing_is_timed_unasked(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "autotunes_pointwise", lambda: False)
    assert tuned().gain is None and clock.series == []


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, False),
        ({"max_autotune": True}, True),
        ({"max_autotune_pointwise": True}, True),
        ({"max_autotune_gemm": True}, False),
        ({"max_autotune": True, "deterministic": True}, False),
    ],
)
def test_inductor_is_asked(options: dict[str, bool], asked: bool) -> None:
    import torch._inductor.config as config

    with config.patch(options):
        assert compat.autotunes_pointwise() is asked
        inside = compat.modes({})
    outside = compat.modes({})
    assert inside == compat.modes(options)
    assert (inside != outside) is bool(options.keys() & {*compat.TIMING})


def test_nothing_is_timed_without_a_gpu() -> None:
    assert not torch.cuda.is_available() and not tuning.on_gpu({"x": CALL["x"]})
    assert not tuning.on_gpu({"x": torch.empty(2)})


def test_failures_are_logged_for_the_curious(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    clock.of = {1: (50.0, 50.0)}
    with caplog.at_level(logging.DEBUG, "dkfuse"):
        tuned()
    assert "dkfuse_norm_modulate timed" in caplog.text and f"taken: {candidates()[1]}" in caplog.text


# -- where it is kept --------------------------------------------------------------------------------------------------


def test_one_timing_for_each_distinct_call(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.of = {1: (50.0, 50.0)}
    assert [tuned().gain for _ in range(3)] == [2.0] * 3 and len(clock.series) == 1
    monkeypatch.setattr(tuning, "_known", {})  # another process
    best = tuned()
    assert (best.gain, best.launch.config) == (2.0, (candidates()[1],)) and len(clock.series) == 1
    (file,) = disk_cache.contents()["launches"]
    assert b"num_warps" in file.read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        norm_call(meta(1, 4096, 3072), scale=ROW),
        norm_call(meta(1, 4095, 3072), scale=ROW, shift=ROW),
        norm_call(meta(1, 4096, 6144)[..., :3072], scale=ROW, shift=ROW),
        norm_call(meta(1, 4096, 3080)[..., 3:3075], scale=ROW, shift=ROW),  # not aligned
        norm_call(meta(1, 4096, 3072, dtype=torch.float32), scale=ROW, shift=ROW),
        norm_call(meta(1, 4096, 3072), scale=ROW, shift=meta(1, 4096, 3072)),
        norm_call(meta(1, 4096, 3072), scale=ROW, shift=ROW, norm="rms"),
    ],
)
def test_another_call_is_timed_for_itself(clock: Clock, other: dict[str, Any]) -> None:
    tuned()
    tuned(other)
    assert len(clock.series) == 2


@pytest.mark.parametrize("what", ["gpu", "triton", "torch", "candidates"])
def test_another_machine_is_timed_anew(clock: Clock, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    tuned()
    monkeypatch.setattr(tuning, "_known", {})
    if what == "triton":
        # under any of its names, of which ROCm's build has one
        monkeypatch.setattr(providers, "installed", lambda *names: "99" if "pytorch-triton-rocm" in names else None)
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "99")
    elif what == "gpu":
        monkeypatch.setattr(compat, "environment_fingerprint", lambda: "another GPU")
    else:
        all_of = launch.configs.candidates
        monkeypatch.setattr(launch.configs, "candidates", lambda *given: all_of(*given)[:2])
    tuned()
    assert len(clock.series) == 2


def test_a_broken_file_is_timed_anew(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.of = {1: (50.0, 50.0)}
    tuned()
    (file,) = disk_cache.contents()["launches"]
    whole = file.read_bytes()
    for data in (b"", b"{", whole[:-1], whole.replace(b"2.0", b"9.0")):
        file.write_bytes(data)
        monkeypatch.setattr(tuning, "_known", {})
        assert tuned().gain == 2.0
        assert file.read_bytes() == whole
    assert len(clock.series) == 5


@pytest.mark.parametrize("text", [b"[]", b"3", b'{"gain": 1.5}', b'{"config": "Config(no such)", "gain": 1.5}'])
def test_a_file_of_something_else_is_timed_anew(clock: Clock, monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    keys = []
    put = disk_cache.put
    monkeypatch.setattr(disk_cache, "put", lambda key, data, kind: keys.append(key) or put(key, data, kind))
    tuned()
    put(keys[0], text, tuning.KIND)
    monkeypatch.setattr(tuning, "_known", {})
    assert tuned().gain == 1.0 and len(clock.series) == 2


def test_a_folder_that_cannot_be_written_is_no_error(clock: Clock, monkeypatch: Any, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DKFUSE_CACHE_DIR", str(tmp_path / "file"))
    clock.of = {1: (50.0, 50.0)}
    assert [tuned().gain, tuned().gain] == [2.0, 2.0] and len(clock.series) == 1
