"""The process that compiles kernels for the one that started it, `compile_ahead`, and uses no GPU.

    reads     [number, "module:function", [argument, ...]]                            a line a job, JSON
    answers   {"job": number, "error": null or a sentence, "seconds": s, "pid": p}    a line a job

The first answer, to job null, comes when `modules` are imported. That takes seconds, a fork milliseconds: each job is
done by a child, which has the modules as they are here, and does not share what it breaks. Nothing here starts a thread
or a GPU, which forks would not survive.

A child that takes longer than `limit` ends. The process ends when nothing more can be asked of it: its input is closed,
or its parent is gone. What is being compiled is finished first, so that no file of a kernel is cut short.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import select
import time
from dataclasses import dataclass
from typing import Any, NoReturn

PATIENCE = 2.0  # seconds between looks for the parent: another child of its may keep our input open


@dataclass(frozen=True)
class Child:
    """A job that is being worked on."""

    pid: int
    number: int
    started: float


def main(parent: int, modules: list[str], limit: float) -> None:
    """Serve the process `parent` until it is gone."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what compilers print is no answer
    started = time.perf_counter()
    faulthandler.dump_traceback_later(limit, exit=True)
    error = _import(modules)
    faulthandler.cancel_dump_traceback_later()
    gc.collect()
    gc.freeze()  # children share what is never written
    Server(parent, answers, limit).serve(error, time.perf_counter() - started)


def _import(modules: list[str]) -> str | None:
    """Import what can be imported; why nothing could."""
    errors = []
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a package raises: a job that needs it says so
            errors.append(f"{type(error).__name__}: {error}")
    return "; ".join(errors) if errors and len(errors) == len(modules) else None


class Server:
    """Gives each line of the input to a child, and answers when that has ended."""

    def __init__(self, parent: int, answers: int, limit: float):
        self.parent, self.answers, self.limit = parent, answers, limit
        self.children: dict[int, Child] = {}  # by the end of a pipe that is readable when the child says how it went
        self.pending = b""
        self.asked = True  # whether there may be more jobs

    def serve(self, error: str | None, seconds: float) -> None:
        self._answer(None, error, seconds, os.getpid())
        while self.asked or self.children:
            self.asked = self.asked and os.getppid() == self.parent
            for ready in select.select([*self.children, *([0] if self.asked else [])], [], [], PATIENCE)[0]:
                if ready == 0:
                    self._read()
                else:
                    self._end(ready)

    def _read(self) -> None:
        data = os.read(0, 1 << 16)
        self.asked = bool(data)
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            self._begin(*json.loads(line))

    def _begin(self, number: int, name: str, arguments: list[Any]) -> None:
        reader, writer = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:  # no memory, too many processes
            os.close(reader)
            os.close(writer)
            self._answer(number, f"no child can be started: {error}", 0.0, os.getpid())
            return
        if pid == 0:
            _work(self.answers, writer, name, arguments, self.limit)
        os.close(writer)
        self.children[reader] = Child(pid, number, time.perf_counter())

    def _end(self, reader: int) -> None:
        """Answer for a child that has said how it went, or that died, which closes its end of the pipe."""
        child, said = self.children.pop(reader), os.read(reader, 1 << 16)
        os.close(reader)
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        error = json.loads(said) if said else f"the process that compiled it ended with exit code {code}"
        self._answer(child.number, error, time.perf_counter() - child.started, child.pid)

    def _answer(self, number: int | None, error: str | None, seconds: float, pid: int) -> None:
        line = json.dumps({"job": number, "error": error, "seconds": seconds, "pid": pid})
        with contextlib.suppress(BrokenPipeError):  # nobody is there to hear it
            os.write(self.answers, line.encode() + b"\n")


def _work(answers: int, writer: int, name: str, arguments: list[Any], limit: float) -> NoReturn:
    """Do a job, say into the pipe how it went, and end, whatever happens."""
    try:
        os.close(answers)  # who reads them must not wait for this process
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.dump_traceback_later(limit, exit=True)
        error = None
        try:
            module, _, function = name.partition(":")
            getattr(importlib.import_module(module), function)(*arguments)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"[:600]  # a pipe takes that at once
        os.write(writer, json.dumps(error).encode())
    finally:
        os._exit(0)  # not what Python and libraries do at the end of the process that this one is a copy of
