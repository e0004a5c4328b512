"""Queries and keys: every spelling of their norms and rotations is fused by the rule it names, as often as it says."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from . import (
    spellings_joint,
    spellings_norm_last,
    spellings_qk,
    spellings_rope,
    spellings_rope_forms,
    spellings_rope_moved,  # noqa: F401  (its rows are in spellings_rope's)
)
from .harness import Spelling, check_numerics, counts, fused, run, spell

ROWS = spellings_rope.ROWS + spellings_rope_forms.ROWS + spellings_qk.ROWS + spellings_joint.ROWS
ROWS += spellings_norm_last.ROWS


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_spelling(row: Spelling) -> None:
    args = spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args)
    assert counts(coverage) == row.expected, str(coverage)
    check_numerics(row.function, args, results)


INDUCTOR = ("q1", "q3_complex64", "q4_wan", "q9_cogvideox", "flux", "k2_r1", "last_complex")


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in INDUCTOR], ids=lambda row: row.name)
def test_spelling_compiled_by_inductor(row: Spelling) -> None:
    args = spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args, remainder="inductor")
    assert counts(coverage) == row.expected, str(coverage)
    check_numerics(row.function, args, results)


ANY_LENGTH = (
    "q1",
    "q3_complex64",
    "q4_wan",
    "q7_ltx2_split_of_flat",
    "q9_cogvideox",
    "k2_r1",
    "flux",
    "qwen",
    "hunyuan_single",
    "sd3",
    "norm_after_the_rotation",
    "last_of_a_joint_tensor",
)


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ANY_LENGTH], ids=lambda row: row.name)
def test_spelling_with_any_number_of_tokens(row: Spelling) -> None:
    """Numbers of tokens are symbols, as with ``dynamic=True`` in a model, whose weights fix all other sizes."""
    args = spell(row.inputs, row.dtype)
    for text, arg in zip(row.inputs.split(), args, strict=True):
        for dim, letter in enumerate(text.split(":")[1]):
            if letter in "LST":
                torch._dynamo.maybe_mark_dynamic(arg, dim)
    results, coverage = run(row.function, args, dynamic=None)
    assert counts(coverage) == row.expected, str(coverage)
    assert any(isinstance(size, str) for site in coverage.sites for shape in site.shapes.values() for size in shape)
    check_numerics(row.function, args, results)


ROUNDED = (
    "q1",
    "q2b_bf16_arithmetic",
    "q3d_complex64_times_complex128",
    "q6_mochi",
    "k0_r0",
    "k4_layer_norm_no_weight",
    "last_halves",
    "last_rounded_before_the_weight",
    "last_fp32_throughout",
)


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ROUNDED], ids=lambda row: row.name)
def test_eager_roundings_are_eager_bit_for_bit(row: Spelling) -> None:
    if "complex" in row.name and torch.__version__ < "2.12":
        pytest.xfail("torch 2.11 folds the rounding between a norm and a complex rotation before dkfuse sees the graph")
    results, coverage = run(row.function, spell(row.inputs, row.dtype), roundings="eager")
    assert counts(coverage) == row.expected, str(coverage)
    with torch.no_grad():
        expected = row.function(*spell(row.inputs, row.dtype))
    assert torch.equal(results[0], expected)


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
    "norm_after_the_rotation": 2,
    "last_across_heads": 2,
    "last_of_each_stream": 4,
    "last_of_a_joint_tensor": 4,
    "last_of_a_joint_tensor_partly_rotated": 4,
    "last_of_the_image_alone": 4,
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
