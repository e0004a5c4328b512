"""Times to the first result as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console


def print_rows(rows: Sequence[dict[str, Any]], console: Console, title: str) -> None:
    """A line for each side of each model: seconds, and dkfuse's by them."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("model", "blocks", "side"):
        table.add_column(name)
    for name in ("cold, s", "warm, s", "dkfuse's cold", "dkfuse's warm"):
        table.add_column(name, justify="right")
    for row in rows:
        batch = f"@{row['batch']}" if row["batch"] > 1 else ""
        head = row["model"] + batch, " + ".join(map(str, row["depth"]))
        for i, (side, times) in enumerate(row["sides"].items()):
            ratios = row["ratios"].get(side, {})
            table.add_row(
                *(head if i == 0 else ("", "")),
                side,
                *(f"{times[which]:.1f}" for which in ("cold", "warm")),
                *("" if ratios.get(which) is None else f"{ratios[which]:.2f}x" for which in ("cold", "warm")),
                end_section=i == len(row["sides"]) - 1,
            )
    console.print(Text(title, "bold"))
    console.print("seconds to the first result in a new process, caches empty and full; ratios: less is better")
    console.print(table)
