"""Kernels compiled in other processes, while Inductor works in this one.

    start(modules)    a helper begins to import, seconds before it is needed
    submit(job)       it has the job compiled into its library's folder of compiled kernels, several at a time
    guess(job)        the same while it has nothing else to do, for a job that is likely to be submitted
    wait(job)         until that is done: the caller loads the kernel from there, or compiles it where that failed

The CuTe DSL compiles one kernel at a time in a process, whatever the threads, and takes seconds for each. A job names a
function and its arguments, ``("dkfuse.kernels.gemm_ahead:compile_kind", "bfloat16", "none", ...)``. Nothing comes back
but whether it succeeded: where it did not, the caller compiles, and what it raises then is the error.

The helper (`compile_helper`) runs this interpreter with this path, without the user's script, sees no GPU, and forks a
child for each job. It ends when idle for five minutes, and with this process. Where it cannot be started, ends by
itself, or has a job that takes too long, there is none any more in this process.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future

from .compile_process import Done, Helper, Job

log = logging.getLogger("dkfuse")
MOST = 6  # jobs at a time on one machine, of some 100 MB of memory each beside the 400 MB of the helper
IDLE, LIMIT = 300.0, 180.0  # seconds


class Pool:
    """A helper that does `most` jobs at a time, ends after `idle` seconds without one, and has `limit` for each.

    guesses: how many of the jobs that it does may be guessed.
    """

    def __init__(self, most: int = MOST, idle: float = IDLE, limit: float = LIMIT, guesses: int = 0):
        self.most, self.idle, self.limit, self.guesses = most, idle, limit, guesses
        self._reset()

    def _reset(self) -> None:
        """As in a new process."""
        self.problem: str | None = None  # why there will be no more helpers
        self.started = 0  # helpers, one after the other
        self.jobs: dict[Job, Future[Done]] = {}
        self.helper: Helper | None = None
        self._waiting: deque[Job] = deque()
        self._guessed: deque[Job] = deque()  # none of them submitted
        self._running: dict[int, Job] = {}  # by the numbers that the helper knows them by
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def start(self, modules: Iterable[str], environment: Mapping[str, str]) -> None:
        """Have a helper, as far as there may be one. modules: what it imports; environment: variables ours lacks."""
        with self._lock:
            if self.helper is None and self.problem is None and self.most > 0:
                variables = {**environment, **os.environ, "CUDA_VISIBLE_DEVICES": ""}
                self.helper = Helper(self, list(modules), variables, self.idle, self.limit)
                self.started += 1
                self.helper.start()

    def submit(self, job: Job) -> bool:
        """Queue `job` for the helper, once in this process. False where nothing is to be waited for: it is done."""
        with self._lock:
            if job not in self.jobs:
                if self.problem is not None:
                    return False
                if job in self._guessed:
                    self._guessed.remove(job)
                self.jobs[job] = Future()
                self._waiting.append(job)
                self.dispatch()
            return not self.jobs[job].done()

    def guess(self, job: Job) -> None:
        """Queue `job` behind all that is submitted, where there is a processor for it."""
        with self._lock:
            if self.guesses and job not in self.jobs and job not in self._guessed and self.problem is None:
                self._guessed.append(job)
                self.dispatch()

    def wait(self, job: Job) -> Done | None:
        """What became of a submitted job. None: it is the caller's, who is faster where the helper has not begun it."""
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
        """The jobs that the helper is done with."""
        with self._lock:
            return {j: f.result() for j, f in self.jobs.items() if f.done() and not f.cancelled()}

    def give_up(self, problem: str) -> None:
        """Let the helper do no more than what it has begun."""
        with self._lock:
            self.problem = self.problem or problem
            for future in self.jobs.values():
                future.cancel()
            if self.helper is not None:
                self.helper.stop()

    def kill(self) -> None:
        """End the helper and its children, whatever they do."""
        helper = self.helper
        if helper is not None:
            helper.kill()

    # -- for the helper's thread ---------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Give the helper as many jobs as it may have at a time, if it has imported what it needs."""
        with self._lock:
            if self.problem is not None:
                if self.helper is not None:
                    self.helper.stop()
                return
            while self.helper is not None and self.helper.ready and len(self._running) < self.most:
                if self._waiting:
                    job = self._waiting.popleft()
                elif self._guessed and len(self._running) < self.guesses:
                    self.jobs[job := self._guessed.popleft()] = Future()
                else:
                    break
                if self.jobs[job].set_running_or_notify_cancel():
                    number = next(self._numbers)
                    self._running[number] = job
                    self.helper.ask(number, job)

    def answered(self, number: int, done: Done) -> None:
        with self._lock:
            job = self._running.pop(number)
            log.info("dkfuse: %s by process %s in %.1f s: %s", job, done.pid, done.seconds, done.error or "compiled")
            if done.error is not None and done.seconds >= self.limit:
                self.give_up(f"{job[0]} took more than {self.limit:.0f} s")
            self.jobs[job].set_result(done)
            self.dispatch()

    def leave(self, helper: Helper, busy: bool = True) -> bool:
        """`helper` does no more jobs, and those that it has begun fail; busy=False: only where it has nothing to do."""
        with self._lock:
            if self.helper is not helper or (not busy and (self._running or self._waiting)):
                return False
            self.helper = None
            for job in self._running.values():
                self.jobs[job].set_result(Done(self.problem or "the helper ended"))
            self._running.clear()
            return True


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _share(processors: int) -> int:
    """How many helpers this process may have: the ranks on a machine, of which torchrun tells, share them."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    count = int(ranks) if ranks.isdigit() and int(ranks) else 1
    return max(1, min(MOST // count, (processors // count - 1) // 2))


POOL = Pool(_share(_processors()), guesses=_share(_processors()) // 3)
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
