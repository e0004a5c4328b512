"""Spellings whose sites have other shapes or operands than most, through Inductor on a GPU: frames, tables of halves,
sums, rows by number, two branches, limits, streams that are updated in place."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import dkfuse

from .. import (
    near_misses_around,
    spellings_frames,
    spellings_limits,
    spellings_picks,
    spellings_rope,
    spellings_tables,
    spellings_two_branches,
)
from .. import spellings_rope_moved as _  # noqa: F401  (its rows are in spellings_rope)
from ..harness import Spelling, check_numerics, counts, flat, run, spell

pytestmark = pytest.mark.gpu
NAMES = {
    "frames", "frames_before_an_affine_norm", "frames_in_fp32", "frames_of_the_stream_too", "frames_repeated",
    "matrices_of_moved_halves", "matrices_of_moved_halves_per_sample", "tables_of_moved_halves", "pairs_in_front",
    "matrices_by_einsum", "matrices_by_matmul_of_rows", "indexed_gates_and_modulations", "indexed_parts_of_a_row",
    "indexed_for_all_samples", "indexed_gate_alone", "two_control", "two_fp32", "two_hint_with_a_strength", "two_gates",
    "two_gates_per_token", "two_before_two_modulations", "two_behind_a_sandwich", "two_added_first", "two_stacked",
    "limit_that_acts", "limit_in_fp32", "limit_of_two_branches", "limit_before_two_modulations",
    "limit_behind_a_sandwich",
}  # fmt: skip
TABLES = (spellings_frames, spellings_rope, spellings_picks, spellings_two_branches, spellings_limits)
SOME = [row for table in TABLES for row in table.ROWS]
ROWS = [row for row in SOME if row.name in NAMES] + spellings_tables.ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_kernels_compute_it(row: Spelling) -> None:
    args = [tensor.to("cuda") for tensor in spell(row.inputs, row.dtype)]
    alone = "gated_residual" in row.expected  # left to Inductor unless asked for
    results, coverage = run(row.function, args, remainder="inductor", pointwise=alone)
    assert counts(coverage) == row.expected
    check_numerics(row.function, args, results)


def test_the_rows_are_there() -> None:
    assert {row.name for row in ROWS} >= NAMES and torch.cuda.is_available()


def test_numbers_of_rows_are_checked_by_inductors_code() -> None:
    (row,) = (row for row in spellings_picks.ROWS if row.name == "indexed_parts_of_a_row")
    args = [tensor.to("cuda") for tensor in spell(row.inputs, row.dtype)]
    torch.compiler.reset()
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(row.function, backend="dkfuse", dynamic=False), *args)
    assert "device_assert" in code and "dkfuse_residual_norm_modulate" in code


@pytest.mark.parametrize("name", ["stream_updated_in_place", "input_written_afterwards", "bias_written_afterwards"])
def test_what_a_graph_writes_to_is_read_before(name: str) -> None:
    (row,) = (row for row in near_misses_around.ROWS if row.name == name)
    args, originals = ([t.to("cuda") for t in spell(row.inputs, row.dtype)] for _time in range(2))
    torch.compiler.reset()
    compiled = torch.compile(row.function, backend="dkfuse", dynamic=False)
    with torch.no_grad(), dkfuse.record() as coverage:
        for _call in range(3):  # each call reads what the one before has written
            ours, eager = flat(compiled(*args)), flat(row.function(*originals))
            for a, b in zip((*ours, *args), (*eager, *originals), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    assert counts(coverage) == row.expected
