"""Kernels compiled in other processes, while Inductor works in this one.

    start(modules)    helpers begin to import, seconds before they are needed
    submit(job)       a helper compiles the job into its library's folder of compiled kernels
    wait(job)         until that is done: the caller loads the kernel from there, or compiles it where that failed

The CuTe DSL compiles one kernel at a time in a process, whatever the threads, and takes seconds for each. A job names a
function and its arguments, ``("dkfuse.kernels.gemm_ahead:compile_kind", "bfloat16", "none", ...)``. Nothing comes back
but whether it succeeded: where it did not, the caller compiles, and what it raises then is the error.

Helpers (`compile_helper`) run this interpreter with this path, without the user's script, and see no GPU. They end when
idle for a minute, and with this process. Where one cannot be started, dies or takes too long, there are no more of them
in this process.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("dkfuse")
Job = tuple[Any, ...]  # "module:function" and its arguments, which JSON can carry
MOST = 6  # helpers on one machine, of some 670 MB of memory each
IDLE, LIMIT = 60.0, 180.0  # seconds
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


class Pool:
    """At most `most` helpers, that end after `idle` seconds without a job and have `limit` seconds for each."""

    def __init__(self, most: int = MOST, idle: float = IDLE, limit: float = LIMIT):
        self.most, self.idle, self.limit = most, idle, limit
        self._reset()

    def _reset(self) -> None:
        """As in a new process."""
        self.problem: str | None = None  # why there will be no more helpers
        self.started = 0
        self.jobs: dict[Job, Future[Done]] = {}
        self._queue: queue.Queue[Job] = queue.Queue()
        self._helpers: list[_Helper] = []
        self._lock = threading.Lock()

    def start(self, modules: Iterable[str], environment: Mapping[str, str], jobs: int = 1) -> None:
        """Have a helper for each job that is not done and `jobs` more, as far as there may be so many.

        modules: what they import; environment: variables that ours lacks.
        """
        with self._lock:
            jobs += sum(not future.done() for future in self.jobs.values())
            while len(self._helpers) < min(self.most, jobs) and self.problem is None:
                helper = _Helper(self, list(modules), {**environment, **os.environ, "CUDA_VISIBLE_DEVICES": ""})
                self._helpers.append(helper)
                self.started += 1
                helper.start()

    def submit(self, job: Job) -> bool:
        """Queue `job` for the helpers, once in this process. False where nothing is to be waited for: it is done."""
        with self._lock:
            if job not in self.jobs:
                if self.problem is not None:
                    return False
                self.jobs[job] = Future()
                self._queue.put(job)
            return not self.jobs[job].done()

    def wait(self, job: Job) -> Done | None:
        """What became of a submitted job. None: it is the caller's, who is faster where no helper has begun it yet."""
        future = self.jobs.get(job)
        if future is None or future.cancel():
            return None
        try:
            done = future.result(self.limit)
        except concurrent.futures.TimeoutError:
            done = Done(f"not compiled after {self.limit:.0f} s")
            self.give_up(str(done.error))
            self.kill()
        if done.error is not None:
            log.info("dkfuse: %s is compiled in this process: %s", job, done.error)
        return done

    def finished(self) -> dict[Job, Done]:
        """The jobs that helpers are done with."""
        with self._lock:
            return {j: f.result() for j, f in self.jobs.items() if f.done() and not f.cancelled()}

    def give_up(self, problem: str) -> None:
        """Let the helpers do no more than what they have begun."""
        with self._lock:
            self.problem = self.problem or problem
            for future in self.jobs.values():
                future.cancel()

    def kill(self) -> None:
        """End the helpers, whatever they do."""
        with self._lock:
            helpers = list(self._helpers)
        for helper in helpers:
            helper.kill()

    def next(self, helper: _Helper) -> Job | None:
        """The next job for `helper`, None where it is to end. Called in its thread."""
        while self.problem is None:
            try:
                return self._queue.get(timeout=self.idle)
            except queue.Empty:
                with self._lock:
                    if self._queue.empty():
                        self.leave(helper)
                        return None
        return None

    def leave(self, helper: _Helper) -> None:
        """`helper` takes no more jobs."""
        if helper in self._helpers:
            self._helpers.remove(helper)


class _Helper(threading.Thread):
    """One helper process, and the thread of this one that gives it jobs."""

    def __init__(self, pool: Pool, modules: list[str], environment: Mapping[str, str]):
        super().__init__(name="dkfuse-compile-helper", daemon=True)
        self.pool, self.modules, self.environment = pool, modules, environment
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        try:
            self._serve()
        except (OSError, ValueError) as error:  # it cannot be started, it ended, it answers nonsense
            log.info("dkfuse: kernels are compiled in this process from now on: %s", error)
            self.pool.give_up(str(error))
        finally:
            self.pool.leave(self)
            self.kill()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _serve(self) -> None:
        about = [os.getpid(), list(map(str, sys.path)), self.modules, self.pool.limit]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("DKFUSE_DEBUG") == "1" else subprocess.DEVNULL,
            env=dict(self.environment),
            bufsize=0,  # a buffer has a lock, which a thread of this kind may hold for ever when Python ends
            start_new_session=True,  # Ctrl-C is for this process
        )
        if (ready := self._answer()).error is not None:
            raise OSError(f"a helper could not import what it needs: {ready.error}")
        log.info("dkfuse: helper %d has imported what it needs in %.1f s", ready.pid, ready.seconds)
        while (job := self.pool.next(self)) is not None:
            future = self.pool.jobs[job]
            if not future.set_running_or_notify_cancel():
                continue
            try:
                assert self.process.stdin is not None
                self.process.stdin.write(json.dumps([job[0], job[1:]]).encode() + b"\n")
                done = self._answer()
            except (OSError, ValueError) as error:
                future.set_result(Done(str(error)))
                raise
            future.set_result(done)
            log.info("dkfuse: %s by process %d in %.1f s: %s", job, done.pid, done.seconds, done.error or "compiled")

    def _answer(self) -> Done:
        assert self.process is not None and self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise OSError(f"a helper ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        return Done(answer["error"], answer["seconds"], self.process.pid)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _share(processors: int) -> int:
    """How many helpers this process may have: the ranks on a machine, of which torchrun tells, share them."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    count = int(ranks) if ranks.isdigit() and int(ranks) else 1
    return max(1, min(MOST // count, (processors // count - 1) // 2))


POOL = Pool(_share(_processors()))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=POOL._reset)  # the helpers are the parent's


def allowed() -> bool:
    """Whether there may be helpers: there is a processor for them, and Inductor has processes of its own too.

    TORCHINDUCTOR_COMPILE_THREADS=1 asks for neither. Without an interpreter to start there are none either.
    """
    from dkfuse import compat

    if sys.platform != "linux" or _processors() < 2 or compat.inductor_config("compile_threads") == 1:
        return False
    return POOL.problem is None and bool(sys.executable) and not getattr(sys, "frozen", False)
