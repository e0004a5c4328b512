"""Shared fixtures. Tests never read the caller's DKFUSE_* variables, and GPU tests are skipped without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DKFUSE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled when the test begins, and nothing stays compiled."""
    import torch

    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def fused_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functional graphs as they leave the pass, of what is compiled from here on."""
    from dkfuse import backend

    seen: list[Any] = []
    original = backend.fuse.run

    def run(graph: Any, *args: Any, **kwargs: Any) -> Any:
        record = original(graph, *args, **kwargs)
        seen.append(graph)
        return record

    monkeypatch.setattr(backend.fuse, "run", run)
    return seen


@pytest.fixture
def fresh_providers(fresh_compiler: None) -> Iterator[None]:
    """Providers that the test registers, and kernels that fail in it, are forgotten with what was compiled."""
    from dkfuse.kernels import failures, provider_ops, providers, registry

    yield
    for name in set(providers.PROVIDERS) - set(providers.BUILT_IN):
        registry.unregister(name)
    failures.forget()
    provider_ops.reset()


@pytest.fixture
def sm90() -> Iterator[Any]:
    """Triton's front end without a GPU: the driver answers with an H100's target."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    previous = driver._active
    driver.set_active(Driver())
    yield GPUTarget("cuda", 90, 32)
    driver._active = previous


@pytest.fixture
def fake_cute(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cute provider that is installed, takes rows up to 4096 and is not to be run; no other but Triton and native."""
    from dkfuse.kernels import providers, registry

    def width(arguments: Any) -> str | None:
        d = arguments["x"].shape[-1]
        return f"D is {d}" if d > 4096 else None

    def run(arguments: Any, outputs: Any) -> None:
        raise AssertionError("not to be run")

    constraint = registry.Constraint("width", "D <= 4096", width)
    implementation = registry.Implementation("norm_modulate", "cute", (constraint,), run, oldest=90)
    table = {k: v for k, v in registry.implementations().items() if k[0] in ("triton", "native")}
    table["cute", "norm_modulate"] = implementation
    monkeypatch.setattr(registry, "_table", table)
    installed = providers.Provider("cute", "CuTe DSL", install="dkfuse[cute]")
    monkeypatch.setitem(providers.PROVIDERS, "cute", installed)
    monkeypatch.setitem(providers.BUILT_IN, "cute", installed)
    return implementation


@pytest.fixture
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture
def sample() -> Any:
    """A report with every status, several graphs, a note and awkward characters."""
    from dkfuse.reporting.report import Coverage, Graph, Reason, Site, Status

    sites = [
        Site(
            f"norm{i}",
            "norm_modulate",
            Status.FUSED,
            "norm_modulate",
            "norm_modulate",
            "triton",
            source=f"/site-packages/models/model.py:{10 + i % 2}",
            module=f"blocks.{i}.norm1",
            shapes={"x": [1, 4096, 3072], "scale": [1, 1, 3072], "eps": []},
            dtype="bfloat16",
            bytes_before=100_000_000,
            bytes_after=50_000_000,
        )
        for i in range(3)
    ]
    sites.append(
        Site("gate0", "gated_residual", Status.FUSED, "norm_modulate", "norm_modulate", "triton", with_site="norm1")
    )
    escapes = Reason("semantics", "escapes", "node 'add<1>' | reads the sum too", "residual_norm_modulate")
    sites.append(Site("r0", "residual_norm", Status.REJECTED, reason=escapes, attempts=[escapes], source="b.py:3"))
    gain = Reason("kernel", "pointwise", "Inductor joins it")
    sites.append(Site("l0", "scale_shift", Status.LEFT_TO_INDUCTOR, reason=gain, shapes={"x": ["s0", 8]}))
    more = [Site("u0", "other_norm", Status.UNMATCHED, term="layer(x, [2, 3])", source="model.py:99")]
    return Coverage(
        "toy <model>",
        "2.13.0",
        "sm90",
        [Graph(0, 1234, 0.5, sites=sites), Graph(1, 7, 0.0, True, sites=more), Graph(2, 3, 0.0, note="training")],
    )


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    from dkfuse.cli import main as cli

    def run(*arguments: Any) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run
