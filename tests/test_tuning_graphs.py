"""Timed launch configurations in graphs, as Inductor gets them, and in reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dkfuse import compat
from dkfuse.kernels import disk_cache, launch

from . import test_lower, test_lower_heads
from .timed_launches import SLOW, Clock, configured, on_a_gpu

pytest.importorskip("triton")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Clock:
    disk_cache.use(None)
    return on_a_gpu(monkeypatch, tmp_path)


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
    from dkfuse.reporting.render import render
    from dkfuse.reporting.report import Coverage
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
