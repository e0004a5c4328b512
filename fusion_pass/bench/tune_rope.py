"""`python -m dkfuse.bench.tune_rope [--case NAME] [--json FILE]`: norm_rope's tile shapes, measured.

For each case of one projection, the time of a `copy_` of the same bytes as a fraction of ours for every sensible
(rows, blocks, warps, repeat), best first, and what `kernels.rope_configs` chooses. Entries for its table MEASURED.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .kernels import NO_GPU
from .rope_cases import ROPE_CASES, RopeCase
from .timing import copy_microseconds, microseconds, sets_needed

MOST_PER_LANE = 64  # elements of x that a lane holds
SHOWN = 6


def candidates(rows_there: int | None, columns: int, part: int, across: bool) -> list[Any]:
    """Configurations worth a try for rows of `columns` padded columns, loaded `part` at a time; see `choose_rope`."""
    from dkfuse.kernels.rope_configs import RopeConfig

    found = set()
    for warps, factor in itertools.product((1, 2, 4, 8), (0.5, 1, 2)):
        rows = int(32 * 8 * warps * factor) // part
        if rows < 1:
            continue
        if rows_there is None:
            choices = {1, 2, 3, 4, 6}
        else:
            needed = -(-rows_there // rows)
            choices = {needed} if across else {-(-needed // pieces) for pieces in (1, 2, 3)}
        for blocks in choices:
            per_lane = rows * blocks * columns / (32 * warps)
            waste = 1.0 if rows_there is None else -(-rows_there // (rows * blocks)) * rows * blocks / rows_there
            if 4 <= per_lane <= MOST_PER_LANE and waste <= 1.4:
                found.add(RopeConfig(rows, blocks, warps))
    return sorted(found, key=lambda c: (c.num_warps, c.rows, c.blocks))


def tune(case: RopeCase) -> dict[str, Any]:
    """All candidates of one case, best first."""
    from dkfuse.kernels.rope_configs import MANY, RopeConfig, choose_rope
    from dkfuse.kernels.rope_launch import _measures
    from dkfuse.kernels.rope_support import with_defaults
    from dkfuse.kernels.rope_views import see

    first = case.inputs(0)
    traffic = case.traffic(first)
    sets = [first, *(case.inputs(i) for i in range(1, sets_needed(traffic)))]
    copy = copy_microseconds(traffic)
    arguments = with_defaults(case.arguments(first, "00", 0, case.lengths[0]))
    columns, part, rows_there, across = _measures(see(arguments))
    known = None if rows_there is not None and rows_there > MANY and not across else rows_there
    chosen = choose_rope(columns, part, rows_there, across)

    def fraction(config: RopeConfig) -> float:
        return copy / microseconds([case.launcher(operands, config) for operands in sets], replays=9)

    measured = {config: fraction(config) for config in {*candidates(known, columns, part, across), chosen}}
    for config in sorted(measured, key=lambda c: -measured[c])[:2]:
        other = RopeConfig(config.rows, config.blocks, config.num_warps, repeat=not config.repeat)
        measured[other] = fraction(other)
    rows = [
        {
            "rows": c.rows,
            "blocks": c.blocks,
            "warps": c.num_warps,
            "repeat": c.repeat,
            "of_copy": f,
            "chosen": c == chosen,
        }
        for c, f in sorted(measured.items(), key=lambda pair: -pair[1])
    ]
    return {"case": case.name, "key": [columns, known, across], "copy_microseconds": copy, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dkfuse.bench.tune_rope", description=__doc__.split("\n\n")[0])
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--all", action="store_true", help="print every candidate, not only the best")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        lack = "triton" if torch.cuda.is_available() else "an NVIDIA GPU"
        print(f"Tuning needs {lack}, which this machine does not have.", file=sys.stderr)
        return NO_GPU
    results = []
    for case in ROPE_CASES:
        if case.projections > 1 or options.case.lower() not in case.name.lower():
            continue
        start = time.perf_counter()
        results.append(tune(case))
        torch.cuda.empty_cache()
        rows, seconds = results[-1]["rows"], time.perf_counter() - start
        print(f"{case.name}  key {tuple(results[-1]['key'])}  {len(rows)} candidates in {seconds:.0f} s", flush=True)
        for i, row in enumerate(rows):
            if options.all or i < SHOWN or row["chosen"]:
                mark = "  <- chosen" if row["chosen"] else ""
                tile = f"{row['rows']:3} x {row['blocks']} rows, {row['warps']:2} warps"
                print(f"    {row['of_copy']:.3f}  {tile}{'' if row['repeat'] else ', shared'}{mark}", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"schema": "dkfuse.bench.tune_rope/1", "cases": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
