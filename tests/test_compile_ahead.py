"""Jobs that other processes do: several at a time, failing, dying, hanging; no script runs twice, no helper stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dkfuse.kernels import compile_ahead
from dkfuse.kernels.compile_ahead import Pool
from dkfuse.kernels.compile_process import Done

from .conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="helpers are for Linux")
MODULE = "dkfuse_test_jobs"
JOBS = """
    import os, sys, time
    from pathlib import Path

    if name := os.environ.get("DKFUSE_TEST_IMPORTS"):
        with open(name, "a") as file:
            file.write(f"{os.getpid()} ")

    def write(path, name=""):
        print("no answer")
        Path(path).write_text(f"{os.getpid()} {os.environ.get(name)}")

    def meet(mine, other):
        Path(mine).touch()
        end = time.monotonic() + 20
        while not Path(other).exists():
            assert time.monotonic() < end, "alone"
            time.sleep(0.01)

    def sleep(seconds, path):
        Path(path).write_text(str(os.getpid()))
        time.sleep(seconds)
        Path(path).write_text("slept")

    def fail():
        raise KeyError("no such kernel")

    def die():
        os._exit(3)

    def leave():
        sys.exit(0)
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The prefix of the names of jobs."""
    (tmp_path / f"{MODULE}.py").write_text(textwrap.dedent(JOBS))
    monkeypatch.syspath_prepend(tmp_path)
    return f"{MODULE}:"


@pytest.fixture
def pool() -> Iterator[Callable[..., Pool]]:
    """Makes pools whose helpers have started, and end with the test."""
    made: list[Pool] = []

    def start(modules: tuple[str, ...] = (MODULE,), **how: float) -> Pool:
        made.append(Pool(**how))  # type: ignore[arg-type]
        made[-1].start(modules, {"DKFUSE_TEST_VARIABLE": "given"})
        return made[-1]

    yield start
    for one in made:
        one.give_up("the test is over")
        one.kill()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def begun(pool: Pool, job: tuple) -> bool:
    return until(lambda: pool.jobs[job].running() or pool.jobs[job].done())


def alive(pid: int) -> bool:
    """Whether there is such a process, also one that ended and was not waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def process_of(pool: Pool) -> int:
    """The helper's process."""
    assert until(lambda: pool.helper is not None and pool.helper.ready)
    assert pool.helper is not None and pool.helper.process is not None
    return pool.helper.process.pid


def test_a_job_is_done_elsewhere(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    helpers, file = pool(), tmp_path / "out"
    job, gpu = (jobs + "write", str(file), "DKFUSE_TEST_VARIABLE"), (jobs + "write", f"{file}2", "CUDA_VISIBLE_DEVICES")
    assert helpers.submit(job) and helpers.submit(gpu) and begun(helpers, job) and begun(helpers, gpu)
    done = helpers.wait(job)
    assert done is not None and done.error is None and done.pid not in (None, os.getpid())
    assert file.read_text() == f"{done.pid} given"
    other = helpers.wait(gpu)
    assert other is not None and Path(f"{file}2").read_text() == f"{other.pid} ", "it sees no GPU"
    assert not helpers.submit(job), "once"
    assert helpers.finished() == {job: done, gpu: other} and helpers.problem is None


def test_two_at_a_time(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    helpers, (a, b) = pool(most=2), (str(tmp_path / name) for name in "ab")
    both = [(jobs + "meet", a, b), (jobs + "meet", b, a)]
    for job in both:
        helpers.submit(job)
    assert all(begun(helpers, job) for job in both)
    done = [helpers.wait(job) for job in both]
    assert all(d is not None and d.error is None for d in done) and len({d.pid for d in done if d is not None}) == 2


def test_no_guess_is_begun_when_the_pool_gave_up(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    """What was begun is finished: asking for one more would end the helper with it."""
    helpers = pool(most=2, guesses=2)
    short, long = ((jobs + "sleep", seconds, str(tmp_path / name)) for name, seconds in (("short", 0.5), ("long", 1.5)))
    for job in (short, long):
        helpers.submit(job)
    assert begun(helpers, short) and begun(helpers, long)
    helpers.guess((jobs + "write", str(tmp_path / "guess")))
    helpers.give_up("enough")
    done = [helpers.wait(job) for job in (short, long)]
    assert [d.error for d in done if d is not None] == [None, None]
    assert (tmp_path / "long").read_text() == "slept" and not (tmp_path / "guess").exists()


def test_guesses_are_done_behind_all_else(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    """Two jobs and two guesses, two at a time: one guess is begun when a job is done, the other behind it."""
    helpers, (a, b) = Pool(most=2, guesses=1), (str(tmp_path / name) for name in "ab")
    slow, first, second = ((jobs + "sleep", t, str(tmp_path / n)) for n, t in (("slow", 1.0), ("1", 0.01), ("2", 0.01)))
    write = (jobs + "write", str(tmp_path / "w"))
    helpers.guess(first)
    helpers.guess(second)
    for job in (slow, (jobs + "meet", a, b), (jobs + "meet", b, a)):  # the last two only together
        helpers.submit(job)
    helpers.guess(write)
    helpers.guess(slow)
    assert list(helpers._guessed) == [first, second, write], "one that is asked for is no guess"
    assert helpers.submit(write) and list(helpers._guessed) == [first, second]
    order: list[tuple] = []
    helpers.answered = _noting(helpers, order)  # type: ignore[method-assign]
    helpers.start((MODULE,), {})
    try:
        assert until(lambda: len(order) == 6), order
        assert set(order[:4]) == {slow, write, *(j for j in helpers.jobs if j[0].endswith("meet"))}
        assert order[4:] == [first, second] and not helpers.submit(first), "it is done"
    finally:
        helpers.give_up("the test is over")
        helpers.kill()


def _noting(helpers: Pool, order: list[tuple]) -> Callable[[int, Done], None]:
    answered = helpers.answered

    def note(number: int, done: Done) -> None:
        order.append(helpers._running[number])
        answered(number, done)

    return note


def test_a_guess_that_is_asked_for_while_it_is_worked_on(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    helpers, job = pool(guesses=1), (jobs + "sleep", 0.3, str(tmp_path / "out"))
    helpers.guess(job)
    assert until(lambda: job in helpers.jobs and helpers.jobs[job].running())
    assert helpers.submit(job), "it is to be waited for"
    done = helpers.wait(job)
    assert done is not None and done.error is None and (tmp_path / "out").read_text() == "slept"
    without = pool(guesses=0)
    without.guess(job)
    assert not without._guessed and not without.jobs


def test_no_more_than_so_many_at_a_time(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    """The third job waits until one of the others has met its partner."""
    helpers, (a, b) = pool(most=2), (str(tmp_path / name) for name in "ab")
    first, second, third = (jobs + "meet", a, b), (jobs + "sleep", 0.3, str(tmp_path / "c")), (jobs + "meet", b, a)
    for job in (first, second, third):
        helpers.submit(job)
    assert begun(helpers, first) and begun(helpers, second) and not helpers.jobs[third].running()
    assert begun(helpers, third) and helpers.jobs[second].done()
    done = [helpers.wait(job) for job in (first, second, third)]
    assert all(d is not None and d.error is None for d in done)


def test_one_process_imports_for_all_jobs(
    pool: Callable[..., Pool], jobs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DKFUSE_TEST_IMPORTS", str(tmp_path / "imports"))
    helpers = pool(("no_such_module_of_dkfuse", MODULE))  # one that is missing is no reason to do without the others
    helper = process_of(helpers)
    helpers.start((MODULE,), {})  # it is the same one
    done = []
    for number in range(3):
        job = (jobs + "write", str(tmp_path / str(number)))
        assert helpers.submit(job) and begun(helpers, job)
        found = helpers.wait(job)
        assert found is not None
        done.append(found)
    assert helpers.started == 1 and helper not in {d.pid for d in done} and len({d.pid for d in done}) == 3
    assert [d.error for d in done] == [None] * 3 and (tmp_path / "imports").read_text() == f"{helper} "
    assert not any(alive(d.pid) for d in done if d.pid is not None), "they have ended, and were waited for"


@pytest.mark.parametrize(
    ("processors", "ranks", "expected"),
    [
        (2, None, 1),
        (8, None, 3),
        (16, None, 6),
        (128, None, 6),
        (128, "2", 3),
        (128, "8", 1),
        (16, "", 6),
        (16, "0", 6),
    ],
)
def test_ranks_share_the_machine(
    processors: int, ranks: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert compile_ahead._share(processors) == expected


def test_a_failure_is_the_jobs_alone(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    helpers, good = pool(most=1), (jobs + "write", str(tmp_path / "out"))
    for job, words in (((jobs + "fail",), "KeyError: 'no such kernel'"), ((jobs + "missing",), "missing")):
        assert helpers.submit(job) and begun(helpers, job)
        done = helpers.wait(job)
        assert done is not None and done.error is not None and words in done.error
    assert helpers.submit(good) and begun(helpers, good)
    done = helpers.wait(good)
    assert done is not None and done.error is None


def test_what_no_helper_has_begun_is_the_callers(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    helpers, first, second = pool(most=1), tmp_path / "first", tmp_path / "second"
    busy, waiting = (jobs + "sleep", 1.0, str(first)), (jobs + "write", str(second))
    helpers.submit(busy)
    helpers.submit(waiting)
    assert begun(helpers, busy)
    assert helpers.wait(waiting) is None and helpers.wait(("unknown",)) is None
    assert helpers.wait(busy) is not None and first.read_text() == "slept"
    time.sleep(0.1)
    assert not second.exists() and not helpers.submit(waiting)


def test_a_job_that_dies(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    """Of itself or of the system, which is short of memory: the others are done."""
    helpers, file = pool(most=2), tmp_path / "pid"
    killed, queued = (jobs + "sleep", 600, str(file)), (jobs + "write", str(tmp_path / "out"))
    for job in (killed, (jobs + "die",), (jobs + "leave",), queued):
        helpers.submit(job)
    assert begun(helpers, killed) and until(lambda: file.exists() and file.read_text() != "")
    os.kill(int(file.read_text()), signal.SIGKILL)
    assert begun(helpers, queued)
    for job, words in ((killed, "exit code -9"), ((jobs + "die",), "exit code 3"), ((jobs + "leave",), "exit code 0")):
        done = helpers.wait(job)
        assert done is not None and words in str(done.error)
    done = helpers.wait(queued)
    assert done is not None and done.error is None and helpers.problem is None


def test_a_helper_that_dies_is_the_last(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    helpers, file = pool(most=1), tmp_path / "pid"
    busy, queued = (jobs + "sleep", 1.0, str(file)), (jobs + "write", str(tmp_path / "out"))
    helpers.submit(busy)
    helpers.submit(queued)
    helper = process_of(helpers)
    assert begun(helpers, busy) and until(lambda: file.exists() and file.read_text() != "")
    child = int(file.read_text())
    os.kill(helper, signal.SIGKILL)
    done = helpers.wait(busy)
    assert done is not None and "exit code -9" in str(done.error)
    assert until(lambda: helpers.problem is not None) and helpers.wait(queued) is None
    helpers.start((MODULE,), {})
    assert helpers.started == 1 and not helpers.submit((jobs + "write", "elsewhere"))
    assert until(lambda: not alive(child)) and file.read_text() == "slept", "what was begun is finished"


def test_no_more_than_was_begun(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    helpers, file = pool(most=1), tmp_path / "first"
    busy, queued = (jobs + "sleep", 0.5, str(file)), (jobs + "write", str(tmp_path / "out"))
    helpers.submit(busy)
    helpers.submit(queued)
    helper = process_of(helpers)
    assert begun(helpers, busy)
    helpers.give_up("enough")
    done = helpers.wait(busy)
    assert done is not None and done.error is None and file.read_text() == "slept"
    assert helpers.wait(queued) is None and until(lambda: not alive(helper)) and helpers.problem == "enough"
    early = pool()  # before there is a process
    early.give_up("enough")
    assert until(lambda: early.helper is None)


def test_a_job_that_takes_too_long(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    helpers, file = pool(most=1, limit=1.0), tmp_path / "pid"
    job = (jobs + "sleep", 600, str(file))
    helpers.submit(job)
    assert begun(helpers, job) and until(lambda: file.exists() and file.read_text() != "")
    started, pid = time.monotonic(), int(file.read_text())
    done = helpers.wait(job)
    assert time.monotonic() - started < 10 and done is not None and done.error is not None
    assert until(lambda: not alive(pid)) and helpers.problem is not None


def test_helpers_that_cannot_start(
    pool: Callable[..., Pool], jobs: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without = pool(("no_such_module_of_dkfuse",))
    assert until(lambda: without.problem is not None) and "no_such_module_of_dkfuse" in str(without.problem)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    nowhere = pool()
    assert until(lambda: nowhere.problem is not None) and not nowhere.submit((jobs + "fail",))


def test_idle_helpers_end(pool: Callable[..., Pool], jobs: str, tmp_path: Path) -> None:
    helpers = pool(most=1, idle=1.0)
    for number in range(2):
        job = (jobs + "write", str(tmp_path / str(number)))
        helpers.start((MODULE,), {})
        assert helpers.submit(job)
        helper = process_of(helpers)
        assert begun(helpers, job)
        done = helpers.wait(job)
        assert done is not None and done.error is None
        assert until(lambda pid=helper: not alive(pid))
        assert until(lambda: helpers.helper is None)
    assert helpers.started == 2 and helpers.problem is None


SCRIPT = """
    import sys, time
    from pathlib import Path
    folder = Path(sys.argv[1])
    with (folder / "runs").open("a") as runs:
        runs.write("run ")
    sys.path.insert(0, str(folder))
    from dkfuse.kernels.compile_ahead import POOL
    POOL.start(("{module}",), {{}})
    job = ("{module}:sleep", 1.0, str(folder / "job"))
    POOL.submit(job)
    while not (folder / "job").exists():
        time.sleep(0.01)
    {end}
"""


@pytest.mark.parametrize("end", ["print(POOL.wait(job).error)", "", "import os; os.kill(os.getpid(), 9)"])
def test_a_script_without_a_guard(jobs: str, tmp_path: Path, end: str) -> None:
    """It is run once, ends without waiting for helpers, and they end after it, their job finished."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(module=MODULE, end=end)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    found = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert found.stderr == "" and (found.returncode == 0 or "kill" in end)
    assert found.stdout.strip() == ("None" if "wait" in end else "") and (tmp_path / "runs").read_text() == "run "
    assert until(lambda: (tmp_path / "job").read_text() == "slept")
    assert until(lambda: not _processes(str(tmp_path)))


def _processes(words: str) -> list[int]:
    """The processes that have `words` in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and words.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended
    return found
