"""Collecting coverage: `record()` around real runs, `coverage()` for a model that need not run here."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from dkfuse.kernels import failures
from dkfuse.kernels.failures import Failure

from ..errors import DkfuseError, TraceError
from ..settings import Settings
from .report import Coverage, Graph, Reason, Site

log = logging.getLogger("dkfuse")
_lock = threading.Lock()
_active: list[Coverage] = []
_files: dict[str, Coverage] = {}
_watched: list[weakref.ref[Site]] = []


@contextlib.contextmanager
def record(model: str | None = None) -> Iterator[Coverage]:
    """Collect the coverage of every graph that backend "dkfuse" compiles inside the block.

        with dkfuse.record() as coverage:
            torch.compile(model, backend="dkfuse")(x)
        coverage.assert_fused("modulate", at_least=2)

    A graph that was compiled before (same function, same shapes) is not compiled again and is not in the report:
    `torch.compiler.reset()` starts afresh.
    """
    collected = Coverage(model=model, torch=torch.__version__)
    with _lock:
        _active.append(collected)
    try:
        yield collected
    finally:
        with _lock:
            _active[:] = [c for c in _active if c is not collected]


def publish(graphs: list[Graph], target: str, settings: Settings) -> None:
    """Hand freshly compiled graphs to every open `record()` and to the report file of `settings`."""
    with _lock:
        _watch(graphs)
        receivers = list(_active)
        if settings.report is not None:
            fresh = Coverage(torch=torch.__version__)
            receivers.append(_files.setdefault(settings.report, fresh))
        for receiver in receivers:
            receiver.target = target
            for graph in graphs:
                receiver.graphs.append(replace(graph, index=len(receiver.graphs)))
    if settings.report is not None:
        _write(_files[settings.report], settings.report)


def _write(collected: Coverage, path: str) -> None:
    """Write a report file; a folder that is gone or a full disk is no reason for a model not to run."""
    from .render import write

    try:
        write(collected, path)
    except OSError as error:
        log.warning("dkfuse: the report %s cannot be written: %s", path, error)


def withdraw(graphs: list[Graph]) -> None:
    """Take back graphs that were published and never ran: they are compiled again."""
    gone = {id(graph.sites) for graph in graphs}
    with _lock:
        for receiver in (*_active, *_files.values()):
            receiver.graphs[:] = [graph for graph in receiver.graphs if id(graph.sites) not in gone]
            for index, graph in enumerate(receiver.graphs):
                graph.index = index


def _watch(graphs: list[Graph]) -> None:
    """Remember the sites whose kernels may fail when they are launched, as long as somebody holds them."""
    _watched[:] = [reference for reference in _watched if reference() is not None]
    for site in (s for graph in graphs for s in graph.sites):
        if site.kernel not in (None, "native"):
            _watched.append(weakref.ref(site))


def _on_launch_failure(failure: Failure) -> None:
    """Say in every report that is still held, and in the report files, that plain torch computes these sites."""
    with _lock:
        for site in (reference() for reference in _watched):
            if site is not None and _is_about(failure, site):
                reason = Reason("kernel", "kernel_failed", failure.message, failure.provider)
                if reason not in site.passed_over:
                    site.passed_over.append(reason)
        files = dict(_files)
    for path, collected in files.items():
        _write(collected, path)


def _is_about(failure: Failure, site: Site) -> bool:
    """Whether the failed call may be one of the site's: its kernel and op, and x of one of its calls has that shape."""
    sizes = [shape for name, shape in site.shapes.items() if name.split(".")[0] == "x"]
    same = (
        len(shape) == len(failure.shape)
        and all(isinstance(a, str) or a == b for a, b in zip(shape, failure.shape, strict=True))
        for shape in sizes
    )
    return (site.kernel, site.op) == (failure.provider, f"dkfuse::{failure.op}") and any(same)


failures.listeners.append(_on_launch_failure)


def coverage(module: Any, *args: Any, settings: Settings | None = None, **kwargs: Any) -> Coverage:
    """What dkfuse would fuse in ``module(*args, **kwargs)``, a model or a function, for the target in `settings`.

    It is traced like `torch.compile` traces it and its graphs are planned, not compiled: no kernel of dkfuse runs, and
    the module is not changed. What was compiled in this process before is compiled again when it is next called
    (`torch.compiler.reset`). Graphs run in eager mode between graph breaks, so tensors may be fake
    (`torch._subclasses.FakeTensorMode`), or on the meta device, where a fake copy is traced: a model of any size then
    needs no memory and no GPU.

    Raises TraceError with the original exception when the model cannot be traced.
    """
    from ..backend import planning_backend
    from .weightless import mode_of, on_meta, without_memory

    settings = settings or Settings.parse(None, None)[0]
    if on_meta(module, (args, kwargs)):
        module, (args, kwargs) = without_memory(copy.deepcopy(module), (args, kwargs))
    torch.compiler.reset()
    with record(getattr(module, "__name__", type(module).__name__)) as collected:
        compiled = torch.compile(module, backend=planning_backend(settings), dynamic=False)
        try:
            with mode_of(module, (args, kwargs)), torch.no_grad():
                compiled(*args, **kwargs)
        except DkfuseError:
            raise
        except Exception as error:
            raise TraceError(error) from error
        finally:
            torch.compiler.reset()
    if settings.target != "current":
        collected.target = settings.target
    return collected
