"""A process that compiles kernels for the one that started it, `compile_ahead`, and uses no GPU.

    reads     ["module:function", [argument, ...]]           a line a job, JSON
    answers   {"error": null or a sentence, "seconds": s}    a line a job, and one first, when `modules` are imported

It ends when nothing more can be asked of it: its input is closed, or its parent is gone. A job that is being worked on
is finished first, so that no file of a compiled kernel is cut short; one that takes longer than `limit` ends it.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

PATIENCE = 2.0  # seconds between looks for the parent: another child of its may keep our input open


def main(parent: int, modules: list[str], limit: float) -> None:
    """Serve the process `parent` until it is gone."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what compilers print is no answer
    _answer(answers, partial(_import, modules), limit)
    for line in _lines(parent):
        name, arguments = json.loads(line)
        _answer(answers, partial(_call, name, arguments), limit)


def _answer(answers: int, work: Callable[[], None], limit: float) -> None:
    started, error = time.perf_counter(), None
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        work()
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    faulthandler.cancel_dump_traceback_later()
    answer: dict[str, Any] = {"error": error, "seconds": time.perf_counter() - started}
    os.write(answers, json.dumps(answer).encode() + b"\n")


def _import(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)


def _call(name: str, arguments: list[Any]) -> None:
    module, _, function = name.partition(":")
    getattr(importlib.import_module(module), function)(*arguments)


def _lines(parent: int) -> Iterator[bytes]:
    """Lines of the input; no more once the parent is gone."""
    pending = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], PATIENCE)[0]:
            continue
        if not (data := os.read(0, 1 << 16)):
            return
        *lines, pending = (pending + data).split(b"\n")
        yield from lines
