"""A bench of models as tables on a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from ..reporting import summary
from .averages import ratio
from .classify import KINDS
from .results import OURS, PLAIN, ModelResult, Side
from .svg import Bar, chart

if TYPE_CHECKING:
    from rich.console import Console

LABELS = {
    "gemm": "GEMM",
    "attention": "attention",
    "dkfuse": "dkfuse kernels",
    "inductor": "Inductor kernels",
    "copy": "copies",
    "other": "other",
}
COLOURS = {
    "gemm": "#9aa5b1",
    "attention": "#5b7fa6",
    "dkfuse": "#2e8b57",
    "inductor": "#e0a030",
    "copy": "#c4574c",
    "other": "#8c6bb1",
}
MOST_SITES = 16


def print_result(result: ModelResult, console: Console) -> None:
    """The split of GPU time, the other measures, the gain and the sites of one model."""
    console.print(_table(result))
    for rival in result.rivals:
        console.print(Text(gain_text(result, rival), "bold" if rival == result.rivals[0] else ""))
    if PLAIN in result.sides and PLAIN not in result.rivals:
        for rival in result.rivals:
            console.print(Text(f"plain: {gain_text(result, rival, PLAIN)}"))
    if all(side.cpu is None for side in result.sides.values()):
        console.print(Text("CPU per forward: not shown, the launch queue may be full", "dim"))
    if result.note:
        console.print(Text(f"note: {result.note}; errors are against {result.reference}", "yellow"))
    if result.sites:
        console.print()
        console.print(_sites(result))
        if any(site.shared for site in result.sites):
            console.print(Text("* not one launch a site: the time of all launches is shared out by bytes", "dim"))
    console.print()


def gain_text(result: ModelResult, rival: str, side: str = OURS) -> str:
    """Where the gain over one rival comes from, in one line."""
    gain = result.gain(rival, side)
    parts = ", ".join(
        f"{name} {gain[key] * 100:+.1f} %"
        for name, key in (("glue", "glue"), ("GEMM", "gemm"), ("attention", "attention"))
    )
    saved = f"{gain['total'] * 100:+.1f} % of its GPU time saved: {parts}"
    better = ", the better of Inductor's modes" if rival == result.better else ""
    loop = ratio(result.sides[rival].loop, result.sides[side].loop)
    looped = f" ({loop:.3f}x in a loop)" if loop is not None else ""
    return f"{gain['speedup']:.3f}x the speed of {rival}{better}{looped}, {saved}"


def blocks(result: ModelResult) -> str:
    """Blocks of each stack, as in "5 + 5"; empty where they are not known."""
    return " + ".join(map(str, result.depth or (() if result.layers is None else (result.layers,))))


def _table(result: ModelResult) -> Table:
    parts = [
        f"{blocks(result)} {'layer' if blocks(result) == '1' else 'layers'}" if blocks(result) else "",
        result.size if result.size != "full" else "",
        result.dtype if result.dtype != "bf16" else "",
        f"batch {result.batch}" if result.batch > 1 else "",
        f"mode {result.mode}" if result.mode else "",
        "packed weights" if result.pack else "",
        f"attention {result.attention}" if result.attention else "",
    ]
    more = ", ".join(part for part in parts if part)
    totals = result.coverage
    fused = f"{totals['fused']} of {summary.count(totals['sites'], 'site')} fused" if totals else ""
    title = " · ".join(part for part in (result.model, more, fused) if part)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for name in result.sides:
        table.add_column(name, justify="right")
    for rival in result.rivals:
        table.add_column(f"/ {rival}", justify="right", style="bold")

    def row(label: str, unit: str, read: str, digits: int = 3, end: bool = False) -> None:
        values = [_number(_read(side, read), digits) for side in result.sides.values()]
        ratios = []
        for rival in result.rivals:
            ours, theirs = _read(result.sides[OURS], read), _read(result.sides[rival], read)
            ratios.append(f"{ours / theirs:.3f}" if ours is not None and theirs else "-")
        table.add_row(f"{label}, {unit}" if unit else label, *values, *ratios, end_section=end)

    for kind in KINDS:
        row(LABELS[kind], "ms", f"split.{kind}", end=kind == KINDS[-1])
    row("glue: neither GEMM nor attention", "ms", "glue")
    row("GPU time", "ms", "gpu")
    row("wall time", "ms", "wall")
    row("forward in a loop", "ms", "loop")
    row("CPU per forward", "ms", "cpu")
    row("kernels", "", "launches", 0)
    row("compile, cold", "s", "compile_cold", 2)
    row("compile, warm", "s", "compile_warm", 2)
    row("peak memory", "GiB", "peak_gib", 2)
    values = ["-" if side.error is None else f"{side.error:.2e}" for side in result.sides.values()]
    ratios = [result.ratios(rival)["error"] for rival in result.rivals]
    table.add_row(f"error against {result.reference}", *values, *("-" if r is None else f"{r:.3f}" for r in ratios))
    return table


def _read(side: Side, path: str) -> float | None:
    head, _, kind = path.partition(".")
    return side.split.get(kind, 0.0) if kind else getattr(side, head)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _sites(result: ModelResult) -> Table:
    title = "Fused sites, the most time first"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("op", "kernel", "x", "sites", "us each", "MB each", "of copy"):
        table.add_column(name, justify="left" if name in ("op", "kernel", "x") else "right")
    for site in result.sites[:MOST_SITES]:
        shape = site.shapes.get("x") or next(iter(site.shapes.values()), [])
        star = "*" if site.shared else ""
        numbers = (f"{site.microseconds:.1f}{star}", f"{site.bytes / 1e6:.1f}", f"{site.of_copy:.2f}")
        table.add_row(site.op, site.kernel, summary.shape_text(shape), str(site.sites), *numbers)
    if len(result.sites) > MOST_SITES:
        table.add_row(f"and {summary.count(len(result.sites) - MOST_SITES, 'more group')}")
    return table


def picture(results: Sequence[ModelResult], device: str) -> str:
    """An SVG: for each model one bar per side, GPU time by kind as a share of the first rival's."""
    bars = []
    for result in results:
        rivals = result.rivals
        whole = result.sides[rivals[0] if rivals else OURS].gpu or 1.0
        for i, (name, side) in enumerate(result.sides.items()):
            split = [(kind, side.split.get(kind, 0.0)) for kind in KINDS]
            parts = [(COLOURS[kind], ms / whole, f"{LABELS[kind]}: {ms:.3f} ms") for kind, ms in split if ms > 0]
            title = f"{result.model}{f', batch {result.batch}' if result.batch > 1 else ''}" if i == 0 else ""
            bars.append(Bar(name, parts, f"{side.gpu:.2f} ms, {side.gpu / whole:.3f}", title))
    legend = [(COLOURS[kind], LABELS[kind]) for kind in KINDS]
    return chart(f"GPU time of one forward, {device}", bars, legend, mark=1.0)
