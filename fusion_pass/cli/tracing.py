"""Tracing the model of the command line, with progress on stderr and each failure as one sentence."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import TraceError, first_line
from ..reporting.progress import progress
from ..reporting.report import Coverage
from ..settings import Settings
from .exits import ENVIRONMENT, NOT_TRACED, Failure

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def trace(
    model: str, size: str | None, layers: int | None, dtype: str | None, settings: Settings, console: Console
) -> Coverage:
    """The coverage of MODEL (see `loading.load`). Raises Failure with the exit code and sentence of what went wrong."""
    with progress(f"building {model}", console):
        from ..reporting.weightless import mode_of
        from .loading import FactoryError, describe_error, load

        try:
            label, module, kwargs = load(model, size, layers, dtype)
        except FactoryError as error:
            raise Failure(NOT_TRACED, str(error)) from error
        except ImportError as error:
            raise Failure(
                ENVIRONMENT, f"{first_line(error)}; the zoo needs: pip install 'dkfuse[diffusers]'"
            ) from error
    from ..reporting import recording

    with (
        recording.record() as seen,
        progress(f"tracing {label}", console, seen),
        mode_of(module, kwargs),
        _quiet_torch(),
    ):
        try:
            found = _with_stack(recording.coverage)(module, settings=settings, **kwargs)
        except TraceError as error:
            raise Failure(NOT_TRACED, f"{label} cannot be traced: {describe_error(error.original)}") from error
    found.model = label
    return found


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """No log lines of torch about an error that is reported in one sentence anyway, unless they were asked for."""
    wanted = "TORCH_LOGS" in os.environ or os.environ.get("DKFUSE_DEBUG") == "1"
    before = logging.root.manager.disable
    logging.disable(before if wanted else logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _with_stack(function: Callable[..., T]) -> Callable[..., T]:
    """The function, called from a frame that asks for a large stack.

    CPython keeps frames in chunks of 16 KB. Deep code that happens to stand at the end of one maps and unmaps the
    next chunk at every call, which costs a full-size trace 10 of 60 seconds; a large frame gets a large chunk.
    """

    def call(*args: Any, **kwargs: Any) -> T:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=1 << 16)
    return call
