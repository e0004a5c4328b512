"""What must not fuse does not, and still computes what it did."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import dkfuse
from dkfuse import Settings
from dkfuse.fuse import plan

from . import near_misses, near_misses_around, near_misses_two_branches
from .harness import FP32, TOLERANCE, Spelling, compiled, counts, flat, run, spell

ROWS = near_misses.ROWS + near_misses_around.ROWS + near_misses_two_branches.ROWS


def check_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        size = b.nan_to_num().abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype] * size, equal_nan=True)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_near_miss(row: Spelling) -> None:
    """Exactly the named rules take part, and results and written inputs are the uncompiled function's."""
    args, originals = spell(row.inputs, row.dtype), spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args)
    with torch.no_grad():
        expected = flat(row.function(*originals))
    check_same((*results, *args), (*expected, *originals), row.dtype)
    assert counts(coverage) == row.expected, str(coverage)


REASONS = {
    "scale_enlarges_the_norm": "broadcast",
    "product_is_read_elsewhere": "escapes",
    "scale_from_the_sum": "cycle",
}


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in REASONS], ids=lambda row: row.name)
def test_the_reason_is_recorded(row: Spelling) -> None:
    """Also where a narrower rule, or Inductor, got the site in the end."""
    _, coverage = run(row.function, spell(row.inputs, row.dtype))
    codes = {reason.code for site in coverage.sites for reason in site.attempts}
    assert REASONS[row.name] in codes, str(coverage)


# -- what a row of the table cannot say --------------------------------------------------------------------------------


def modulate(x: Tensor, s: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return (F.layer_norm(x, x.shape[-1:]) * (1 + s) + t) @ w


def test_inputs_that_share_memory() -> None:
    """One of two overlapping inputs is written to: a site that reads the other one must not move behind the write."""

    def function(x: Tensor, y: Tensor, s: Tensor, t: Tensor, w: Tensor) -> Tensor:
        out = modulate(x, s, t, w)
        y.mul_(3)
        return out

    _, s, t, w = spell("x:BLD s:B1D t:B1D w:DD", torch.float32)
    ours, theirs = spell("x:BSD", torch.float32) + spell("x:BSD", torch.float32)
    results, coverage = run(function, (ours[:, :6], ours[:, 2:8], s, t, w))
    with torch.no_grad():
        expected = function(theirs[:, :6], theirs[:, 2:8], s, t, w)
    check_same((*results, ours), (expected, theirs))
    assert counts(coverage) == {"norm_modulate": 1}, str(coverage)  # the graph writes at its end


def test_symbolic_row_length() -> None:
    args = spell("x:BLD s:B1D t:B1D w:DD", torch.float32)
    for tensor in args:
        torch._dynamo.mark_dynamic(tensor, tensor.dim() - 1)
    torch._dynamo.mark_dynamic(args[3], 0)
    results, coverage = run(modulate, args, dynamic=None)
    check_same(results, (modulate(*args),))
    assert counts(coverage) == {"rejected:symbolic": 1}, str(coverage)


def test_dropout_stays_random() -> None:
    def function(x: Tensor, s: Tensor, t: Tensor, w: Tensor) -> Tensor:
        n = F.layer_norm(x, x.shape[-1:])
        return F.dropout(n * (1 + s) + t, 0.5, training=True).flip(0) @ w

    x, s, t, _ = spell("x:BLD s:B1D t:B1D w:DD", torch.float32)
    (ours,), coverage = run(function, (x, s, t, torch.eye(36)))
    full = modulate(x, s, t, torch.eye(36)).flip(0)
    kept = ours != 0
    assert 0.35 < kept.float().mean().item() < 0.65
    check_same((ours,), (torch.where(kept, 2 * full, 0.0),))
    assert not coverage.fused("norm"), str(coverage)


def test_training_passes_through_with_a_note() -> None:
    args = [a.requires_grad_() for a in spell("x:BLD s:B1D t:B1D w:DD", torch.float32)]
    torch.compiler.reset()
    with dkfuse.record() as coverage:
        result = compiled(modulate)(*args)
    gradients = torch.autograd.grad(result.square().sum(), args)
    check_same(gradients, torch.autograd.grad(modulate(*args).square().sum(), args))
    assert [g.note and g.note.partition(":")[0] for g in coverage.graphs] == ["training"]
    assert not coverage.sites


def test_what_is_written_before_it_is_read_is_no_operand() -> None:
    """In a graph that was not made functional: ours would read the input in another place than the norm does."""

    def function(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        x.mul_(2)
        return (F.layer_norm(x, x.shape[-1:]) * (1 + s) + t).flip(0)

    graph = make_fx(function)(*spell("x:BLD s:B1D t:B1D")).graph
    (write,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mul_.Tensor)
    (norm,) = graph.find_nodes(op="call_function", target=torch.ops.aten.native_layer_norm.default)
    norm.replace_input_with(write, write.args[0])  # the same memory
    (site,) = plan(graph, Settings(target="cpu")).record.sites
    assert "mutated" in {reason.code for reason in site.attempts}, site


def test_a_stream_that_is_updated_in_place_by_inductors_code() -> None:
    (row,) = (row for row in ROWS if row.name == "stream_updated_in_place")
    args, originals = spell(row.inputs, row.dtype), spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args, remainder="inductor")
    with torch.no_grad():
        expected = flat(row.function(*originals))
    check_same((*results, *args), (*expected, *originals))
    assert counts(coverage) == row.expected, str(coverage)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("branch_first", [True, False])
def test_the_reason_is_that_of_the_reading_that_was_meant(gate_first: bool, branch_first: bool) -> None:
    """A gate for each token has the branch's shape: either may be the gate, but only one is made of conditioning."""

    def function(first: Tensor, second: Tensor, h: Tensor, s: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, e = (first, second) if branch_first else (second, first)
        gate, branch = e[:, :, 2], F.gelu(y @ w)
        h = h + (gate * branch if gate_first else branch * gate)
        return h, modulate(h, s, t, w)

    both = spell("y:BLD e:BL6D", torch.float32)
    _, coverage = run(function, (*(both if branch_first else both[::-1]), *spell("h:BLD s:B1D t:B1D w:DD", FP32)))
    (reason,) = (r for site in coverage.sites for r in site.attempts if r.rule == "residual_gate_norm_modulate")
    assert reason.code == "pointwise_producer" and reason.message.startswith("x is the result of"), reason
