"""`python -m dkfuse.bench.tune [--case NAME] [--op OP] [--json FILE]`: what max-autotune would choose for the cases.

Every candidate of every case of `dkfuse bench kernels` is timed as a compilation under max-autotune times it, cold. A
line shows the time of the table's configuration, of the fastest, and whether that would be taken: faster by the margin
in both series. Those are the entries of the tables (`kernels.configs`, `rope_configs`) that could be mended.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..choosing import tuning, tuning_clock
from .cases import CASES
from .kernels import NO_GPU
from .rope_cases import ROPE_CASES


def tune(case: Any) -> dict[str, Any]:
    """The candidates of one case with their times, the table's first; "taken" is the number of the one that is used."""
    launching = case.launch(case.inputs(0))
    launches = [launching.plan(config) for config in launching.configs()]
    tensors = {name: launching.tensors[name] for name in launches[0].tensors.values()}
    row: dict[str, Any] = {"op": case.op, "case": case.name, "shape": list(case.shape)}
    del launching  # the timing has tensors of its own
    times = tuning_clock.times(launches, tensors)
    if times is None:
        return {**row, "problem": "too little memory"}
    found = tuning.best_of(times)
    rows = [{"config": x.config_text, "microseconds": list(t)} for x, t in zip(launches, times, strict=True)]
    return {**row, "taken": found.candidate, "gain": found.gain, "candidates": rows}


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    head = f"{row['op']:28} {row['case']:28} {'x'.join(map(str, row['shape'])):18}"
    if "problem" in row:
        return f"{head} {row['problem']}"
    table, times = row["candidates"][0], [max(c["microseconds"]) for c in row["candidates"]]
    best = row["candidates"][times.index(min(times))]
    text = f"{head} {times[0]:8.2f} {min(times):8.2f} us  {times[0] / min(times):5.3f}  {table['config']}"
    if row["taken"]:
        return f"{text}  <- {row['candidates'][row['taken']]['config']}, {row['gain']:.2f}x"
    return text if best is table else f"{text}  ({best['config']} within the noise)"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dkfuse.bench.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--op", default="", help="only cases of this op")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON, case by case")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        lack = "triton" if torch.cuda.is_available() else "an NVIDIA GPU"
        print(f"Tuning needs {lack}, which this machine does not have.", file=sys.stderr)
        return NO_GPU
    rows: list[dict[str, Any]] = []
    cases: tuple[Any, ...] = (*CASES, *ROPE_CASES)
    for case in cases:
        if options.case.lower() not in case.name.lower() or options.op not in ("", case.op):
            continue
        start = time.perf_counter()
        rows.append(tune(case))
        print(f"{line(rows[-1])}  [{time.perf_counter() - start:.1f} s]", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"schema": "dkfuse.bench.tune/1", "cases": rows}, indent=1))
    print(f"{sum(bool(row.get('taken')) for row in rows)} of {len(rows)} would not take the table's configuration.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
