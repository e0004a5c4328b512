"""What `dkfuse kernels` prints: who can run which op, and who would run a given call."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

WIDEST = 120  # characters of a line of prose; narrower where the terminal is


def print_table(rows: list[dict[str, Any]], constraints: bool) -> None:
    """One line per provider under a heading per op; with `constraints` a bullet for each below it."""
    console = Console(highlight=False, soft_wrap=True)
    width = min(console.width, WIDEST)
    names = max(len(row["provider"]) for row in rows)
    devices = max(len(_devices(row)) for row in rows)
    for number, (op, group) in enumerate(groupby(rows, key=lambda row: row["op"])):
        if number:
            console.print()
        console.print(Text(op, "bold"))
        for row in group:
            start = f"  {row['provider']:{names}}  {_devices(row):{devices}}  "
            for line in _provider(start, row, width):
                console.print(line)
            for text in (c["text"] for c in row["constraints"]) if constraints else ():
                for bullet in _wrapped(text, width, " " * (names + 4) + "- "):
                    console.print(Text(bullet, "dim"))
    if not constraints:
        console.print(Text("\nWhat each asks of a call: dkfuse kernels OP, or --constraints", "dim"))


def print_verdicts(found: list[dict[str, Any]]) -> None:
    """Who runs each call, and below it why each other provider does not."""
    console = Console(highlight=False, soft_wrap=True)
    width = min(console.width, WIDEST)
    names = max((len(other["provider"]) for verdict in found for other in verdict["others"]), default=0)
    for number, verdict in enumerate(found):
        if number:
            console.print()
        title = Text(f"{verdict['op']} {verdict['shape']} {verdict['dtype']} on {verdict['target']}: ", "bold")
        title.append(verdict["provider"] or "left to Inductor", "bold green" if verdict["provider"] else "bold yellow")
        if verdict["speed_against_triton"] and verdict["provider"] != "triton":
            title.append(f", {verdict['speed_against_triton']:.2f} of Triton's speed", "dim")
        if verdict.get("config"):
            title.append(f", {verdict['config']}", "dim")
        console.print(title)
        if verdict["reason"] and verdict["reason"] not in [other["message"] for other in verdict["others"]]:
            for line in _wrapped(verdict["reason"], width, "  "):
                console.print(Text(line, "yellow"))
        for other in verdict["others"]:
            message = other["message"].removeprefix(f"{other['provider']}: ").removeprefix(f"{other['provider']} ")
            start = f"  {other['provider']:{names}}  "
            for index, line in enumerate(_wrapped(f"{other['code']}: {message}", width, start)):
                console.print(_dimmed(line, len(start) if index == 0 else 0))


def _provider(start: str, row: dict[str, Any], width: int) -> Iterator[Text]:
    """A provider's line; where its state does not fit beside it, more lines below."""
    if row["available"]:
        yield Text.assemble(start, (f"✓ {row['version'] or ''}".rstrip(), "green"))
        return
    what, _, command = row["reason"].partition(": pip ")
    state = [what, f"pip {command}"] if command else [what]
    if len(start) + len(row["reason"]) <= width:
        state = [row["reason"]]
    lines = [line for part in state for line in _wrapped(part, width, " " * len(start))]
    yield Text.assemble(start, (lines[0].strip(), "dim"))
    for line in lines[1:]:
        yield Text(line, "dim")


def _devices(row: dict[str, Any]) -> str:
    return ", ".join(row["devices"]).replace(" and newer", "+")


def _wrapped(text: str, width: int, start: str) -> list[str]:
    """`text` in lines after `start`, continued under its first word; a command to paste stays in one piece."""
    lines = textwrap.wrap(
        text.replace("pip install ", "pip\0install\0"),
        width,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [line.replace("\0", " ") for line in lines]


def _dimmed(line: str, plain: int) -> Text:
    return Text.assemble(line[:plain], (line[plain:], "dim"))


__all__ = ["print_table", "print_verdicts"]
