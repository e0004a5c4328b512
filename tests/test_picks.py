"""Rows picked per token: the ops against `torch.where`, what they refuse, and what the compiled graph looks like."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from dkfuse import compat
from dkfuse.kernels import ops
from dkfuse.kernels.picks import PICKED
from dkfuse.kernels.support import OPERANDS, supports
from dkfuse.rewriting.lower import bound_arguments

from .harness import check_numerics, counts, fused, run, spell
from .norm_calls import SHAPE, arguments_of
from .spellings_picks import picked, selected
from .spellings_streams import modulated
from .tensors import random
from .test_kernels_ops import call

B, L, D = SHAPE
MASK = torch.rand((B, L, 1), generator=torch.Generator().manual_seed(5)) > 0.5

NUMBERS = torch.randint(0, 3, (B, L, 1), generator=torch.Generator().manual_seed(6))


def pairs_of(op: str) -> dict[str, torch.Tensor]:
    return {name: random(2, B, 1, D, seed=i) for i, name in enumerate(PICKED) if name in OPERANDS[op][1]}


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("mask", [MASK, MASK[:1], MASK[0], torch.tensor(True)])
def test_a_pick_is_a_where(op: str, mask: torch.Tensor) -> None:
    pairs = pairs_of(op)
    chosen = {name: torch.where(mask, rows[0], rows[1]) for name, rows in pairs.items()}
    ours = call(op, {**arguments_of(op), **pairs, "pick": mask})
    for name, value in call(op, {**arguments_of(op), **chosen}).items():
        assert torch.equal(ours[name], value)


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("numbers", [NUMBERS, NUMBERS[:1].int(), NUMBERS[0], torch.tensor(2)])
def test_a_pick_by_number_is_an_index(op: str, numbers: torch.Tensor) -> None:
    rows = {name: random(3, B, 1, D, seed=i) for i, name in enumerate(PICKED) if name in OPERANDS[op][1]}
    each = numbers.expand(B, L, 1)[..., 0].tolist()
    chosen = {n: torch.stack([r[numbers, b, 0] for b, numbers in enumerate(each)]) for n, r in rows.items()}
    ours = call(op, {**arguments_of(op), **rows, "pick": numbers})
    for name, value in call(op, {**arguments_of(op), **chosen}).items():
        assert torch.equal(ours[name], value)


@pytest.mark.parametrize("op", ops.OPS)
def test_opcheck(op: str) -> None:
    arguments = {**arguments_of(op), **pairs_of(op), "pick": MASK}
    schema = getattr(torch.ops.dkfuse, op).default._schema
    args = tuple(arguments.get(a.name) for a in schema.arguments if not a.kwarg_only)
    kwargs = {a.name: arguments[a.name] for a in schema.arguments if a.kwarg_only}
    torch.library.opcheck(getattr(torch.ops.dkfuse, op).default, args, kwargs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pick": MASK.half()}, "pick has dtype torch.float16; use bool, true where a token takes the first of two"),
        (
            {"pick": MASK.int(), "scale": random(3, B, 1, D)},
            "shift has 2 rows, scale 3; pick chooses one of equally many",
        ),
        ({"pick": MASK.expand(SHAPE)}, "its last dim must be 1"),
        ({"pick": MASK[:, :2]}, "pick of shape (2, 2, 1) does not broadcast"),
        ({"scale": random(3, B, 1, D)}, "scale has shape (3, 2, 1, 96); pick chooses between two rows"),
        ({"scale": random(2, B, 1, D - 1)}, "scale of shape (2, 1, 95) does not broadcast"),
        ({"weight": random(2, B, 1, D)}, "weight of shape (2, 2, 1, 96) does not broadcast"),
        ({"pick": None}, "scale of shape (2, 2, 1, 96) does not broadcast"),
    ],
)
def test_errors_name_the_value(change: dict[str, Any], words: str) -> None:
    arguments = {**arguments_of("norm_modulate"), **pairs_of("norm_modulate"), "pick": MASK, **change}
    with pytest.raises(ValueError) as error:
        call("norm_modulate", arguments)
    assert words in str(error.value)
    assert supports("norm_modulate", arguments) is not None


def test_a_launch_reads_the_pair_in_place() -> None:
    pytest.importorskip("triton")
    from dkfuse.kernels.launch import plan

    x = torch.empty(1, 4096, 3072, dtype=torch.bfloat16, device="meta")
    vectors = torch.empty(2, 1, 1, 6 * 3072, dtype=torch.bfloat16, device="meta").chunk(6, dim=-1)
    mask = torch.empty(1, 4096, 1, dtype=torch.bool, device="meta")
    arguments = {"x": x, "scale": vectors[0], "shift": vectors[1], "norm": "layer", "eps": 1e-6, "pick": mask}
    launch = plan("norm_modulate", {**arguments, "out_dtype": torch.bfloat16}, {"out": x}, sm_count=132)
    assert set(launch.tensors) == {"x", "scale", "shift", "pick", "out"}
    assert launch.scalars == {}  # the step from row to row is 6 * D, fixed in the source
    assert set(launch.kernel.arg_names) == {*launch.tensors, *launch.constants}
    assert "6 * D" in inspect.getsource(launch.kernel.fn)


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_length_and_eager_roundings(dynamic: bool) -> None:
    def function(h: torch.Tensor, y: torch.Tensor, e: torch.Tensor, m: torch.Tensor, w: torch.Tensor) -> Any:
        gate, shift, scale, *_ = picked(e, m, 6)
        h = h + gate * (y @ w)
        return h, modulated(h, scale, shift) @ w

    args = spell("h:BLD y:BLD e:4P m:BL w:DD")
    for tensor in (args[0], args[1], args[3]) if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 1)
    results, coverage = run(function, args, dynamic=None)
    assert counts(coverage) == {"residual_gate_norm_modulate": 1, "absorbed": 1}, str(coverage)
    check_numerics(function, args, results)
    if not dynamic:
        exact, _ = run(function, args, roundings="eager")
        assert all(torch.equal(a, b) for a, b in zip(exact, function(*args), strict=True))


@pytest.mark.parametrize("rows", [2, 4])
def test_masks_are_shared_and_pairs_are_views(rows: int) -> None:
    """What is handed to Inductor: one mask for all sites, and no copy of the rows."""
    from dkfuse.fuse import plan
    from dkfuse.rewriting.replace import replace
    from dkfuse.settings import Settings

    from .spellings_picks import picked_by_one_mask_computed_often as function

    graphs = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        def inner(module: Any, _: Any) -> Any:
            decided = plan(module.graph, Settings())
            graphs.append((module.graph, replace(module.graph, decided.view, decided.taken)))
            return lambda *args: [torch.empty(())] * len(module.graph.output_node().args[0])

        return compat.lower_with(gm, example_inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*spell(f"h:{rows // 2}LD e:{rows}P f:{rows}P m:{rows // 2}L w:DD"))
    ((graph, calls),) = graphs
    targets = [str(node.target) for node in graph.nodes]
    assert len(calls) == 3
    assert len({bound_arguments(call)["pick"] for call in calls}) == 1
    assert "aten.where.self" not in targets
    assert targets.count("aten.eq.Scalar") == 1
    assert not any(name in target for target in targets for name in ("cat", "stack", "clone"))


# -- rows of two tensors -----------------------------------------------------------------------------------------------

aten = torch.ops.aten
TWO = "h:BLD y:BLD e:BP f:BP m:BL w:DD"


def count(graph: fx.Graph, target: Any) -> int:
    return len(list(graph.find_nodes(op="call_function", target=target)))


def two_blocks(h: Tensor, y: Tensor, e: Tensor, f: Tensor, m: Tensor, w: Tensor) -> Tensor:
    for _ in range(2):
        (g0, s0, t0, *_), (g1, s1, t1, *_) = e.chunk(6, dim=1), f.chunk(6, dim=1)
        h = h + selected(m, g0.tanh(), g1.tanh()) * y
        y = modulated(h, selected(m, 1.0 + s0, 1.0 + s1), selected(m, t0, t1)) @ w
    return h + y


def test_rows_of_two_projections_are_brought_together_by_one_copy() -> None:
    graph = fused(two_blocks, spell(TWO))
    assert count(graph, aten.cat.default) == 1
    for node in graph.find_nodes(op="call_function", target=torch.ops.dkfuse.residual_norm_modulate.default):
        given = bound_arguments(node)
        assert given["pick"] is not None
        assert [given[name].meta["val"].shape[0] for name in ("gate", "scale", "shift")] == [2, 2, 2]


def picked_without_a_norm(h: Tensor, y: Tensor, e: Tensor, f: Tensor, m: Tensor, w: Tensor) -> Tensor:
    return (h * selected(m, e[:, :36], f[:, :36]).tanh()) @ w


def picked_by_columns(h: Tensor, y: Tensor, e: Tensor, f: Tensor, m: Tensor, w: Tensor) -> Tensor:
    scale = torch.where(h > 0, e[:, None, :36], f[:, None, :36])
    return modulated(h, scale, y[:, :1]) @ w


def test_rows_of_two_projections_for_any_number_of_tokens() -> None:
    args = spell(TWO)
    for tensor in (args[0], args[1], args[4]):
        torch._dynamo.mark_dynamic(tensor, 1)
    results, coverage = run(two_blocks, args, dynamic=None)
    assert counts(coverage)["residual_gate_norm_modulate"] == 2, str(coverage)
    check_numerics(two_blocks, args, results)
    exact, _ = run(two_blocks, spell(TWO), roundings="eager")
    assert torch.equal(exact[0], two_blocks(*spell(TWO)))


@pytest.mark.parametrize("function", [picked_without_a_norm, picked_by_columns])
def test_what_gains_no_site_is_left(function: Any) -> None:
    inputs = spell(TWO)
    graph = fused(function, inputs)
    assert count(graph, aten.cat.default) == 0
    assert count(graph, aten.where.self) == 1
    check_numerics(function, inputs, run(function, inputs)[0])


# -- by number ---------------------------------------------------------------------------------------------------------


def numbered(h: Tensor, y: Tensor, e: Tensor, n: Tensor, w: Tensor) -> Tensor:
    """Two blocks that look up, in tables of their own, the rows of the same numbers."""
    for table in e.unbind():
        shift, scale, gate = (part.index_select(0, n) for part in table.chunk(3, dim=-1))
        h = h + gate * y
        y = modulated(h, scale, shift) @ w
    return h + y


def numbered_args(tokens: int = 9) -> list[Tensor]:
    return [
        random(tokens, 36, seed=1), random(tokens, 36, seed=2), random(2, 4, 108, seed=3),
        torch.arange(tokens) % 4, random(36, 36, seed=4),
    ]  # fmt: skip


def test_numbers_are_checked_once_for_all_sites() -> None:
    """And no row is written for a token."""
    graph = fused(numbered, numbered_args())
    calls = list(graph.find_nodes(op="call_function", target=torch.ops.dkfuse.residual_norm_modulate.default))
    (every,) = graph.find_nodes(op="call_function", target=torch.ops.prims.iota.default)
    (checked,) = graph.find_nodes(op="call_function", target=aten.index.Tensor)
    assert len(calls) == 2 and every.args == (4,) and checked.args[0] is every
    for call_ in calls:
        given = bound_arguments(call_)
        assert given["pick"].args[0] is checked and given["pick"].meta["val"].shape == (9, 1)
        assert [given[name].meta["val"].shape for name in ("gate", "scale", "shift")] == 3 * [(4, 1, 36)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_by_number_for_any_number_of_tokens(dynamic: bool) -> None:
    args = numbered_args()
    for tensor in (args[0], args[1], args[3]) if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    results, coverage = run(numbered, args, dynamic=None)
    assert counts(coverage) == {"residual_gate_norm_modulate": 2, "absorbed": 2}, str(coverage)
    check_numerics(numbered, args, results)
    exact, _ = run(numbered, numbered_args(), roundings="eager")
    assert torch.equal(exact[0], numbered(*numbered_args()))


@pytest.mark.parametrize("wrong", [4, 1000, -5])
def test_a_number_without_a_row_is_an_error(wrong: int) -> None:
    args = numbered_args()
    compiled = torch.compile(numbered, backend="dkfuse", options={"dkfuse.remainder": "eager"})
    with torch.no_grad():
        compiled(*args)
        args[3] = args[3].clone()
        args[3][2] = wrong
        with pytest.raises(IndexError, match=r"out of (bounds|range)"):
            compiled(*args)


def test_negative_numbers_count_from_the_end() -> None:
    def function(h: Tensor, y: Tensor, e: Tensor, n: Tensor, w: Tensor) -> Tensor:
        shift, scale, _ = e[0].chunk(3, dim=-1)
        return modulated(h, scale[n], shift[n]) @ w

    args = numbered_args()
    args[3] = args[3] - 4
    results, coverage = run(function, args)
    assert counts(coverage) == {"norm_modulate": 1}, str(coverage)
    check_numerics(function, args, results)


def of_samples_and_of_tokens(h: Tensor, e: Tensor, n: Tensor, w: Tensor) -> Tensor:
    shift, scale, *_ = e.chunk(6, dim=-1)
    return modulated(h, scale[n].unsqueeze(1), shift[n]) @ w


def of_tokens_and_of_samples(h: Tensor, e: Tensor, n: Tensor, w: Tensor) -> Tensor:
    shift, scale, *_ = e.chunk(6, dim=-1)
    return modulated(h, scale[n], shift[n].unsqueeze(1)) @ w


@pytest.mark.parametrize("function", [of_samples_and_of_tokens, of_tokens_and_of_samples])
def test_the_same_numbers_of_samples_and_of_tokens(function: Any) -> None:
    """As many samples as tokens: both fit."""
    args = spell("h:44D e:3P n:4:i w:DD")
    args[2] = torch.tensor([0, 2, 1, 0])
    results, coverage = run(function, args)
    assert counts(coverage) == {"norm_modulate": 1}, str(coverage)
    check_numerics(function, args, results)


# -- segments ----------------------------------------------------------------------------------------------------------


def in_segments(h: Tensor, s: Tensor) -> Tensor:
    return torch.cat([h[:, :4] * s[:, :1], h[:, 4:] * s[:, 1:]], 1)


def test_segments_without_a_site_stay() -> None:
    def function(h: Tensor, s: Tensor, w: Tensor) -> Tensor:
        return in_segments(h, s) @ w

    args = spell("h:BLD s:B2D w:DD")
    graph = fused(function, args)
    assert count(graph, aten.cat.default) == 1 and count(graph, aten.where.self) == 0
    assert count(graph, torch.ops.prims.iota.default) == 0
    check_numerics(function, args, run(function, args)[0])


def test_segments_are_picked_by_one_mask() -> None:
    """The cats are gone, and the norm is computed once, for all tokens."""

    def function(h: Tensor, y: Tensor, e: Tensor, w: Tensor) -> Tensor:
        gate, scale, *_ = e.chunk(6, -1)
        h = h + in_segments(y, gate)
        return in_segments(torch.nn.functional.layer_norm(h, (36,)), scale) @ w + h[..., :36]

    args = spell("h:BLD y:BLD e:B2P w:DD")
    graph = fused(function, args)
    (call_,) = graph.find_nodes(op="call_function", target=torch.ops.dkfuse.residual_norm_modulate.default)
    given = bound_arguments(call_)
    assert given["pick"].meta["val"].shape == (6, 1) and given["x"].meta["val"].shape == (2, 6, 36)
    assert [given[name].meta["val"].shape[0] for name in ("gate", "scale")] == [2, 2]
    assert count(graph, aten.cat.default) == 0 and count(graph, torch.ops.prims.iota.default) == 1
    check_numerics(function, args, run(function, args)[0])


def test_a_number_for_each_segment_is_no_row() -> None:
    """As a row it would make the product fp32."""

    def function(h: Tensor, s: Tensor, w: Tensor) -> Tensor:
        h = torch.nn.functional.layer_norm(h, (36,))
        return torch.cat([h[:, :4] * s[0, 0, 0], h[:, 4:] * s[0, 1, 0]], 1) @ w

    args = spell("h:BLD s:B2D:f w:DD")
    results, coverage = run(function, args)
    assert "norm_modulate" not in counts(coverage)
    torch.testing.assert_close(results[0], function(*args), rtol=0.02, atol=0.05)
