"""Signs of life on stderr while a long trace runs: a live line on a terminal, a line every 20 seconds elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .report import Coverage
from .summary import count

if TYPE_CHECKING:
    from rich.console import Console

INTERVAL = 20.0  # seconds between lines when stderr is not a terminal


@contextmanager
def progress(what: str, console: Console, seen: Coverage | None = None, interval: float = INTERVAL) -> Iterator[None]:
    """Show `what`, the seconds since the start and the graphs collected in `seen` so far, until the block ends."""
    start = time.monotonic()

    def text() -> str:
        line = f"{what}: {time.monotonic() - start:.0f} s"
        if seen is not None and seen.graphs:
            sites = sum(len(graph.sites) for graph in list(seen.graphs))
            line += f", {count(len(seen.graphs), 'graph')}, {count(sites, 'site')}"
        return line

    if console.is_terminal:
        with _live(text, console):
            yield
        return
    done = threading.Event()

    def report() -> None:
        while not done.wait(interval):
            console.print(text(), highlight=False, markup=False)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _live(text: Callable[[], str], console: Console) -> Iterator[None]:
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    spinner = Spinner("dots", style="green")

    def line() -> Spinner:
        spinner.update(text=Text(text()))
        return spinner

    with Live(console=console, get_renderable=line, transient=True, refresh_per_second=8):
        yield
