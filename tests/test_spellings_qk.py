"""Queries and keys: every spelling of their norms and rotations is fused by the rule it names, as often as it says."""

from __future__ import annotations

import pytest

from . import spellings_joint, spellings_qk, spellings_rope, spellings_rope_forms
from .harness import Spelling, check_numerics, counts, run, spell

ROWS = spellings_rope.ROWS + spellings_rope_forms.ROWS + spellings_qk.ROWS + spellings_joint.ROWS


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_spelling(row: Spelling) -> None:
    args = spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args)
    assert counts(coverage) == row.expected, str(coverage)
    check_numerics(row.function, args, results)
