"""What only looks like a rotation is not fused as one, and computes what it did."""

from __future__ import annotations

import pytest
import torch

from . import near_misses_norm_last, near_misses_rope, near_misses_rope_around, spellings_rope_moved
from .harness import Spelling, counts, flat, run, spell
from .test_near_misses import check_same

ROWS = near_misses_rope.ROWS + near_misses_rope_around.ROWS + near_misses_norm_last.ROWS
ROWS += spellings_rope_moved.NEAR_MISSES
ROTATIONS = ("norm_rope", "rope")


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_near_miss(row: Spelling) -> None:
    """As many rotations are fused as the row says, and results and written inputs are the uncompiled function's."""
    args, originals = spell(row.inputs, row.dtype), spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args)
    with torch.no_grad():
        expected = flat(row.function(*originals))
    check_same((*results, *args), (*expected, *originals), row.dtype)
    fused = {rule: count for rule, count in counts(coverage).items() if rule in ROTATIONS}
    assert row.expected in (fused, {"either": 1}), str(coverage)


def test_the_table_is_long_enough_and_names_are_unique() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) >= 26
