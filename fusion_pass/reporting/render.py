"""Coverage as text and markdown, and saving a report in the format that its file name asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_whole
from . import summary
from .report import Coverage, Site, Status, describe

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

COLOURS = {
    Status.FUSED: "green",
    Status.LEFT_TO_INDUCTOR: "cyan",
    Status.REJECTED: "yellow",
    Status.UNMATCHED: "red",
}
WIDE = 110  # columns from which on the sources have a column of their own
FORMATS = ("text", "json", "html", "markdown")
_BY_EXTENSION = {".html": "html", ".htm": "html", ".md": "markdown", ".markdown": "markdown", ".txt": "text"}


def to_text(coverage: Coverage, width: int = 120, regressions: Sequence[Site] = ()) -> str:
    """The report as plain text, at most `width` columns wide."""
    from rich.console import Console

    console = Console(width=width, no_color=True, force_terminal=False, highlight=False, emoji=False)
    with console.capture() as capture:
        print_report(coverage, console, regressions)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def print_report(coverage: Coverage, console: Console, regressions: Sequence[Site] = ()) -> None:
    """Print the report on a rich console, in colour if it is a terminal."""
    from rich.text import Text

    title = Text("dkfuse coverage", "bold")
    if coverage.model:
        title.append(f": {coverage.model}")
    console.print(title)
    console.print(Text(summary.about(coverage), "dim"))
    console.print()
    console.print(Text(summary.headline(coverage), "bold"))
    if coverage.sites:
        console.print(_bar(coverage, min(console.width, 100)))
    if coverage.sites or coverage.seams:
        console.print()
        console.print(_family_table(coverage) if console.width >= WIDE else _family_list(coverage))
    reasons = summary.by_reason(coverage)
    if reasons:
        console.print()
        console.print(Text("Not fused", "bold"))
        console.print(_reason_list(reasons))
    for note in summary.notes(coverage):
        console.print(Text(f"note: {note}", "yellow"))
    if regressions:
        console.print()
        console.print(Text(f"{summary.count(len(regressions), 'regression')} against the baseline", "bold red"))
        for site in regressions:
            console.print(Text("  " + regression_text(site)))


def to_markdown(coverage: Coverage, regressions: Sequence[Site] = ()) -> str:
    """The report as markdown tables, for a pull request or an issue."""
    lines = [f"## dkfuse coverage{f': {coverage.model}' if coverage.model else ''}", ""]
    lines += [f"**{summary.headline(coverage)}**", "", summary.about(coverage), ""]
    if regressions:
        lines += [f"### {summary.count(len(regressions), 'regression')} against the baseline", ""]
        lines += [f"- {_cell(regression_text(site))}" for site in regressions] + [""]
    if coverage.sites or coverage.seams:
        lines += ["| family | sites | fused | | kernel | where |", "|---|--:|--:|--:|---|---|"]
        for group in summary.by_family(coverage):
            share = summary.percent(group.share)
            lines.append(f"| **{group.name}** | {len(group.sites)} | {group.fused} | {share} | | |")
            for row in group.rows:
                fused = row.fused or ""
                lines.append(f"| {_cell(row.name)} | {len(row.sites)} | {fused} | | {row.kernels} | {row.sources()} |")
        lines.append("")
    reasons = summary.by_reason(coverage)
    if reasons:
        lines += ["### Not fused", "", "| sites | status | reason | example | where |", "|--:|---|---|---|---|"]
        for reason in reasons:
            code, status = f"`{reason.stage}/{reason.code}`", summary.label(reason.status)
            message = _cell(reason.message)
            lines.append(f"| {len(reason.sites)} | {status} | {code} | {message} | {reason.sources()} |")
        lines.append("")
    lines += [f"- {note}" for note in summary.notes(coverage)]
    return "\n".join(lines).rstrip() + "\n"


def render(coverage: Coverage, format: str, regressions: Sequence[Site] = ()) -> str:
    """The report in one of FORMATS. Raises ValueError for another name."""
    if format == "html":
        from .render_html import to_html

        return to_html(coverage, regressions)
    makers: dict[str, Callable[[], str]] = {
        "text": lambda: to_text(coverage, regressions=regressions),
        "markdown": lambda: to_markdown(coverage, regressions),
        "json": lambda: coverage.to_json() + "\n",
    }
    if format not in makers:
        raise ValueError(f"unknown report format {format!r}: give one of {', '.join(FORMATS)}")
    return makers[format]()


def format_of(path: str | os.PathLike[str]) -> str:
    """The format that a file name asks for: html, markdown or text by its extension, otherwise json."""
    return _BY_EXTENSION.get(Path(path).suffix.lower(), "json")


def write(
    coverage: Coverage,
    path: str | os.PathLike[str],
    format: str | None = None,
    regressions: Sequence[Site] = (),
) -> None:
    """Write the report to a file, whole or not at all. The format is by default that of the extension.

    Raises OSError when the folder does not exist or cannot be written.
    """
    write_whole(Path(path), render(coverage, format or format_of(path), regressions))


def regression_text(site: Site) -> str:
    """What happened to a site that the baseline had fused."""
    if site.status is Status.FUSED:
        return f"{'gone':16} {site.family:22} {site.source or site.id}: was fused by {site.rule}, is not there any more"
    return describe(site)


def _bar(coverage: Coverage, width: int) -> RenderableType:
    from rich.text import Text

    totals, sites = coverage.totals, len(coverage.sites)
    bar, used = Text(), 0
    legend = Text()
    for status in Status:
        number = totals[status.value]
        if not number:
            continue
        length = max(1, round(width * number / sites))
        length = min(length, max(1, width - used))
        used += length
        bar.append(("█" if status is Status.FUSED else "▒") * length, COLOURS[status])
        legend.append("█ " if status is Status.FUSED else "▒ ", COLOURS[status])
        legend.append(f"{number} {summary.label(status)}   ")
    return bar + Text("\n") + legend


def _family_table(coverage: Coverage) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=False)
    table.add_column("Family, rule", no_wrap=True)
    table.add_column("Sites", justify="right")
    table.add_column("Fused", justify="right")
    table.add_column("Kernel")
    table.add_column("Traffic", justify="right", no_wrap=True)
    table.add_column("Where", overflow="fold")
    for position, group in enumerate(summary.by_family(coverage)):
        if position:
            table.add_section()
        colour = "green" if group.fused == len(group.sites) else "yellow" if group.fused else "red"
        share = Text(summary.percent(group.share), colour)
        table.add_row(Text(group.name, "bold"), Text(str(len(group.sites)), "bold"), share, "", _traffic(group), "")
        for row in group.rows:
            status = row.status
            style = COLOURS[status] if status else ""
            fused = str(row.fused) if row.fused else "-"
            kernel = row.kernels + (f" ({row.absorbed} in a wider one)" if row.absorbed else "")
            table.add_row(
                Text("  " + row.name, style), str(len(row.sites)), fused, kernel, _traffic(row), row.sources()
            )
    return table


def _family_list(coverage: Coverage) -> RenderableType:
    from rich.text import Text

    text = Text(f"{'Family, rule':36}{'Sites':>6}{'Fused':>8}{'Traffic':>9}  Kernel", "bold")
    for group in summary.by_family(coverage):
        colour = "green" if group.fused == len(group.sites) else "yellow" if group.fused else "red"
        text.append(f"\n\n{group.name:36}{len(group.sites):>6}", "bold")
        text.append(f"{summary.percent(group.share):>8}", colour)
        text.append(f"{_traffic(group):>9}")
        for row in group.rows:
            status = row.status
            text.append(f"\n  {row.name:34}", COLOURS[status] if status else "")
            text.append(f"{len(row.sites):>6}{row.fused or '-':>8}{_traffic(row):>9}  {_kernel(row)}")
            if where := row.sources():
                text.append(f"\n      {where}", "dim")
    return text


def _reason_list(reasons: list[summary.ReasonGroup]) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = []
    for reason in reasons:
        head = Text(f"{len(reason.sites):>5} ", "bold")
        head.append(summary.label(reason.status), COLOURS[reason.status])
        head.append(f"  {reason.stage}/{reason.code}", "bold")
        head.append(f"  {reason.families}", "dim")
        more = f" (one of {reason.variants} such messages)" if reason.variants > 1 else ""
        body = Text(reason.message + more)
        if where := reason.sources():
            body.append("\n" + where, "dim")
        parts += [head, Padding(body, (0, 0, 0, 6))]
    return Group(*parts)


def _kernel(group: summary.Group) -> str:
    if group.absorbed == len(group.sites):
        return "in a wider one"
    return group.kernels + (f", {group.absorbed} in a wider one" if group.absorbed else "")


def _traffic(group: summary.Group) -> str:
    moved = summary.traffic(group.sites)
    return f"-{moved.saved:.0%}" if moved.before else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
