"""Launch configurations timed at compile time: what is timed, what is taken, and where it is kept."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dkfuse import compat, tuning
from dkfuse.kernels import disk_cache, launch
from dkfuse.kernels.configs import CANDIDATES
from dkfuse.kernels.rope_launch import Call, plan_group
from dkfuse.kernels.rope_launch import candidates as rope_candidates

from . import test_lower, test_lower_heads
from .norm_plans import meta, norm_call
from .rope_plans import rope_call
from .timed_launches import INF, SLOW, Clock, configured, on_a_gpu

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
        assert (
            any(compat.asked_to_time({}))
            == any(compat.asked_to_time(options))
            == bool(options.keys() & {*compat.TIMING})
        )


def test_nothing_is_timed_without_a_gpu() -> None:
    assert not torch.cuda.is_available() and not tuning.on_gpu({"x": CALL["x"]})
    assert not tuning.on_gpu({"x": torch.empty(2)})


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
        monkeypatch.setattr(tuning, "_triton", lambda: "99")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "99")
    elif what == "gpu":
        monkeypatch.setattr(compat, "environment_fingerprint", lambda: "another GPU")
    else:
        all_of = launch.configs.candidates
        monkeypatch.setattr(launch.configs, "candidates", lambda width: all_of(width)[:2])
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


# -- in graphs ---------------------------------------------------------------------------------------------------------


def test_the_kernel_node_has_what_was_taken(clock: Clock) -> None:
    clock.of = {2: (50.0, 50.0)}
    d = 1536
    x, s = torch.randn(2, 5, d, dtype=torch.bfloat16), torch.randn(2, d, dtype=torch.bfloat16)

    def model(x: Any, s: Any, t: Any) -> Any:
        for _ in range(3):  # the same launch three times
            x = F.layer_norm(x, (d,)) * (1 + s[:, None]) + t[:, None]
            x = x @ x.mT @ x
        return x

    nodes = test_lower.kernels(test_lower.lowered(model, x, s, s))
    taken = launch.configs.candidates(d)[2]
    assert len(nodes) == 3 and len(clock.series) == 1
    for node in nodes:
        warps, constants, _ = configured(node)
        assert (warps, constants["CHUNK"], constants["CHUNKS"]) == (taken.num_warps, taken.chunk, taken.chunks)
    assert taken != launch.configs.choose(d)


def test_sizes_that_are_symbols_are_not_timed(clock: Clock) -> None:
    d = 64
    x, s = torch.randn(2, 5, d, dtype=torch.bfloat16), torch.randn(2, d, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 1)
    graph = test_lower.lowered(
        lambda x, s, w: test_lower.modulate(x, s, s) @ w, x, s, torch.randn(d, d).to(x), dynamic=None
    )
    assert len(test_lower.kernels(graph)) == 1 and clock.series == []


def test_parts_of_a_joint_tensor_are_timed_in_memory_of_its_size(clock: Clock) -> None:
    d = test_lower.D
    a, b, s = (torch.randn(*size, dtype=torch.bfloat16) for size in ((2, 3, d), (2, 5, d), (2, d)))

    def joint(a: Any, b: Any, s: Any) -> Any:
        return torch.cat([test_lower.modulate(a, s, s), test_lower.modulate(b, s, s)], 1)

    test_lower.lowered(joint, a, b, s)
    assert [tuple(tensors["out"].shape) for tensors in clock.tensors] == [(2, 8, d)] * 2


def heads_lowered(monkeypatch: pytest.MonkeyPatch, function: Any, *inputs: Any) -> Any:
    monkeypatch.setattr(test_lower_heads.lower, "_device", lambda call: torch.device("cuda"))
    return test_lower_heads.lowered(function, *inputs)


def test_a_group_is_timed_as_one_launch(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.of = {1: (50.0, 50.0)}
    h = test_lower_heads
    inputs = (h.random(1, h.IMAGE, h.D), h.random(1, h.TEXT, h.D), *h.weights(), h.random(h.WIDTH))
    graph = heads_lowered(monkeypatch, h.normed_then_joined, *inputs, *h.tables(h.TEXT + h.IMAGE))
    (node,) = h.launches(graph)
    (series,) = clock.series
    assert all(x.kernel.fn.__name__ == "dkfuse_norm_rope_x4" for x in series)
    warps, _, source = configured(node)
    assert source == series[1].kernel.src != series[0].kernel.src and warps == series[1].num_warps
    whole = (1, h.TEXT + h.IMAGE, h.HEADS, h.WIDTH)
    assert [sorted(t.shape) for n, t in clock.tensors[0].items() if n.endswith("out")] == [sorted(whole)] * 2


def test_in_place_launches_are_timed_on_other_tensors(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    h = test_lower_heads
    graph = heads_lowered(monkeypatch, h.single, h.random(1, h.IMAGE, h.D), *h.weights(), *h.tables(h.IMAGE))
    (node,) = h.launches(graph)
    assert node.kwargs["tensors_to_clone"] == ["x_0", "x_1"]
    (names,) = map(set, clock.tensors)
    assert {"0.x", "1.x"} <= names and not names & {"0.out", "1.out"}
    assert all(compat.is_fake(t) for t in clock.tensors[0].values()), "shapes, and no memory to be written to"


# -- in reports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [None, 1.0, 1.25])
def test_the_report_says_who_chose(clock: Clock, monkeypatch: pytest.MonkeyPatch, gain: float | None) -> None:
    from dkfuse import fuse
    from dkfuse.render import render
    from dkfuse.report import Coverage
    from dkfuse.settings import Settings

    clock.of = {1: (SLOW / (gain or 2.0), SLOW / (gain or 2.0))}
    monkeypatch.setattr(compat, "autotunes_pointwise", lambda: gain is not None)
    monkeypatch.setattr(test_lower_heads.lower, "_device", lambda call: torch.device("cuda"))
    records = []

    def backend(gm: Any, inputs: Any) -> Any:
        def inner(module: Any, _: Any) -> Any:
            records.append(fuse.run(module.graph, Settings(target="sm90")))
            return lambda *args: tuple(torch.empty(()) for _ in module.graph.output_node().args[0])

        return compat.lower_with(gm, inputs, inner, {})

    d = test_lower.D
    x, s, w = test_lower.inputs((2, 5, d), (2, d), (d, d))
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(lambda x, s, w: test_lower.modulate(x, s, s) @ w, backend=backend)(x, s, w)
    coverage = Coverage(graphs=records)
    (site,) = coverage.fused()
    number = 1 if gain == 1.25 else 0
    assert site.config == str(launch.configs.candidates(d)[number])
    assert (site.config_by, site.config_gain) == ("table" if gain is None else "timing", gain)
    assert Coverage.from_json(coverage.to_json()).fused() == [site]
    text, page = str(coverage), render(coverage, "html")
    assert ("with a timed launch configuration" in text) == (gain is not None)
    assert ("1 faster than with the table's, by up to 25%" in text) == (gain == 1.25)
    assert site.config in page and ("1.25x the table's speed" in page) == (gain == 1.25)


def test_timed_graphs_have_records_of_their_own(tmp_path: Any, monkeypatch: Any, fresh_compiler: None) -> None:
    """A warm start without max-autotune must not report what was timed."""
    from dkfuse import backend

    seen = []
    record = backend.Record
    monkeypatch.setattr(backend, "Record", lambda key, folder: seen.append(key) or record(key, folder))
    for options in ({}, {"max_autotune_pointwise": True}, {}):
        torch.compiler.reset()
        with torch.no_grad():
            torch.compile(torch.sin, backend="dkfuse", options={"dkfuse.cache_dir": str(tmp_path), **options})(
                torch.ones(3)
            )
    disk_cache.use(None)
    assert seen[0] == seen[2] != seen[1]


def test_failures_are_logged_for_the_curious(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    clock.of = {1: (50.0, 50.0)}
    with caplog.at_level(logging.DEBUG, "dkfuse"):
        tuned()
    assert "dkfuse_norm_modulate timed" in caplog.text and f"taken: {candidates()[1]}" in caplog.text
