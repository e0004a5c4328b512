"""A bench of kernels as a table, a picture, and as the table of crossovers that the choice of kernels reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from .kernels import crossovers, speedups
from .results import today
from .svg import Bar, chart

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = ("#2e8b57", "#5b7fa6", "#8c6bb1", "#3aa6a0", "#6b8e23")  # of providers, in order
INDUCTOR, PEER = "#e0a030", "#b0b0b0"
TITLES = {"inductor": "Inductor", "max-autotune": "max-autotune", "eager": "eager"}


def print_rows(rows: Sequence[dict[str, Any]], console: Console, title: str) -> None:
    """One table per op with a line for every implementation, the best provider in bold, and geometric means."""
    console.print(Text(title, "bold"))
    for op in dict.fromkeys(row["op"] for row in rows):
        console.print()
        console.print(_table(op, [row for row in rows if row["op"] == op]))
    console.print()
    for rival in dict.fromkeys(name for row in rows for name in row["rivals"]):
        means = ", ".join(f"{op} {mean:.2f}x" for op, mean in speedups(rows, rival).items())
        if means:
            console.print(f"geometric mean over {TITLES[rival]}, best provider: {means}", highlight=False)


def entries(row: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, group, measurement) of everything that was timed or should have been; groups as in the JSON."""
    found = [(name, "providers", entry) for name, entry in row["providers"].items()]
    found += [(TITLES[name], "rivals", entry) for name, entry in row["rivals"].items()]
    return found + [(f"{p['name']}: {p['part']}", "peers", p) for p in row["peers"]]


def _table(op: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=op, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("case", "shape", "by"):
        table.add_column(name)
    for name in ("us", "of copy", "of peak", "vs Inductor", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        inductor = [e["microseconds"] for n, e in row["rivals"].items() if n != "eager" and "microseconds" in e]
        shape, lines = "x".join(map(str, row["shape"])), entries(row)
        for i, (label, group, entry) in enumerate(lines):
            head = (row["case"], shape) if i == 0 else ("", "")
            style = "bold" if group == "providers" and label == row["best"] else "dim" if group == "peers" else ""
            last = i == len(lines) - 1
            if "problem" in entry:
                table.add_row(*head, Text(f"{label}: {entry['problem']}"), style="dim", end_section=last)
                continue
            spent = entry["microseconds"]
            numbers = (f"{spent:.1f}", f"{entry['of_copy']:.3f}", f"{entry['of_peak']:.3f}")
            faster = f"{min(inductor) / spent:.2f}x" if inductor and group == "providers" else ""
            error = f"{entry['error']:.1e}" if "error" in entry else ""
            table.add_row(*head, Text(label), *numbers, faster, error, style=style, end_section=last)
    return table


def picture(rows: Sequence[dict[str, Any]], device: str) -> str:
    """An SVG: per case one bar for each provider, Inductor and each peer, as a fraction of the speed of a copy."""
    names = list(dict.fromkeys(name for row in rows for name in row["providers"]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    bars = []
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        title = f"{row['op']}: {row['case']}, {shape}"
        for label, group, entry in entries(row):
            colour = colours.get(label, PEER if group == "peers" else INDUCTOR)
            if "of_copy" in entry and label != TITLES["eager"]:
                tip = f"{entry['microseconds']:.1f} us"
                bars.append(Bar(label, [(colour, entry["of_copy"], tip)], f"{entry['of_copy']:.2f}, {tip}", title))
                title = ""
    legend = [*((colour, name) for name, colour in colours.items()), (INDUCTOR, "Inductor"), (PEER, "peers")]
    return chart(f"Fraction of the speed of a copy, {device}", bars, legend, mark=1.0)


HEADER = '''"""Where another provider's kernel was faster than Triton's: time / Triton's time, measured.

Made by `dkfuse bench kernels --write-crossovers FILE` on {device}, torch {torch}, {date}.
"""

from __future__ import annotations

# (op, provider, rows, width, time / Triton's time)
CROSSOVERS: tuple[tuple[str, str, int, int, float], ...] = (
'''


def crossovers_text(rows: Sequence[dict[str, Any]], device: str, torch: str, as_json: bool = False) -> str:
    """The crossovers as a Python module or as JSON."""
    found = crossovers(rows)
    if as_json:
        keys = ("op", "provider", "rows", "width", "ratio")
        return json.dumps([dict(zip(keys, entry, strict=True)) for entry in found], indent=1) + "\n"
    lines = "".join(f'    ("{op}", "{name}", {n}, {width}, {ratio}),\n' for op, name, n, width, ratio in found)
    return HEADER.format(device=device, torch=torch, date=today()) + lines + ")\n"
