"""`python -m dkfuse.bench.kernels [--op OP] [--json FILE]`: every kernel against a copy, Inductor and eager.

Columns: time; fraction of the time of a `copy_` of the same bytes, and of a 670 MB copy's bandwidth; speed-up over
`torch.compile(dynamic=False)` and over eager, timed in the same process the same way (`bench.timing`); relative error
||out - ref|| / ||ref|| against fp64 of ours, eager and Inductor. FlashInfer: its in-place RoPE of q and k, no norm.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .cases import CASES, Case
from .rope_cases import ROPE_CASES, RopeCase, flashinfer_calls, has_flashinfer
from .timing import copy_microseconds, microseconds, sets_needed

ALL: tuple[Case | RopeCase, ...] = (*CASES, *ROPE_CASES)
NO_GPU = 4
PEAK_BYTES = 4 * 32760 * 5120  # a large copy; not a power of two, whose rows collide in the memory channels


def _error(results: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Largest relative error of the outputs over the checked rows."""
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, reference, strict=True))


def measure(case: Case | RopeCase, peak: float, inductor: bool = True) -> dict[str, Any]:
    """One row of the table. `peak` is the bandwidth of a large copy in bytes per microsecond."""
    first = case.inputs(0)
    traffic = case.traffic(first)
    sets = [first, *(case.inputs(i) for i in range(1, sets_needed(traffic)))]
    reference = case.reference(first)
    row: dict[str, Any] = {"op": case.op, "case": case.name, "shape": list(case.shape), "bytes": traffic}

    calls = [case.launcher(operands) for operands in sets]
    row["error"] = _error(case.checked(calls[0]()), reference)
    row["microseconds"] = microseconds(calls)
    row["copy_microseconds"] = copy_microseconds(traffic)
    row["of_copy"] = row["copy_microseconds"] / row["microseconds"]
    row["of_peak"] = traffic / peak / row["microseconds"]
    del calls

    rivals = {"eager": case.eager()}
    if inductor:
        torch._dynamo.reset()
        rivals["inductor"] = torch.compile(case.eager(), dynamic=False)
    for name, function in rivals.items():
        row[f"{name}_error"] = _error(case.checked(function(first)), reference)
        row[f"{name}_microseconds"] = microseconds([functools.partial(function, operands) for operands in sets])
        row[f"vs_{name}"] = row[f"{name}_microseconds"] / row["microseconds"]
        torch.cuda.empty_cache()
    if isinstance(case, RopeCase) and (in_place := flashinfer_calls(case, sets)) is not None:
        row["flashinfer_microseconds"] = microseconds(in_place)
        row["vs_flashinfer"] = row["flashinfer_microseconds"] / row["microseconds"]
    return row


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """The measurements as a rich table."""
    result = Table(title=title)
    columns = (
        "op",
        "case",
        "shape",
        "us",
        "of copy",
        "of peak",
        "vs Inductor",
        "vs eager",
        "vs FlashInfer",
        "error: ours",
    )
    for column in columns:
        result.add_column(column, justify="left" if column in ("op", "case") else "right")
    result.add_column("eager", justify="right")
    result.add_column("Inductor", justify="right")
    for row in rows:
        result.add_row(
            row["op"],
            row["case"],
            "x".join(map(str, row["shape"])),
            f"{row['microseconds']:.1f}",
            f"{row['of_copy']:.3f}",
            f"{row['of_peak']:.3f}",
            f"{row['vs_inductor']:.2f}x" if "vs_inductor" in row else "-",
            f"{row['vs_eager']:.2f}x",
            f"{row['vs_flashinfer']:.2f}x" if "vs_flashinfer" in row else "-",
            f"{row['error']:.2e}",
            f"{row['eager_error']:.2e}",
            f"{row['inductor_error']:.2e}" if "inductor_error" in row else "-",
        )
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dkfuse.bench.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", choices=sorted({case.op for case in ALL}), help="only this op")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--no-inductor", action="store_true", help="skip torch.compile, which takes most of the time")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        lack = "triton" if torch.cuda.is_available() else "an NVIDIA GPU"
        print(f"The kernel benchmark needs {lack}, which this machine does not have.", file=sys.stderr)
        return NO_GPU
    chosen = [
        case
        for case in ALL
        if (options.op is None or case.op == options.op)
        and (options.case is None or options.case.lower() in case.name.lower())
    ]
    peak = PEAK_BYTES / copy_microseconds(PEAK_BYTES)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    device = torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    for case in chosen:
        with console.status(f"{case.op}: {case.name}") if console.is_terminal else contextlib.nullcontext():
            rows.append(measure(case, peak, inductor=not options.no_inductor))
        torch.cuda.empty_cache()
        if options.json:  # after every row, so that a run cut short keeps what it measured
            report = {"schema": "dkfuse.bench.kernels/1", "device": device, "torch": torch.__version__}
            options.json.write_text(json.dumps({**report, "copy_tb_per_s": peak / 1e6, "rows": rows}, indent=1))
    if any(case.op == "norm_rope" for case in chosen) and not has_flashinfer():
        console.print("FlashInfer is not installed: no comparison with its in-place RoPE.")
    console.print(table(rows, f"{device}, torch {torch.__version__}, large copy {peak / 1e6:.2f} TB/s"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
