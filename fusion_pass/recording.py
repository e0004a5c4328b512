"""Collecting coverage: `record()` around real runs, `coverage()` for a model that need not run here."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .errors import DkfuseError, TraceError
from .report import Coverage, Graph
from .settings import Settings

_lock = threading.Lock()
_active: list[Coverage] = []
_files: dict[str, Coverage] = {}


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
        receivers = list(_active)
        if settings.report is not None:
            fresh = Coverage(torch=torch.__version__)
            receivers.append(_files.setdefault(settings.report, fresh))
        for receiver in receivers:
            receiver.target = target
            for graph in graphs:
                receiver.graphs.append(replace(graph, index=len(receiver.graphs)))
    if settings.report is not None:
        from .render import write

        write(_files[settings.report], settings.report)


def coverage(module: Any, *args: Any, settings: Settings | None = None, **kwargs: Any) -> Coverage:
    """What dkfuse would fuse in ``module(*args, **kwargs)``, for the target in `settings`.

    The module is traced like `torch.compile` traces it and its graphs are planned, not compiled: no kernel of dkfuse
    runs, and nothing is changed. Graphs run in eager mode between graph breaks, so tensors may be fake
    (`torch._subclasses.FakeTensorMode`): a model of any size then needs no memory and no GPU.

    Raises TraceError with the original exception when the model cannot be traced.
    """
    from .backend import planning_backend
    from .weightless import mode_of

    settings = settings or Settings.parse(None, None)[0]
    torch.compiler.reset()
    with record(type(module).__name__) as collected:
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
