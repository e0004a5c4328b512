"""How long a process takes to its first result: with empty caches, and with those that a process before it left.

    cold    torch.compile and the first forward in a new process, every cache of kernels and graphs empty
    warm    the same in another process, caches as the first one left them

Each side has processes and caches of its own. What is in both times is what a user waits for once the model is there:
tracing, code generation, compilers and the processes that they start, imports, the forward. What is not: the start of
Python and CUDA, building and packing the model, and one forward in eager mode before.

As JSON under schema "dkfuse.bench.start/1":

    {schema, torch, device, date, versions, models: [{model, batch, layers, depth, size, dtype, mode, pack, attention,
     sides: {NAME: {cold, warm}}, ratios: {RIVAL: {cold, warm}}}]}

Times are medians, in seconds, of `rounds` cold processes, each followed by `WARM` warm ones; a ratio is dkfuse / rival,
less is better.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DkfuseError
from .averages import median, ratio
from .results import OURS, today, versions
from .sides import CACHES, Options, runner
from .targets import Target, build, depth

SCHEMA = "dkfuse.bench.start/1"
WARM = 3  # starts of a few seconds differ by a fifth
LIMIT = 1800.0  # seconds of one process
_START = "import json, sys; job = json.loads(sys.argv[1]); sys.path[:] = job['path']; from {} import main; main(job)"


class StartError(DkfuseError):
    """A process that was to compile a model ended without a result."""


def measure(target: Target, options: Options, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The row of `target`; `say` is told what is being done."""
    sides = {}
    for side in (name for name in options.sides if name != "eager"):
        found: dict[str, list[float]] = {"cold": [], "warm": []}
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                for which in ("cold", *("warm",) * WARM):
                    say(f"{target.label}: {side}, {which}")
                    found[which].append(seconds(target, options, side, device, Path(folder)))
        sides[side] = {which: median(times) for which, times in found.items()}
    chosen = ("layers", "size", "dtype", "mode", "pack", "attention")
    return {
        "model": target.name,
        "batch": target.batch or 1,
        **{name: getattr(options, name) for name in chosen},
        "depth": depth(target, options.layers, options.size),
        "sides": sides,
        "ratios": {rival: _ratios(sides[OURS], times) for rival, times in sides.items() if rival != OURS},
    }


def _ratios(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float | None]:
    return {which: ratio(ours[which], theirs[which]) for which in ours}


def report(rows: Sequence[dict[str, Any]], device: str) -> dict[str, Any]:
    """Everything, in the layout of the schema."""
    import torch

    head = {"schema": SCHEMA, "torch": torch.__version__, "device": device, "date": today(), "versions": versions()}
    return {**head, "models": list(rows)}


def seconds(target: Target, options: Options, side: str, device: str, folder: Path) -> float:
    """The time of one process, with its caches in `folder`. Raises StartError where it failed."""
    caches = {name: str(folder / part) for name, part in CACHES.items()}
    job = {"path": sys.path, "target": asdict(target), "options": asdict(options), "side": side, "device": device}
    command = [sys.executable, "-c", _START.format(__name__), json.dumps(job)]
    environment = {**os.environ, **caches}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # torch was installed with its bytecode; a checkout has none
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise StartError(f"{target.label}: a process that compiles it for {side} took {LIMIT:.0f} s") from error
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing was said")
        raise StartError(f"{target.label}: a process that compiles it for {side} ended with {done.returncode}: {said}")
    return float(lines[-1])


# -- in the process ----------------------------------------------------------------------------------------------------


def main(job: dict[str, Any]) -> None:
    """Print the seconds that `job` takes."""
    import torch

    import dkfuse

    target, side = Target(**job["target"]), job["side"]
    options = Options(**{**job["options"], "against": tuple(job["options"]["against"])})
    module, kwargs = build(target, options.layers, options.size, options.dtype, job["device"])
    with torch.no_grad():
        module(**kwargs)
        if options.pack:
            dkfuse.pack(module)
        _synchronize(job["device"])
        start = time.perf_counter()
        run = runner(side, module, kwargs, options, torch.compile)  # which imports what another side's first call does
        run()
        _synchronize(job["device"])
        print(time.perf_counter() - start, flush=True)


def _synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
