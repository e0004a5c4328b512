"""Every provider's kernel on the shapes that models have, against a copy, Inductor and eager: `dkfuse bench kernels`.

As JSON under schema "dkfuse.bench.kernels/2":

    {schema, device, torch, date, versions: {PACKAGE: version}, copy_tb_per_s,
     rows: [{op, case, shape, rows, width, bytes, copy_microseconds,
             providers: {NAME: {microseconds, of_copy, of_peak, error} or {problem}},
             rivals: {"eager", "inductor", "max-autotune": {microseconds, of_copy, of_peak, error} or {problem}},
             peers: [{name, part, microseconds, of_copy, of_peak} or {name, part, problem}],
             best: NAME or null}]}

`shape` is that of one result; `rows` and `width` are what is normed. `bytes` must be moved by any implementation;
`of_copy` is the time of a `copy_` of as many bytes by the kernel's, `of_peak` the same with the bandwidth of a 670 MB
copy. `error` is ||out - ref|| / ||ref|| against fp64, the largest over the outputs. `problem` says why there is no
time. Inductor compiles the models' own spelling with dynamic=False; "max-autotune" is its mode of that name without
CUDA graphs. Inputs are cold, results are medians (`bench.timing`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..errors import first_line
from . import providers
from .averages import geometric_mean
from .cases import CASES, Case
from .peers import peers_of
from .results import today, versions
from .rope_cases import ROPE_CASES, RopeCase

SCHEMA = "dkfuse.bench.kernels/2"
ALL: tuple[Case | RopeCase, ...] = (*CASES, *ROPE_CASES)
OPS = tuple(dict.fromkeys(case.op for case in ALL))
NO_GPU = 4
PEAK_BYTES = 4 * 32760 * 5120  # a large copy; not a power of two, whose rows collide in the memory channels
RIVALS = {"default": "inductor", "max-autotune": "max-autotune"}  # what --against takes, and the names of the rows
MODES = {"inductor": None, "max-autotune": "max-autotune-no-cudagraphs"}


def error_of(results: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Largest relative RMS error of the outputs over the checked rows."""
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, reference, strict=True))


def chosen(ops: Sequence[str], case: str | None) -> list[Case | RopeCase]:
    """The cases of these ops (none: all) whose name contains `case`."""
    found = [c for c in ALL if not ops or c.op in ops]
    return [c for c in found if case is None or case.lower() in c.name.lower()]


def measure(
    case: Case | RopeCase,
    peak: float,
    wanted: Sequence[str] | None = None,
    against: Iterable[str] = ("inductor",),
    peers: bool = False,
) -> dict[str, Any]:
    """One row. `peak`: bytes per microsecond of a large copy. `wanted`: providers, all by default."""
    from .timing import copy_microseconds, microseconds, sets_needed

    first: Any = case.inputs(0)
    traffic = case.traffic(first)
    sets: list[Any] = [first, *(case.inputs(i) for i in range(1, sets_needed(traffic)))]
    reference = case.reference(first)
    copy = copy_microseconds(traffic)
    major, minor = torch.cuda.get_device_capability()

    def timed(calls: list[Callable[[], Any]], checked: bool = True) -> dict[str, float]:
        found = {"error": error_of(case.checked(calls[0]()), reference)} if checked else {}
        spent = microseconds(calls)
        return {"microseconds": spent, "of_copy": copy / spent, "of_peak": traffic / peak / spent, **found}

    def by_provider(name: str) -> dict[str, float]:
        return timed([providers.launcher(case, name, operands, 10 * major + minor) for operands in sets])

    def by_function(mode: str | None, compiled: bool = True) -> dict[str, float]:
        torch._dynamo.reset()
        function: Any = case.eager()
        if compiled:
            function = torch.compile(function, dynamic=False, **({"mode": mode} if mode else {}))
        return timed([functools.partial(function, operands) for operands in sets])

    names = [n for n in providers.names(case.op) if wanted is None or n in wanted]
    row: dict[str, Any] = {"op": case.op, "case": case.name, "shape": list(case.shape)}
    row["rows"], row["width"] = case.size
    row.update(bytes=traffic, copy_microseconds=copy)
    row["providers"] = {name: attempt(functools.partial(by_provider, name)) for name in names}
    row["rivals"] = {"eager": attempt(lambda: by_function(None, compiled=False))}
    row["rivals"].update({name: attempt(functools.partial(by_function, MODES[name])) for name in against})
    row["peers"] = []
    for name, part, make in peers_of(case, sets) if peers else ():
        found = attempt(lambda make=make: timed(make(), checked=False))  # type: ignore[misc]
        row["peers"].append({"name": name, "part": part, **found})
    row["best"] = best(row)
    return row


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work`, or the problem that kept it from one."""
    try:
        return work()
    except providers.Refused as refusal:
        return {"problem": str(refusal)}
    except Exception as error:  # of another library: the other columns of the row are still worth having
        torch.cuda.empty_cache()
        return {"problem": f"{type(error).__name__}: {first_line(error)}"}


def best(row: dict[str, Any]) -> str | None:
    """The fastest provider of a row."""
    times = {name: found["microseconds"] for name, found in row["providers"].items() if "microseconds" in found}
    return min(times, key=lambda name: times[name], default=None)


def speedups(rows: Sequence[dict[str, Any]], rival: str) -> dict[str, float]:
    """By op, the geometric mean over its cases of the rival's time by that of the best provider."""
    found: dict[str, list[float]] = {}
    for row in rows:
        theirs = row["rivals"].get(rival, {}).get("microseconds")
        if theirs and row["best"]:
            found.setdefault(row["op"], []).append(theirs / row["providers"][row["best"]]["microseconds"])
    return {op: mean for op, values in found.items() if (mean := geometric_mean(values)) is not None}


def report(rows: Sequence[dict[str, Any]], device: str, peak: float) -> dict[str, Any]:
    """Everything, in the layout of the schema."""
    head = {"schema": SCHEMA, "device": device, "torch": torch.__version__, "date": today(), "versions": versions()}
    return {**head, "copy_tb_per_s": peak / 1e6, "rows": list(rows)}


def crossovers(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, int, int, float]]:
    """(op, provider, rows, width, time / Triton's time), sorted: below 1 the provider is faster than Triton.

    Where several cases of an op share rows and width, the largest ratio counts: a provider is chosen where it wins in
    all of them.
    """
    found: dict[tuple[str, str, int, int], float] = {}
    for row in rows:
        base = row["providers"].get(providers.TRITON, {}).get("microseconds")
        for name, entry in row["providers"].items():
            if name != providers.TRITON and base and "microseconds" in entry:
                key = (row["op"], name, row["rows"], row["width"])
                found[key] = max(found.get(key, 0.0), round(entry["microseconds"] / base, 3))
    return [(*key, value) for key, value in sorted(found.items())]
