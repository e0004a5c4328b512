"""The helper of `compile_ahead` as this process sees it: started, asked, heard, and ended.

    helper = Helper(owner, modules, environment, idle, limit)
    helper.start()                 a process begins to import `modules`; `owner` hears of it when it has
    helper.ask(number, job)        `owner` hears what became of it

Jobs are written into the process's input and answers read from its output, a line each (`compile_helper`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

log = logging.getLogger("dkfuse")
Job = tuple[Any, ...]  # "module:function" and its arguments, which JSON can carry
_START = (
    "import json, sys; parent, path, modules, limit = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from dkfuse.kernels.compile_helper import main; main(parent, modules, limit)"
)


@dataclass(frozen=True)
class Done:
    """What became of a job: compiled by the process `pid` in `seconds`, or why it was not."""

    error: str | None
    seconds: float = 0.0
    pid: int | None = None


class Owner(Protocol):
    """Who is told what the helper's thread hears."""

    problem: str | None

    def dispatch(self) -> None:
        """It can be asked, or has to be told to stop."""

    def answered(self, number: int, done: Done) -> None:
        """It is done with a job."""

    def give_up(self, problem: str) -> None:
        """There is to be no helper any more."""

    def leave(self, helper: Helper, busy: bool = True) -> bool:
        """It ends, whatever it was asked for; busy=False: may it end, because it is asked for nothing?"""


class Helper(threading.Thread):
    """The helper process, and the thread of this one that hears its answers and tells `owner` of them."""

    def __init__(self, owner: Owner, modules: list[str], environment: Mapping[str, str], idle: float, limit: float):
        super().__init__(name="dkfuse-compile-helper", daemon=True)
        self.owner, self.modules, self.environment = owner, modules, environment
        self.idle, self.limit = idle, limit
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False

    def run(self) -> None:
        try:
            self._serve()
        except (OSError, ValueError, KeyError) as error:  # it cannot be started, it ended, it answers nonsense
            log.info("dkfuse: kernels are compiled in this process from now on: %s", error)
            self.owner.give_up(str(error))
        finally:
            self.owner.leave(self)
            self.kill()

    def ask(self, number: int, job: Job) -> None:
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, of which its thread hears
            self.process.stdin.write(json.dumps([number, job[0], job[1:]]).encode() + b"\n")

    def stop(self) -> None:
        """Ask for nothing more: it ends when it has done what it has begun."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # its children too
            self.process.wait()

    def _serve(self) -> None:
        about = [os.getpid(), list(map(str, sys.path)), self.modules, self.limit]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("DKFUSE_DEBUG") == "1" else subprocess.DEVNULL,
            env=dict(self.environment),
            bufsize=0,  # a buffer has a lock, which a thread of this kind may hold for ever when Python ends
            start_new_session=True,  # Ctrl-C is for this process
        )
        self.owner.dispatch()  # it may be to stop already
        assert self.process.stdout is not None
        answers = select.poll()
        answers.register(self.process.stdout, select.POLLIN)
        pending = b""
        while True:
            if self.ready and not answers.poll(1000 * self.idle):
                if self.owner.leave(self, busy=False):
                    return
                continue
            if not (data := self.process.stdout.read(1 << 16)):
                if self.owner.problem is not None:  # it was stopped
                    return
                raise OSError(f"a helper ended with exit code {self.process.wait()}")
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))

    def _hear(self, answer: dict[str, Any]) -> None:
        if answer["job"] is not None:
            self.owner.answered(answer["job"], Done(answer["error"], answer["seconds"], answer["pid"]))
            return
        if answer["error"] is not None:
            raise OSError(f"a helper could not import what it needs: {answer['error']}")
        log.info("dkfuse: helper %d has imported what it needs in %.1f s", answer["pid"], answer["seconds"])
        self.ready = True
        self.owner.dispatch()
