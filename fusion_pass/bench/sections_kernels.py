"""Saved benches of kernels as tables: one for each op with a line for each case, and geometric means.

The numbers are those of Triton's kernel, which `dkfuse.kernels` takes where nothing else is asked for, or of the
fastest provider where Triton's was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .providers import TRITON
from .saved import Saved
from .sections import Column, Section, tabulated, without_empty
from .show_kernels import TITLES

CAPTION = (
    "Cold inputs. Of copy: the time of a copy of as many bytes / the kernel's, Triton's where it was measured. "
    "x Inductor and so on: their time for the model's own code / the kernel's. Providers and peers: Triton's time / "
    "theirs, below 1 they are slower. Error: relative RMS error against fp64, and eager's."
)


def sections(saved: Saved) -> list[Section]:
    """A section on what was measured, one for each op, and one of geometric means."""
    copy = f", large copy {saved.copy_tb_per_s:.2f} TB/s" if saved.copy_tb_per_s else ""
    found = [Section(f"Kernels: {saved.about}{copy}", CAPTION)]
    ops = list(dict.fromkeys(row["op"] for row in saved.rows))
    for op in ops:
        rows = [row for row in saved.rows if row["op"] == op]
        titles, cells = tabulated(_columns(rows), [row for row in rows if ours(row) is not None])
        missing = [f"{row['case']}: no kernel was timed ({_problem(row)})" for row in rows if ours(row) is None]
        found.append(Section(op, "", titles, cells, missing, level=3))
    means: list[list[str]] = []
    rivals = list(dict.fromkeys(name for row in saved.rows for name in row["rivals"]))
    columns = _speeds(rivals)
    for op in ops:
        rows = [row for row in saved.rows if row["op"] == op and ours(row) is not None]
        means.append([op, str(len(rows)), *(column.mean(rows) for column in columns)])
    titles, means = without_empty(["op", "cases", *(column.title for column in columns)], means)
    found.append(Section("Geometric means", "", titles, means, level=3))
    return found


def ours(row: dict[str, Any]) -> str | None:
    """The provider whose numbers are shown: Triton, or the fastest where Triton's was not timed."""
    return TRITON if "microseconds" in row["providers"].get(TRITON, {}) else row["best"]


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    return row["providers"][ours(row)]


def _columns(rows: Sequence[dict[str, Any]]) -> list[Column]:
    rivals = list(dict.fromkeys(name for row in rows for name in row["rivals"]))
    others = [name for name in dict.fromkeys(n for row in rows for n in row["providers"]) if name != TRITON]
    return [
        Column("case", lambda row: row["case"]),
        Column("shape", lambda row: "x".join(map(str, row["shape"]))),
        *_speeds(rivals),
        Column("best", lambda row: row["best"]),
        *(Column(name, _against(lambda row, name=name: row["providers"].get(name))) for name in others),  # type: ignore[misc]
        Column("peers", _peers),
        Column("error, eager's", _errors),
    ]


def _speeds(rivals: Sequence[str]) -> list[Column]:
    faster = [
        Column(f"x {TITLES.get(n, n)}", _faster(n), "{:.2f}x") for n in sorted(rivals, key=lambda n: n == "eager")
    ]
    return [Column("of copy", lambda row: _entry(row)["of_copy"]), *faster]


def _faster(rival: str) -> Callable[[dict[str, Any]], float | None]:
    def read(row: dict[str, Any]) -> float | None:
        theirs = row["rivals"].get(rival, {}).get("microseconds")
        return theirs / _entry(row)["microseconds"] if theirs else None

    return read


def _against(entry: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Callable[[dict[str, Any]], float | None]:
    def read(row: dict[str, Any]) -> float | None:
        theirs = (entry(row) or {}).get("microseconds")
        base = row["providers"].get(TRITON, {}).get("microseconds")
        return base / theirs if theirs and base else None

    return read


def _peers(row: dict[str, Any]) -> str | None:
    parts: dict[str, list[str]] = {}
    for peer in row["peers"]:
        ratio = _against(lambda _, peer=peer: peer)(row)  # type: ignore[misc]
        if ratio is not None:
            parts.setdefault(peer["part"], []).append(f"{peer['name']} {ratio:.2f}")
    return "; ".join(f"{part}: {', '.join(names)}" for part, names in parts.items()) or None


def _errors(row: dict[str, Any]) -> str | None:
    error, eager = _entry(row).get("error"), row["rivals"].get("eager", {}).get("error")
    return ", ".join(f"{value:.1e}" for value in (error, eager) if value is not None) or None


def _problem(row: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {entry['problem']}" for name, entry in row["providers"].items() if "problem" in entry)
