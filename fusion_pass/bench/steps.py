"""Progress of a bench on stderr: the step it is at and its seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ..reporting.progress import progress

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def steps(console: Console) -> Iterator[Callable[[str], None]]:
    """A function that is told which step begins; the last one ends with the block."""
    with ExitStack() as stack:

        def step(what: str) -> None:
            stack.close()
            stack.enter_context(progress(what, console))

        yield step
