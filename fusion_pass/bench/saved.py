"""Reading what `dkfuse bench model --json` and `dkfuse bench kernels --json` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ReportError
from . import kernels, results
from .results import ModelResult


@dataclass
class Saved:
    """One file: what it was measured on, and `models` or `rows` of kernels."""

    path: Path
    schema: str
    device: str
    torch: str
    date: str
    versions: dict[str, str] = field(default_factory=dict)
    models: list[ModelResult] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    copy_tb_per_s: float | None = None

    @property
    def about(self) -> str:
        """Device, versions and date in one line."""
        packages = [f"{name} {version}" for name, version in self.versions.items()]
        return ", ".join((self.device, f"torch {self.torch}", *packages, self.date))


def read(path: Path) -> Saved:
    """The file's content. Raises ReportError for one that cannot be read, is no bench's, or lacks something."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8 or not JSON
        raise ReportError(f"{path} is not JSON ({error}); {_WANTED}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema not in (results.SCHEMA, kernels.SCHEMA):
        raise ReportError(f"{path} has schema {schema!r}; {_WANTED}")
    try:
        found = Saved(path, schema, data["device"], data["torch"], data["date"], data.get("versions", {}))
        if schema == results.SCHEMA:
            found.models = [ModelResult.from_dict(row) for row in data["models"]]
        else:
            found.rows, found.copy_tb_per_s = [_row(row) for row in data["rows"]], data["copy_tb_per_s"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path} is damaged ({type(error).__name__}: {error}); measure again") from error
    return found


def merged(files: Sequence[Saved]) -> list[Saved]:
    """Files of one schema, device, day and set of versions as one: a long bench may be run in parts."""
    found: dict[tuple[str, str], Saved] = {}
    for one in files:
        first = found.setdefault((one.schema, one.about), replace(one, models=[], rows=[]))
        first.models += one.models
        first.rows += one.rows
    return list(found.values())


_WANTED = (
    f"give files of `dkfuse bench model --json` ({results.SCHEMA}) or `dkfuse bench kernels --json` ({kernels.SCHEMA})"
)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """The row, once all that a table reads was seen in it."""
    for name in ("op", "case", "shape", "best"):
        row[name]
    for entry in (*row["providers"].values(), *row["rivals"].values(), *row["peers"]):
        if "problem" not in entry:
            entry["microseconds"], entry["of_copy"]
    return row
