"""A diagnosis as tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .doctor import Check, Diagnosis

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MARKS = {"ok": ("✓", "green"), "optional": ("·", "dim"), "warning": ("!", "yellow"), "error": ("✗", "red")}


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """Print versions, devices, folders, settings and what is wrong."""
    from rich.text import Text

    for title, checks in (("Software", found.software), ("Devices", found.devices), ("Folders", found.folders)):
        console.print(Text(title, "bold"))
        console.print(_checks(checks))
        console.print()
    console.print(Text("Settings", "bold"), Text(" option > environment > default", "dim"), sep="")
    console.print(_settings(found.settings))
    for problem in found.problems:
        console.print(Text(f"✗ {problem}", "red"))
    if found.usable:
        console.print(Text('dkfuse is ready: torch.compile(model, backend="dkfuse")', "green"))


def _checks(checks: list[Check]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(width=1)
    table.add_column(no_wrap=True, min_width=18)
    table.add_column(overflow="fold")
    for check in checks:
        mark, style = MARKS[check.state]
        value = Text(check.value, "dim" if check.state == "optional" else "")
        if check.hint:
            value.append(f": {check.hint}", style)
        table.add_row(Text(mark, style), check.name, value)
    return table


def _settings(rows: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("Option", "Environment", "Value", "From", "Meaning"):
        table.add_column(title, no_wrap=title in ("Option", "Environment"), overflow="fold")
    for row in rows:
        style = "" if row["origin"] == "default" else "bold"
        value = (
            ",".join(row["value"])
            if isinstance(row["value"], tuple)
            else "-"
            if row["value"] is None
            else str(row["value"])
        )
        table.add_row(
            row["option"], row["variable"], Text(value, style), Text(row["origin"], style or "dim"), row["help"]
        )
    return table
