"""Properties of the matcher on random programs: terms mean what nodes compute, planning is pure, fusing is harmless."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from dkfuse import Settings, fuse
from dkfuse.matching import gain
from dkfuse.matching.terms import Term, TermView

from .harness import BF16, FP16, FP32, check_numerics, spell
from .programs import Recorder, evaluate, program_inputs, programs, trace

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=150)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        ours.double(), theirs.double(), rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item())
    )


@MANY
@given(programs())
def test_a_term_means_what_its_node_computes(function: Callable[..., Any]) -> None:
    """Also with its views moved below the arithmetic. The tolerance covers bf16 ties that fall the other way."""
    inputs = program_inputs()
    module = trace(function, inputs)
    view, recorder = TermView(module.graph), Recorder(module)
    recorder.run(*inputs)
    for node, term in view.items():
        value = recorder.values[node]
        if value.dtype == torch.float32 and value.isfinite().all() and value.abs().max() < 1e3:
            for seen in (term, view.expose(term)):
                meaning = evaluate(view, seen, recorder.values)
                assert seen is not term or term.op == "const" or meaning.shape == value.shape == term.shape, (
                    node,
                    seen,
                )
                assert_near(meaning.expand(value.shape), value, 1e-2)


@MANY
@given(programs(steps=16))
def test_fusing_changes_no_result(function: Callable[..., Any]) -> None:
    """With every site taken that passes the checks, also where Inductor would do better."""
    inputs = program_inputs()
    expected = function(*inputs)
    module = trace(function, inputs)
    with mock.patch.object(gain, "check"):
        fuse.run(module.graph, Settings(), lowered=False)
    module.recompile()
    for ours, theirs in zip(module(*inputs), expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if theirs.isfinite().all() and theirs.abs().max() < 1e3:
            assert_near(ours, theirs, 2e-2)


def snapshot(graph: fx.Graph) -> list[tuple]:
    return [
        (n, n.name, n.op, n.target, n.args, n.kwargs, tuple(n.users), {k: id(v) for k, v in n.meta.items()})
        for n in graph.nodes
    ]


@FEW
@given(programs())
def test_planning_does_not_touch_the_graph(function: Callable[..., Any]) -> None:
    graph = trace(function, program_inputs()).graph
    before, text = snapshot(graph), str(graph)
    fuse.plan(graph, Settings())
    assert snapshot(graph) == before
    assert str(graph) == text


@FEW
@given(programs())
def test_equal_expressions_are_one_term(function: Callable[..., Any]) -> None:
    """Where every op is one that terms know: any other op's result is a value of its own."""
    inputs = program_inputs()
    view = TermView(trace(lambda *a: (*function(*a), *function(*a)), inputs).graph)
    (output,) = [n for n in view.graph.nodes if n.op == "output"]
    half = len(output.args[0]) // 2
    for once, again in zip(output.args[0][:half], output.args[0][half:], strict=True):
        first, second = view.term(once), view.term(again)
        assert first is not None and second is not None
        assert first is second or not all(leaf.op == "placeholder" for leaf in leaves(first))


def leaves(term: Term) -> set[fx.Node]:
    return {term.attrs[0]} if term.op == "leaf" else set().union(*map(leaves, term.args))


def test_swapped_and_regrouped_expressions_are_one_term() -> None:
    def function(x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        n = F.layer_norm(x, x.shape[-1:])
        return n * (1 + s) + t, t + (s + 1) * n, torch.addcmul(t, 1 + s, n), n - -(s * n) + t, t - n * -(1 + s)

    view = TermView(trace(function, spell("x:BLD s:B1D t:B1D", FP32)).graph)
    (output,) = [n for n in view.graph.nodes if n.op == "output"]
    terms = [view.term(n) for n in output.args[0]]
    assert len(set(terms[:4])) == 1
    assert terms[4] is not terms[0]  # a sign inside a product stays where it is


# -- one expression, many spellings ------------------------------------------------------------------------------------


@st.composite
def adaln(draw: Any) -> tuple[Callable[..., Tensor], torch.dtype]:
    """``norm(x) * (1 + s) + t``, with operands swapped, associated, cast and unsqueezed at will."""
    dtype = draw(st.sampled_from([BF16, FP16, FP32]))
    swap = st.booleans()
    norm = draw(st.sampled_from(["native", "variance", "squares"]))
    form = draw(st.sampled_from(["plain", "addcmul", "distributed", "distributed addcmul"]))
    cast_x, cast_n, cast_s, cast_t, late = (draw(swap) for _ in range(5))
    swap_one, swap_product, swap_sum = (draw(swap) for _ in range(3))

    def both(op: Callable[[Any, Any], Tensor], a: Any, b: Any, swapped: bool) -> Tensor:
        return op(b, a) if swapped else op(a, b)

    def function(x: Tensor, s: Tensor, t: Tensor, w: Tensor) -> Tensor:
        z = x.float() if cast_x or norm != "native" else x
        if norm == "native":
            n = F.layer_norm(z, z.shape[-1:], eps=1e-6)
        else:
            centred = z - z.mean(-1, keepdim=True)
            square = (centred * centred).mean(-1, keepdim=True)
            n = centred * torch.rsqrt(
                (z.var(-1, keepdim=True, unbiased=False) if norm == "variance" else square) + 1e-6
            )
        n = n.to(dtype).float() if cast_n else n
        s, t = s.float() if cast_s else s, t.float() if cast_t else t
        shift = t[:, None]
        if form.startswith("distributed"):
            scale = s[:, None]
            modulated = (
                torch.addcmul(n, n, scale) if form.endswith("addcmul") else both(torch.add, n, n * scale, swap_product)
            )
        else:
            scale = both(torch.add, s, 1, False) if not swap_one else 1 + s
            scale = scale[:, None] if late else scale.unsqueeze(1)
            if form == "addcmul":
                common = torch.promote_types(n.dtype, scale.dtype)
                common = torch.promote_types(common, shift.dtype)
                return torch.addcmul(shift.to(common), n.to(common), scale.to(common)).to(dtype) @ w
            modulated = both(torch.mul, n, scale, swap_product)
        return both(torch.add, modulated, shift, swap_sum).to(dtype) @ w

    return function, dtype


@FEW
@given(adaln())
def test_every_spelling_is_one_site(case: tuple[Callable[..., Tensor], torch.dtype]) -> None:
    function, dtype = case
    inputs = spell("x:BLD s:BD t:BD w:DD", dtype)
    module = trace(function, inputs)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    plan = fuse.plan(module.graph, Settings())
    (site,) = plan.taken
    assert site.name == "norm_modulate", str(plan.record)
    roots = {name: fuse_root(term) for name, term in site.operands.items()}
    assert roots == dict(zip(("x", "scale", "shift"), placeholders[:3], strict=True))
    fuse.run(module.graph, Settings(), lowered=False)
    module.recompile()
    check_numerics(function, inputs, (module(*inputs),))


def fuse_root(term: Any) -> fx.Node:
    """The node under the views of an operand."""
    while term.op == "view":
        term = term.args[0]
    return term.attrs[0]
