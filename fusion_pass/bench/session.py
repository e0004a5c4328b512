"""What the commands of `dkfuse bench` do once their arguments are checked: measure with progress, print, save."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import compat
from ..cli.exits import ENVIRONMENT, Failure, say
from ..errors import ModelError, SettingsError, first_line
from ..files import write_whole
from . import kernels as work
from . import measure, show_kernels, show_models, show_starts
from . import starts as work_starts
from .device import Device
from .results import ModelResult, report
from .sides import Options
from .steps import steps
from .targets import Target

WIDTH = 150  # columns of tables that are not printed on a terminal


def models(
    found: Sequence[Target], options: Options, device: Device, top: int, json_: Path | None, picture: Path | None
) -> tuple[list[ModelResult], list[str]]:
    """Measure, print and save model by model, so that a run cut short keeps what it has.

    The results, and a sentence for each model that could not be measured.
    """
    out = console()
    compat.quiet_autotuning()
    if device.kind != "cpu":
        compat.skip_vector_trial()
    out.print(f"{device.name}, torch {torch.__version__}", style="bold")
    out.print()
    results: list[ModelResult] = []
    failed: list[str] = []
    with steps(Console(stderr=True)) as step:
        step("compiling a small model")
        measure.prime(device)
        for i, target in enumerate(found):
            at = f"{i + 1} of {len(found)}, " if len(found) > 1 else ""
            try:
                result = measure.measure(target, options, device, say=lambda text, at=at: step(at + text))  # type: ignore[misc]
            except SettingsError:
                raise
            except Exception as error:
                if isinstance(error, ModuleNotFoundError) or (isinstance(error, ImportError) and len(found) == 1):
                    raise Failure(ENVIRONMENT, f"{first_line(error)}; pip install 'dkfuse[diffusers]'") from error
                if isinstance(error, ModelError) and len(found) == 1:
                    raise
                if os.environ.get("DKFUSE_DEBUG") == "1":
                    traceback.print_exception(error)
                failed.append(f"{target.label}: {type(error).__name__}: {first_line(error)}")
                say(failed[-1])
                continue
            results.append(result)
            show_models.print_result(result, out)
            _print_top(result, out, top)
            _save(json_, json.dumps(report(results, device.name), indent=1))
            _save(picture, show_models.picture(results, device.name))
    return results, failed


def starts(
    found: Sequence[Target], options: Options, device: Device, json_: Path | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The same of the times that processes take to their first result."""
    out = console()
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    with steps(Console(stderr=True)) as step:
        for i, target in enumerate(found):
            at = f"{i + 1} of {len(found)}, " if len(found) > 1 else ""
            try:
                rows.append(work_starts.measure(target, options, device.kind, lambda text, at=at: step(at + text)))  # type: ignore[misc]
            except work_starts.StartError as error:
                failed.append(str(error))
                say(failed[-1])
                continue
            _save(json_, json.dumps(work_starts.report(rows, device.name), indent=1))
    if rows:
        show_starts.print_rows(rows, out, f"{device.name}, torch {torch.__version__}")
    return rows, failed


def _print_top(result: ModelResult, console: Console, top: int) -> None:
    for name, side in result.sides.items() if top else ():
        console.print(f"{name}:")
        for kernel, spent in list(side.kernels.items())[:top]:
            console.print(f"  {spent:8.3f} ms  {kernel[:110]}", markup=False)


def kernels(
    chosen: Sequence[Any],
    wanted: Sequence[str] | None,
    rivals: Sequence[str],
    peers: bool,
    device: Device,
    json_: Path | None,
    picture: Path | None,
    write_crossovers: Path | None,
) -> None:
    """Time the cases, print and save them."""
    compat.quiet_autotuning()
    rows: list[dict[str, Any]] = []
    with steps(Console(stderr=True)) as step:
        step("timing a large copy")
        peak = work.PEAK_BYTES / device.copy(work.PEAK_BYTES)
        for i, case in enumerate(chosen):
            step(f"{i + 1} of {len(chosen)}, {case.op}: {case.name}")
            rows.append(work.measure(case, peak, wanted, rivals, peers))
            device.free()
            _save(json_, json.dumps(work.report(rows, device.name, peak), indent=1))
            _save(picture, show_kernels.picture(rows, device.name))
    if write_crossovers:
        as_json = write_crossovers.suffix == ".json"
        _save(write_crossovers, show_kernels.crossovers_text(rows, device.name, torch.__version__, as_json))
    out = console()
    title = f"{device.name}, torch {torch.__version__}, large copy {peak / 1e6:.2f} TB/s"
    show_kernels.print_rows(rows, out, title)


def console(width: int = WIDTH) -> Console:
    """Stdout; `width` columns wide where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def _save(path: Path | None, text: str) -> None:
    if path is None:
        return
    try:
        write_whole(path, text)
    except OSError as error:
        raise Failure(ENVIRONMENT, f"cannot write {path}: {error.strerror or error}") from error
