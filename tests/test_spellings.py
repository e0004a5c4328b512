"""Every spelling is fused by the rule it names, as often as it says, or left alone for the reason it names."""

from __future__ import annotations

import pytest
import torch

from . import (
    spellings,
    spellings_biases,
    spellings_by_hand,
    spellings_frames,
    spellings_limits,
    spellings_norms,
    spellings_picks,
    spellings_stream_forms,
    spellings_streams,
    spellings_tables,
    spellings_two_branches,
)
from .harness import Spelling, check_numerics, counts, run, spell

TABLES = (
    spellings,
    spellings_norms,
    spellings_streams,
    spellings_tables,
    spellings_biases,
    spellings_picks,
    spellings_by_hand,
    spellings_frames,
    spellings_two_branches,
    spellings_limits,
    spellings_stream_forms,
)
ROWS = [row for part in TABLES for row in part.ROWS]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_spelling(row: Spelling) -> None:
    args = spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args)
    assert counts(coverage) == row.expected, str(coverage)
    check_numerics(row.function, args, results)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_eagers_roundings_are_kept_or_the_site_is_left(row: Spelling) -> None:
    """Those of the traced graph without a fused site (torch 2.11 traces `addcmul` with a rounding that eager has not).

    Bit for bit; in fp32, where nothing is rounded but sums add up in another order, and fp16 near enough.
    """
    args = spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args, roundings="eager")
    tolerance = {torch.bfloat16: 0.0, torch.float16: 2e-3, torch.float32: 1e-5}[row.dtype]
    expected, _ = run(row.function, args, fuel=0)
    for ours, eager in zip(results, expected, strict=True):
        size = eager.abs().max().item()
        torch.testing.assert_close(ours, eager, rtol=0, atol=tolerance * size, msg=lambda text: f"{text}\n{coverage}")


INDUCTOR = ("a1_b2", "from_table_unbind", "g1_dual", "g4_fp32", "indexed_parts_of_a_row", "two_gates")


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in INDUCTOR], ids=lambda row: row.name)
def test_spelling_compiled_by_inductor(row: Spelling) -> None:
    args = spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args, remainder="inductor")
    assert counts(coverage) == row.expected, str(coverage)
    check_numerics(row.function, args, results)


def test_the_table_is_long_enough_and_names_are_unique() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) >= 95


FRAMES = ("frames", "frames_before_an_affine_norm", "frames_in_fp32")


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in FRAMES], ids=lambda row: row.name)
def test_frames_of_any_number_of_tokens(row: Spelling) -> None:
    args = spell(row.inputs, row.dtype)
    for text, arg in zip(row.inputs.split(), args, strict=True):
        if text.split(":")[1] == "BLD":
            torch._dynamo.maybe_mark_dynamic(arg, 1)
    results, coverage = run(row.function, args, dynamic=None)
    assert counts(coverage) == row.expected, str(coverage)
    check_numerics(row.function, args, results)
