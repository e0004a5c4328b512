"""Which of quack's kernels helpers compile, when they are started, and what becomes of a kernel that fails late."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode

import dkfuse
from dkfuse import Settings, backend
from dkfuse.kernels import compile_ahead, cute_ahead, disk_cache, gemm_ahead, gemm_quack, shared_library
from dkfuse.kernels.compile_ahead import Pool
from dkfuse.kernels.gemm_ahead import Kind
from dkfuse.seams import early, gemm_choice, gemm_measure, late
from dkfuse.seams.gemm_measure import Product

from .conftest import ROOT
from .gemms import install, on_gpu, rewritten
from .harness import BF16, spell

KIND = Kind("bfloat16", "none", True, "128x192")
PRODUCT = Product(4096, 9216, 3072, "none", True, BF16, torch.device("cuda:0"))


class Recorder(Pool):
    """A pool whose helpers never come."""

    def start(self, modules: Any, environment: Any) -> None:
        assert set(cute_ahead.QUACK_MODULES) <= set(modules) and environment["CUTE_DSL_ARCH"] == "sm_90a"
        self.started += 1


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Recorder]:
    """Helpers may be used: quack is installed, there are processors, and folders of their own."""
    found = Recorder()
    install(monkeypatch)
    monkeypatch.setattr(compile_ahead, "POOL", found)
    monkeypatch.setattr(cute_ahead, "import_meanwhile", lambda: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    disk_cache.use(str(tmp_path / "dkfuse"))
    with config.patch(compile_threads=8):
        yield found
    disk_cache.use(None)


# -- where helpers are used --------------------------------------------------------------------------------------------


def test_where_helpers_may_compile(pool: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gemm_ahead.usable() and gemm_ahead.submit(KIND) and pool.started == 1
    with config.patch(compile_threads=1):
        assert not gemm_ahead.usable() and not gemm_ahead.submit(Kind("float16", "none", True, "128x192"))
    with monkeypatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
        assert not gemm_ahead.usable()
    for name, value in (("frozen", True), ("executable", None)):  # the interpreter is the user's program, or unknown
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, value, raising=False)
            assert not gemm_ahead.usable()
    for version in (None, "0.7.0"):
        with monkeypatch.context() as patch:
            install(patch, version)
            assert not gemm_ahead.usable()
    with monkeypatch.context() as patch:
        (tmp_path / "file").touch()
        patch.setattr(disk_cache, "_chosen", [str(tmp_path / "file" / "folder")])
        assert not gemm_ahead.usable(), "nothing can be left there"
    assert gemm_ahead.job(KIND)[-1] == str(tmp_path / "dkfuse")
    pool.give_up("a helper died")
    assert not gemm_ahead.usable() and gemm_ahead.wait(KIND) is None
    assert pool.started == 1


def kept(monkeypatch: pytest.MonkeyPatch, *kinds: Kind) -> None:
    """These are on disk."""
    there = {gemm_ahead._parts(kind) for kind in kinds}
    monkeypatch.setattr(shared_library, "there", there.__contains__)


def test_a_kernel_that_is_on_disk_needs_no_helper(pool: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as disk:
        kept(disk, KIND)
        assert gemm_ahead.on_disk(KIND) and not gemm_ahead.submit(KIND) and pool.started == 0
        assert not gemm_ahead.on_disk(Kind("bfloat16", "none", False, "128x192"))
        with disk.context() as patch:
            patch.setattr(gemm_ahead, "installed", lambda name: "another")
            assert not gemm_ahead.on_disk(KIND)
        with disk.context() as patch:
            install(patch, "0.5.3")
            assert not gemm_ahead.on_disk(KIND)
    assert not gemm_ahead.on_disk(KIND) and gemm_ahead.submit(KIND) and pool.started == 1


class Compiled:
    """A kernel of the CuTe DSL's."""

    def export_to_c(self, object_file_path: str, function_name: str) -> None:
        Path(object_file_path).write_bytes(b"machine code of " + function_name.encode())


def test_a_kernel_and_its_calls_are_kept(pool: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    entries: dict[tuple[str, ...], Any] = {}

    def put(parts: tuple[str, ...], object_file: Any, form: Any) -> None:
        entries[parts] = object_file(), json.loads(json.dumps(form))

    monkeypatch.setattr(shared_library, "put", put)
    monkeypatch.setattr(shared_library, "get", entries.get)
    assert gemm_ahead.kept(KIND) is None
    form = gemm_quack.Form(7, 2, (None, None, 8), 0)
    gemm_ahead.keep(KIND, Compiled(), form)
    function, found = gemm_ahead.kept(KIND) or (None, None)
    assert function == b"machine code of func" and found == form


# -- started early -----------------------------------------------------------------------------------------------------


def mlp(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w, b), approximate="tanh"), v)


def traced(*shapes: tuple[int, ...], function: Any = mlp) -> fx.GraphModule:
    """`function` as Dynamo gives it to a backend, on a GPU; while torch still knows that there may be none."""
    module = fx.symbolic_trace(function)
    with FakeTensorMode() as mode:
        values = [torch.empty(shape, device="cuda", dtype=BF16) for shape in shapes]

        class Noting(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                node.meta["example_value"] = super().run_node(node)
                return node.meta["example_value"]

        with mode:
            Noting(module).run(*values)
    return module


LARGE = [(1, 4096, 3072), (12288, 3072), (12288,), (3072, 12288)]
SMALL = [(1, 64, 3072), (12288, 3072), (12288,), (3072, 12288)]


@pytest.mark.parametrize(
    ("shapes", "settings", "started"),
    [
        (LARGE, {}, True),
        (LARGE, {"gemm": "quack"}, True),
        (LARGE, {"gemm": "cublas"}, False),
        (LARGE, {"rules": ("-gemm_kernel",)}, False),
        (LARGE, {"target": "sm80"}, False),
        (SMALL, {}, False),
    ],
)
def test_started_for_linears_that_quack_is_faster_at(
    pool: Recorder, monkeypatch: pytest.MonkeyPatch, shapes: Any, settings: dict[str, Any], started: bool
) -> None:
    module = traced(*shapes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gemm_measure, "times", lambda *_: pytest.fail("nothing is timed that early"))
    early.start(module, Settings(**{"target": "sm90", **settings}))
    assert bool(pool.started) == started
    assert ("gelu", True) in [job[2:4] for job in pool.jobs] or not started
    assert settings.get("gemm") != "quack" or ("none", False) in [job[2:4] for job in pool.jobs]
    assert bool(pool.jobs) == started


def test_not_started_where_their_kernels_are_on_disk(pool: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    module = traced(*LARGE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    acts = ("gelu", True), ("none", False)
    kept(monkeypatch, *(Kind("bfloat16", *act, tiles) for act in acts for tiles in gemm_choice.TILES))
    early.start(module, Settings(target="sm90"))
    assert pool.started == 0


def test_odd_linears(pool: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = (
        (lambda x, w: F.linear(x, w), [(4096, 3072), (3072,)], 0),
        (lambda x, w: F.linear(x, w), [(3072,), (9216, 3072)], 0),
        (lambda x, w: F.linear(x, w), [(0, 3072), (9216, 3072)], 0),
        (lambda x, w, b: F.linear(x, bias=b, weight=w), [(4096, 3072), (9216, 3072), (9216,)], 1),
    )
    modules = [(traced(*shapes, function=function), started) for function, shapes, started in odd]
    module = traced(*LARGE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for each, started in modules:
        early.start(each, Settings(target="sm90"))
        assert bool(pool.started) == started
    before = pool.started
    for node in module.graph.nodes:
        node.meta.clear()
    early.start(module, Settings(target="sm90"))
    assert pool.started == before


def test_what_may_be_packed_is_not_compiled_yet(pool: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tiles the product of all of them takes is not known; that the helper will be needed is."""

    def projections(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, w), F.linear(x, v)

    module = traced((4096, 3072), (9216, 3072), (9216, 3072), function=projections)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    early.start(module, Settings(target="sm90"))
    assert pool.started == 1 and not pool.jobs


def test_without_a_gpu_nothing_is_started(pool: Recorder) -> None:
    early.start(traced(*LARGE), Settings(target="sm90"))
    assert pool.started == 0


# -- tried late --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(pool: Recorder, monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What trying a kernel comes to, by its tiles; and a list of what was tried, under "order"."""
    found: dict[str, Any] = {"order": []}

    def trying(product: Product, tiles: str) -> str | None:
        found["order"].append(tiles)
        return found.get(tiles)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gemm_measure, "_failures", {})
    monkeypatch.setattr(gemm_measure, "_tried", trying)
    return found


def test_what_helpers_compile_is_tried_at_the_end(tried: dict[str, Any]) -> None:
    with late.deferred() as later:
        for tiles in ("128x192", "128x160", "128x192"):
            assert gemm_measure.failure(PRODUCT, tiles) is None
        assert tried["order"] == []
    tried["128x160"] = "its result is wrong"
    assert late.failed(later) and tried["order"] == ["128x160", "128x192"], "the last first"
    with late.deferred() as later:
        assert gemm_measure.failure(PRODUCT, "128x160") == "its result is wrong"
        assert gemm_measure.failure(PRODUCT, "128x192") is None
    assert not late.failed(later) and len(tried["order"]) == 2


def test_a_trial_without_memory_says_nothing_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def operands(_: Product) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gemm_measure, "_operands", operands)
    assert gemm_measure._tried(PRODUCT, "128x192") is None


def test_without_helpers_it_is_tried_at_once(tried: dict[str, Any], pool: Recorder) -> None:
    with config.patch(compile_threads=1), late.deferred() as later:
        assert gemm_measure.failure(PRODUCT, "128x192") is None and tried["order"] == ["128x192"]
    assert later == {} and pool.started == 0


def test_outside_of_a_compilation_it_is_tried_at_once(tried: dict[str, Any], pool: Recorder) -> None:
    tried["128x192"] = "no"
    assert gemm_measure.failure(PRODUCT, "128x192") == "no" and pool.started == 0


def test_what_is_to_be_timed_is_asked_for_before_the_first_is(
    pool: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[set[tuple[str, str]]] = []

    def timed(product: Product, names: list[str]) -> dict[str, float]:
        asked.append({(job[2], job[4]) for job in pool.jobs})
        return dict.fromkeys(names, 1.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gemm_measure.compat, "environment_fingerprint", lambda: "here")
    monkeypatch.setattr(gemm_measure, "_failures", {})
    monkeypatch.setattr(gemm_measure, "_known", {})
    monkeypatch.setattr(gemm_measure, "timed", timed)
    inductor = gemm_choice.compat.inductor_config
    monkeypatch.setattr(gemm_choice.compat, "inductor_config", lambda name: name == "max_autotune" or inductor(name))
    module = on_gpu(mlp, *((4096, 3072), *LARGE[1:]))
    rewritten(module, gemm="auto")
    acts = {act for act, _ in asked[0]}
    assert acts == {"none", "gelu"} and {tiles for _, tiles in asked[0]} == set(gemm_choice.TILES)
    before = dict(pool.jobs)
    rewritten(on_gpu(mlp, *((4096, 3072), *LARGE[1:])), gemm="auto")
    assert len(asked) == 2 and pool.jobs == before, "times that are known need no kernel"


@pytest.mark.usefixtures("fresh_compiler")
def test_a_kernel_that_fails_late_is_left_out(pool: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is compiled again without it, and what was compiled with it is not found in a cache."""
    known: dict[str, str] = {}
    rounds: list[bool] = []

    def failed(later: dict[Any, Any]) -> bool:
        rounds.append(bool(known))
        first = not known
        known["128x192"] = "its result is wrong"
        return first

    monkeypatch.setattr(gemm_measure, "failure", lambda product, tiles: known.get("128x192"))
    monkeypatch.setattr(late, "failed", failed)
    forgotten: list[str] = []
    forget = backend.Record.forget
    monkeypatch.setattr(backend.Record, "forget", lambda self: forgotten.append(self.token) or forget(self))
    args = spell("x:BLI w:QI b:Q")
    with dkfuse.record() as coverage, torch.no_grad():
        options = {"dkfuse.target": "sm90", "dkfuse.gemm": "quack"}
        found = torch.compile(F.linear, backend="dkfuse", dynamic=False, options=options)(*args)
    torch.testing.assert_close(found, F.linear(*args), rtol=2e-2, atol=2e-2)
    (site,) = [s for s in coverage.seams if s.family == "gemm_kernel"]
    assert site.reason.code == "kernel_failed" and "its result is wrong" in site.reason.message
    assert rounds == [False, True] and len(forgotten) == 1 and len(coverage.graphs) == 1


# -- the real thing ----------------------------------------------------------------------------------------------------


WITHOUT_QUACK = """
    import sys, torch
    from dkfuse.kernels import gemm_ahead, disk_cache
    disk_cache.use(sys.argv[1])
    kernel, form = gemm_ahead.kept(gemm_ahead.Kind("float16", "none", True, "128x160"))
    try:
        kernel(torch.ones(2, 2), None)
    except TypeError as error:
        print(str(error)[:30])
    print([name for name in sys.modules if name.split(".")[0] in ("quack", "cutlass")])
"""


@pytest.mark.slow
@config.patch(compile_threads=8)
def test_what_a_helper_compiled_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For a GPU that need not be there: the parent loads it and compiles nothing, a later process imports nothing."""
    pytest.importorskip("quack")
    monkeypatch.setenv("QUACK_ARCH", "sm_90a")
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    monkeypatch.setattr(compile_ahead, "POOL", pool := Pool())
    disk_cache.use(str(tmp_path))
    for act, bias in (("silu_second", False), ("none", True)):
        kind = Kind("float16", act, bias, "128x160")
        assert gemm_ahead.submit(kind)
        job = gemm_ahead.job(kind)
        while not (pool.jobs[job].running() or pool.jobs[job].done()):
            time.sleep(0.05)
        with monkeypatch.context() as patch:
            patch.setattr(gemm_quack, "asked", lambda *_: pytest.fail("it is compiled here"))
            kernel, form = gemm_quack.compiled(torch.float16, act, bias, "128x160", (9, 0))
        assert pool.finished()[job].error is None and gemm_ahead.on_disk(kind) and not gemm_ahead.submit(kind)
        assert form == gemm_quack.Form.of(act)
        with pytest.raises(TypeError, match="Expects 7 parameters"):
            kernel()
    disk_cache.use(None)
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_QUACK), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["Expects 7 parameters when call", "[]"], done.stderr
    pool.give_up("the test is over")
    pool.kill()
