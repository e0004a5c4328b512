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
    """One table per op, what is missing and why, and geometric means."""
    console.print(Text(title, "bold"))
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        console.print()
        console.print(_table(op, of_op))
        _problems(of_op, console)
    rivals = dict.fromkeys(name for row in rows for name in row["rivals"])
    console.print()
    for rival in rivals:
        means = ", ".join(f"{op} {mean:.2f}x" for op, mean in speedups(rows, rival).items())
        if means:
            console.print(f"geometric mean over {TITLES[rival]}, best provider: {means}", highlight=False)


def _table(op: str, rows: Sequence[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["providers"]))
    rivals = list(dict.fromkeys(name for row in rows for name in row["rivals"]))
    peers = list(dict.fromkeys(peer["name"] for row in rows for peer in row["peers"]))
    table = Table(title=op, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("case")
    table.add_column("shape")
    table.add_column("copy us", justify="right")
    for name in names:
        table.add_column(f"{name} us / of copy", justify="right")
    for name in (*(TITLES[r] for r in rivals), *(f"{p}*" for p in peers)):
        table.add_column(f"{name} us", justify="right")
    table.add_column("best vs Inductor", justify="right")
    table.add_column("error: best", justify="right")
    for name in rivals:
        table.add_column(TITLES[name], justify="right")
    for row in rows:
        found = [row["providers"].get(name, {}) for name in names]
        by_peer = {peer["name"]: peer for peer in row["peers"]}
        others = [row["rivals"].get(name, {}) for name in rivals]
        ours = row["providers"].get(row["best"], {})
        compiled = [row["rivals"][name] for name in rivals if name != "eager"]
        theirs = [entry["microseconds"] for entry in compiled if "microseconds" in entry]
        table.add_row(
            row["case"],
            "x".join(map(str, row["shape"])),
            f"{row['copy_microseconds']:.1f}",
            *(f"{f['microseconds']:.1f} / {f['of_copy']:.3f}" if "microseconds" in f else "-" for f in found),
            *(_time(entry) for entry in (*others, *(by_peer.get(name, {}) for name in peers))),
            f"{min(theirs) / ours['microseconds']:.2f}x" if theirs and ours else "-",
            *(f"{entry['error']:.1e}" if "error" in entry else "-" for entry in (ours, *others)),
        )
    return table


def _time(entry: dict[str, Any]) -> str:
    return f"{entry['microseconds']:.1f}" if "microseconds" in entry else "-"


def _problems(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Why there is no time, once per reason, and what peers do."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        entries = [*row["providers"].items(), *row["rivals"].items(), *((p["name"], p) for p in row["peers"])]
        for name, entry in entries:
            if "problem" in entry:
                cases.setdefault(f"{name}: {entry['problem']}", []).append(row["case"])
    for problem, names in cases.items():
        console.print(Text(f"  - {problem} ({', '.join(names)})", "dim"))
    for note in dict.fromkeys(f"  * {p['name']}: {p['part']}" for row in rows for p in row["peers"]):
        console.print(Text(note, "dim"))


def picture(rows: Sequence[dict[str, Any]], device: str) -> str:
    """An SVG: per case one bar for each provider, Inductor and each peer, as a fraction of the speed of a copy."""
    names = list(dict.fromkeys(name for row in rows for name in row["providers"]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    bars = []
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        entries = [(name, colours[name], entry) for name, entry in row["providers"].items()]
        entries += [(TITLES[n], INDUCTOR, entry) for n, entry in row["rivals"].items() if n != "eager"]
        entries += [(f"{p['name']}, {p['part']}", PEER, p) for p in row["peers"]]
        title = f"{row['op']}: {row['case']}, {shape}"
        for label, colour, entry in entries:
            if "of_copy" in entry:
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
