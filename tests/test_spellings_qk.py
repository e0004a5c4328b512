"""Queries and keys: every spelling of their norms and rotations is fused by the rule it names, as often as it says."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from . import spellings_joint, spellings_qk, spellings_rope, spellings_rope_forms
from .harness import Spelling, check_numerics, counts, fused, run, spell

ROWS = spellings_rope.ROWS + spellings_rope_forms.ROWS + spellings_qk.ROWS + spellings_joint.ROWS


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_spelling(row: Spelling) -> None:
    args = spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args)
    assert counts(coverage) == row.expected, str(coverage)
    check_numerics(row.function, args, results)


INDUCTOR = ("q1", "q3_complex64", "q4_wan", "q9_cogvideox", "flux", "k2_r1")


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in INDUCTOR], ids=lambda row: row.name)
def test_spelling_compiled_by_inductor(row: Spelling) -> None:
    args = spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args, remainder="inductor")
    assert counts(coverage) == row.expected, str(coverage)
    check_numerics(row.function, args, results)


# -- the graph ---------------------------------------------------------------------------------------------------------

CALLS = {  # of norm_rope: one for each query or key, and part of it
    "q1": 2,
    "q3_complex64": 2,
    "q8_ltx_flat": 2,
    "q9_cogvideox": 4,
    "q10_allegro": 6,
    "partial_rotary": 2,
    "query_normed_only": 2,
    "norm_alone": 2,
    "flux": 4,
    "flux_original": 4,
    "qwen": 4,
    "hunyuan_double": 4,
    "hunyuan_single": 4,
    "sd3": 4,
    "grouped_repeat_interleave": 2,
}
# what is left of a rotation or a norm that was not fused; `mul` and `cat` are looked at apart
REST = ("rsqrt", "mean", "native_layer_norm", "rms_norm", "neg", "view_as_complex", "slice_scatter", "addcmul", "stack")


def named(name: str) -> Spelling:
    (row,) = [row for row in ROWS if row.name == name]
    return row


def calls(graph: fx.Graph) -> list[str]:
    return [
        node.target.__name__.split(".")[0] for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    ]


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_the_graph(name: str) -> None:
    row = named(name)
    found = calls(fused(row.function, spell(row.inputs, row.dtype)))
    assert found.count("norm_rope") == CALLS[name]
    assert not set(REST) & set(found), found


Q3 = ("q3_complex64", "q3_table_per_sample", "q3d_complex128", "q3d_complex64_times_complex128")


@pytest.mark.parametrize("name", [*Q3, "q9_complex", "qwen"])
def test_no_complex_arithmetic_is_left(name: str) -> None:
    """A complex table may be viewed, nothing else."""
    row = named(name)
    for node in fused(row.function, spell(row.inputs, row.dtype)).nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_complex() and node.op == "call_function":
            assert torch.Tag.pointwise not in node.target.tags and "as_complex" not in str(node.target), node


def test_the_table_is_long_enough_and_names_are_unique() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) >= 55
