"""When the helper is started and packages written in CuTe DSL are imported, before a kernel is known to need them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode

import dkfuse
from dkfuse import Settings
from dkfuse.kernels import (
    attention_kept,
    attention_kernels,
    compile_ahead,
    cute_ahead,
    disk_cache,
    gemm_ahead,
    gemm_kernels,
    gemm_quack,
    shared_library,
)
from dkfuse.kernels.compile_ahead import Pool
from dkfuse.kernels.gemm_kernels import TILES
from dkfuse.seams import before, early
from dkfuse.seams.gemm_table import TABLE

from .conftest import ROOT
from .gemms import install
from .harness import BF16


class Recorder(Pool):
    """A pool whose helper never comes."""

    def start(self, modules: Any, environment: Any) -> None:
        self.started += 1
        self.modules = tuple(modules)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Recorder]:
    """quack and FlashAttention 4 are installed, on a machine with an H100 that CUDA was started on."""
    found = Recorder()
    version = attention_kernels.version_of
    install(monkeypatch)
    monkeypatch.setattr(compile_ahead, "POOL", found)
    monkeypatch.setattr(cute_ahead, "_thread", [])
    monkeypatch.setattr(attention_kernels, "version_of", lambda name: "4.0.0b20" if name == "fa4" else version(name))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    disk_cache.use(str(tmp_path / "dkfuse"))
    with config.patch(compile_threads=8, worker_start_method="subprocess"):
        yield found
    disk_cache.use(None)


def with_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), started: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


# -- before anything is known ------------------------------------------------------------------------------------------


def test_started_where_nothing_was_compiled_yet(pool: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, started in (((9, 0), False), ((8, 0), True), ((10, 0), True)):
        with_a_gpu(monkeypatch, capability, started)
        cute_ahead.start_if_new()
        assert pool.started == 0
    with_a_gpu(monkeypatch)
    with config.patch(compile_threads=1):
        cute_ahead.start_if_new()
    before.start_if_new(Settings(gemm="cublas", attention="torch"))
    assert pool.started == 0
    before.start_if_new(Settings(gemm="cublas"))
    before.start_if_new(Settings(attention="torch"))
    cute_ahead.start_if_new()
    assert pool.started == 3 and pool.modules == (
        "dkfuse.kernels.cute_helper",
        *cute_ahead.QUACK_MODULES,
        *cute_ahead.FA4_MODULES,
    )
    disk_cache.put(("a kernel",), b"of another compilation")
    cute_ahead.start_if_new()
    assert pool.started == 3


def guessed(pool: Pool, settings: Settings) -> list[tuple[object, ...]]:
    """The kinds that the helper is given to compile while it has nothing to do, without their folders."""
    pool._reset()
    before.start_if_new(settings)
    assert pool.jobs == {}
    return [job[1:-1] for job in pool._guessed]


def test_kernels_that_are_likely_are_compiled_before_they_are_asked_for(
    pool: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_a_gpu(monkeypatch)
    linear, attention = ("bfloat16", "none", True, "128x192"), ("bfloat16", 128, 1, False, False)
    gelu, *gated = ("bfloat16", "gelu", True, "128x192"), *(("bfloat16", "silu_first", False, t) for t in TILES)
    assert guessed(pool, Settings()) == [], "no processor is left"
    pool.guesses = 1
    assert set(guessed(pool, Settings())) == {linear, attention, gelu, *gated} and len(pool._guessed) == 5
    assert guessed(pool, Settings(gemm="cublas")) == [attention]
    assert set(guessed(pool, Settings(attention="torch"))) == {linear, gelu, *gated}
    assert set(guessed(pool, Settings(rules=("-swiglu_epilogue",)))) == {linear, attention, gelu}
    assert set(guessed(pool, Settings(rules=("-gemm_kernel", "-attention")))) == set(gated)
    with monkeypatch.context() as patch:
        install(patch, "0.7.0")
        assert guessed(pool, Settings()) == [attention]
    disk_cache.put(("a kernel",), b"of another compilation")
    assert guessed(pool, Settings()) == []


def test_likely_kernels_are_some_that_tables_give(pool: Recorder) -> None:
    """Each is what the choice would ask for at some product or attention."""
    asked = {(row.act, tiles) for row in TABLE for tiles in row.gains}
    for rule, library, kind in before.LIKELY:
        assert rule in dkfuse.seams.NAMES
        if library is gemm_ahead:
            assert (kind.act.partition("_")[0], kind.tiles) in asked and kind.act in gemm_kernels.ACTIVATIONS
            assert not (kind.bias and kind.act in gemm_kernels.GATED)


def test_only_what_is_installed_is_imported(pool: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "version_of", lambda name: None)
    assert cute_ahead.modules() == cute_ahead.QUACK_MODULES
    install(monkeypatch, "0.7.0")
    assert cute_ahead.modules() == ()
    with_a_gpu(monkeypatch)
    cute_ahead.start_if_new()
    assert pool.started == 0


def test_importing_the_backend_starts_no_cuda() -> None:
    code = "import dkfuse.backend, torch; from dkfuse.kernels.compile_ahead import POOL; print(POOL.started)\n"
    code += "assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


AT_COMPILE = """
    import sys, torch
    from dkfuse.kernels import attention_kernels, compile_ahead, gemm_kernels
    gemm_kernels.version = lambda: "0.6.1"
    attention_kernels.version_of = lambda name: None
    compile_ahead.allowed = lambda: True
    compile_ahead.POOL.start = lambda modules, environment: print("started", *modules)
    torch.cuda.is_initialized = lambda: True
    torch.cuda.get_device_capability = lambda: (9, 0)
    assert "dkfuse.backend" not in sys.modules
    torch.compile(torch.nn.Linear(8, 8), backend="dkfuse")
    print("nothing was called")
"""


def test_started_by_torch_compile_before_the_first_call(tmp_path: Path) -> None:
    environment = {**os.environ, "DKFUSE_CACHE_DIR": str(tmp_path / "new")}
    command = [sys.executable, "-c", textwrap.dedent(AT_COMPILE)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "started dkfuse.kernels.cute_helper quack.gemm quack.gemm_act",
        "nothing was called",
    ], done.stderr


@pytest.mark.parametrize(
    ("asked", "started"),
    [
        ({}, True),
        ({"DKFUSE_GEMM": "cublas"}, True),  # for attention
        ({"DKFUSE_GEMM": "cublas", "DKFUSE_ATTENTION": "torch"}, False),
        ({"DKFUSE_DISABLE": "1"}, False),
        ({"DKFUSE_REMAINDER": "eager"}, False),
        ({"DKFUSE_GEMM": "no such"}, False),  # which the first call says
    ],
)
def test_what_the_environment_asks_for(
    pool: Recorder, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], started: bool
) -> None:
    with_a_gpu(monkeypatch)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    before.start_by_environment()
    assert pool.started == int(started)


IN_THE_HELPER = """
    import inspect, sys
    import dkfuse.kernels.cute_helper
    import torch

    @torch.compiler.disable
    def first():
        return 1

    @torch.compiler.disable(recursive=False)
    def second():
        return inspect.getframeinfo(inspect.currentframe())

    print(first(), second().function, second().code_context, second().lineno)
    print("torch._dynamo" in sys.modules)
"""


def test_the_helper_does_without_dynamo() -> None:
    command = [sys.executable, "-c", textwrap.dedent(IN_THE_HELPER)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["1 second None 12", "False"], done.stderr


# -- by Dynamo's graph -------------------------------------------------------------------------------------------------


def attention(
    heads: int = 24, tokens: int = 4608, width: int = 128, causal: bool = False, masked: bool = False
) -> fx.GraphModule:
    """One attention as Dynamo gives it to a backend, on a GPU."""

    def plain(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def with_mask(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    module = fx.symbolic_trace(with_mask if masked else plain)
    with FakeTensorMode():
        q = torch.empty(1, heads, tokens, width, dtype=BF16, device="cuda")
        mask = torch.empty(1, 1, 1, tokens, dtype=torch.bool, device="cuda")
    for node in module.graph.nodes:
        if node.op == "placeholder":
            node.meta["example_value"] = mask if node.name == "mask" else q
    return module


@pytest.mark.parametrize(
    ("shape", "settings", "started"),
    [
        ({}, {}, True),
        ({}, {"attention": "fa4"}, True),
        ({}, {"attention": "cudnn"}, False),
        ({}, {"attention": "torch"}, False),
        ({}, {"rules": ("-attention",)}, False),
        ({}, {"target": "sm80"}, False),
        ({"tokens": 512}, {}, False),  # nothing like it was measured
        ({"tokens": 512}, {"attention": "fa4"}, True),
        ({"tokens": 1536}, {}, False),  # cuDNN is as fast
        ({"causal": True}, {}, False),
        ({"tokens": 25696, "masked": True}, {}, True),
        ({"masked": True}, {}, True),
        ({"tokens": 1536, "masked": True}, {}, False),
    ],
)
def test_started_for_attention(
    pool: Recorder, monkeypatch: pytest.MonkeyPatch, shape: Any, settings: dict[str, Any], started: bool
) -> None:
    module = attention(**shape)
    with_a_gpu(monkeypatch)
    chosen = Settings(**{"target": "sm90", "gemm": "cublas", **settings})
    kind = attention_kept.Kind("bfloat16", 128, 1, False, bool(shape.get("masked")))
    early.start(module, chosen)
    assert bool(pool.started) == started and list(pool.jobs) == [attention_kept.job(kind)] * started
    if started:
        before = pool.started
        monkeypatch.setattr(shared_library, "there", lambda parts: parts == attention_kept._parts(kind))
        early.start(module, chosen)
        assert pool.started == before, "its kernel is on disk"


def test_no_kernel_is_compiled_for_a_mask_that_may_be_any_bias(pool: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention(masked=True)
    for node in module.graph.nodes:
        if node.name == "mask":
            node.meta["example_value"] = node.meta["example_value"].to(BF16)
    with_a_gpu(monkeypatch)
    early.start(module, Settings(target="sm90", gemm="cublas"))
    assert pool.started == 1 and not pool.jobs


def test_without_a_gpu_nothing_is_begun(pool: Recorder) -> None:
    early.start(attention(), Settings(target="sm90", attention="fa4"))
    assert pool.started == 0 and not cute_ahead._thread


# -- imported meanwhile ------------------------------------------------------------------------------------------------


def test_only_new_kernels_of_flash_attention_are_imported_for(pool: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(cute_ahead, "_import", asked.append)
    kind = attention_kept.Kind("bfloat16", 128, 1, False, False)
    gemm_ahead.submit(gemm_ahead.Kind("bfloat16", "none", True, "128x192"))
    with monkeypatch.context() as patch:
        patch.setattr(shared_library, "there", lambda parts: True)
        assert not attention_kept.submit(kind, 90)
    for patch in ({"compile_threads": 1}, {"worker_start_method": "fork"}):
        with config.patch(patch):
            attention_kept.submit(kind, 90)
    assert asked == []
    for _ in range(2):
        pool._reset()
        assert attention_kept.submit(kind, 90)
        cute_ahead.imported()
    assert asked == [cute_ahead.FA4_MODULES], "once"


def test_what_needs_an_import_waits_for_it(pool: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module that breaks in the thread breaks where it is needed too, and the others are imported."""
    (tmp_path / "dkfuse_slow_module.py").write_text(
        textwrap.dedent("""
        import threading, time
        time.sleep(0.3)
        THREAD = threading.current_thread().name
    """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cute_ahead, "FA4_MODULES", ("dkfuse_missing_module", "dkfuse_slow_module"))
    cute_ahead.import_meanwhile()
    assert cute_ahead.importing()
    cute_ahead.imported()
    assert not cute_ahead.importing() and sys.modules["dkfuse_slow_module"].THREAD == "dkfuse-import"
    thread = cute_ahead._thread[0]
    cute_ahead.import_meanwhile()
    assert cute_ahead._thread == [thread] and threading.current_thread() is not thread
    monkeypatch.delitem(sys.modules, "dkfuse_slow_module")


# -- clusters ----------------------------------------------------------------------------------------------------------


def test_clusters_of_two_are_counted_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(multi_processor_count=132)
    )
    asked = types.SimpleNamespace(get_max_active_clusters=lambda size: 100 + size)
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.cute_dsl_utils", asked)
    device = torch.device("cuda:0")
    assert [gemm_quack.clusters(size, device) for size in (1, 2, 4)] == [132, 66, 104]
