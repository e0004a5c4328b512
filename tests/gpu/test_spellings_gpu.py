"""Spellings whose sites have other shapes than most, through Inductor on a GPU: frames, tables of halves, sums."""

from __future__ import annotations

import pytest
import torch

from .. import spellings_frames, spellings_rope, spellings_tables
from .. import spellings_rope_moved as _  # noqa: F401  (its rows are in spellings_rope)
from ..harness import Spelling, check_numerics, counts, run, spell

pytestmark = pytest.mark.gpu
NAMES = {
    "frames", "frames_before_an_affine_norm", "frames_in_fp32", "frames_of_the_stream_too", "frames_repeated",
    "matrices_of_moved_halves", "matrices_of_moved_halves_per_sample", "tables_of_moved_halves", "pairs_in_front",
    "matrices_by_einsum", "matrices_by_matmul_of_rows",
}  # fmt: skip
ROWS = [row for row in (*spellings_frames.ROWS, *spellings_rope.ROWS) if row.name in NAMES] + spellings_tables.ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_kernels_compute_it(row: Spelling) -> None:
    args = [tensor.to("cuda") for tensor in spell(row.inputs, row.dtype)]
    alone = "gated_residual" in row.expected  # left to Inductor unless asked for
    results, coverage = run(row.function, args, remainder="inductor", pointwise=alone)
    assert counts(coverage) == row.expected
    check_numerics(row.function, args, results)


def test_the_rows_are_there() -> None:
    assert {row.name for row in ROWS} >= NAMES and torch.cuda.is_available()
