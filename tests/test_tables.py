"""Rows of a scale-shift table: the ops against the sum, refusals, what the compiled graph looks like, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dkfuse
from dkfuse.kernels import ops
from dkfuse.kernels.support import OPERANDS, supports
from dkfuse.kernels.tables import TABLED, TABLES, table_of
from dkfuse.matching.gain import is_elementwise
from dkfuse.matching.tables import _origin
from dkfuse.rewriting.calls import bound_arguments

from .harness import check_numerics, counts, fused, run, spell
from .norm_calls import SHAPE, arguments_of
from .spellings import ln
from .spellings_tables import APART, ROWS, ltx, wan
from .tensors import random
from .test_kernels_ops import call

B, L, D = SHAPE
BF16, FP32 = torch.bfloat16, torch.float32


def tables_of(op: str, *shape: int, dtype: torch.dtype = BF16) -> dict[str, torch.Tensor]:
    names = [name for name in TABLED if name in OPERANDS[op][1]]
    return {table_of(name): random(*shape, dtype=dtype, seed=20 + i) for i, name in enumerate(names)}


def per_token(op: str) -> dict[str, Any]:
    """A call whose gates, scales and shifts are slices of one tensor of a vector for each token."""
    parts = random(B, L, 6, D, seed=9).unbind(2)
    return {**arguments_of(op), **{n: p for n, p in zip(TABLED, parts, strict=False) if n in OPERANDS[op][1]}}


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("shape", [(D,), (1, 1, D), (B, 1, D), (1,), ()])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_table_is_a_sum_in_fp32(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments, rows = per_token(op), tables_of(op, *shape, dtype=dtype)
    assert supports(op, {**arguments, **rows}) is None
    sums = {n: arguments[n].float() + rows[table_of(n)].float() for n in TABLED if n in arguments}
    ours = call(op, {**arguments, **rows})
    for name, value in call(op, {**arguments, **sums}).items():
        assert torch.equal(ours[name], value)
    assert not torch.equal(ours["out"], call(op, arguments)["out"])


@pytest.mark.parametrize("op", ops.OPS)
def test_against_fp64(op: str) -> None:
    arguments = {**per_token(op), **tables_of(op, D, dtype=FP32)}
    missing = {a.name: None for a in getattr(torch.ops.dkfuse, op).default._schema.arguments}
    exact = ops.reference_outputs(op, {**missing, **arguments}, compute=torch.float64)
    for name, value in call(op, arguments).items():
        assert exact[name].dtype == torch.float64
        assert (value - exact[name]).norm() / exact[name].norm() < 3e-3


@pytest.mark.parametrize("op", ops.OPS)
def test_opcheck(op: str) -> None:
    arguments = {**per_token(op), **tables_of(op, D)}
    schema = getattr(torch.ops.dkfuse, op).default._schema
    args = tuple(arguments.get(a.name) for a in schema.arguments if not a.kwarg_only)
    kwargs = {a.name: arguments[a.name] for a in schema.arguments if a.kwarg_only}
    torch.library.opcheck(getattr(torch.ops.dkfuse, op).default, args, kwargs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale_table": random(D - 1)}, "scale_table of shape (95,) does not broadcast"),
        ({"shift_table": random(1, B, L, D)}, "shift_table of shape (1, 2, 5, 96) does not broadcast"),
        ({"scale_table": random(D).double()}, "scale_table has dtype torch.float64"),
        ({"scale": None}, "scale_table is given but scale is not; pass the row as scale itself"),
    ],
)
def test_errors_name_the_value(change: dict[str, Any], words: str) -> None:
    arguments = {**per_token("norm_modulate"), **tables_of("norm_modulate", D), **change}
    with pytest.raises(ValueError) as error:
        call("norm_modulate", arguments)
    assert words in str(error.value)
    assert supports("norm_modulate", arguments) is not None


def test_a_launch_has_parameters_for_the_tables_that_are_given_only() -> None:
    pytest.importorskip("triton")
    from dkfuse.kernels.launch import plan

    x = torch.empty(1, 4096, 3072, dtype=BF16, device="meta")
    scale, shift, *_ = torch.empty(1, 4096, 6, 3072, dtype=BF16, device="meta").unbind(2)
    table = torch.empty(6, 3072, device="meta")
    arguments = {"x": x, "scale": scale, "shift": shift, "norm": "layer", "eps": 1e-6, "out_dtype": BF16}
    launch = plan("norm_modulate", {**arguments, "shift_table": table[1]}, {"out": x}, sm_count=132)
    assert set(launch.tensors) == {"x", "scale", "shift", "shift_table", "out"}
    assert launch.scalars == {}
    assert set(launch.kernel.arg_names) == {*launch.tensors, *launch.constants}
    without = plan("norm_modulate", arguments, {"out": x}, sm_count=132)
    assert set(without.kernel.arg_names) == {*launch.kernel.arg_names} - {"shift_table"}
    assert without.config == launch.config


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in APART], ids=lambda row: row.name)
def test_sums_are_taken_apart(row: Any) -> None:
    """Exactly the named tables are given, and where there are any nothing else of the sum is left."""
    graph = fused(row.function, spell(row.inputs, row.dtype))
    calls = [node for node in graph.nodes if str(node.target).startswith("dkfuse.")]
    given = {name for node in calls for name in TABLES if bound_arguments(node).get(name) is not None}
    assert calls and given == APART[row.name]
    if given and row.name != "written_by_nobody":  # somebody else reads the sum
        left = [node for node in graph.nodes if node.op == "call_function" and is_elementwise(node)]
        assert all(node.meta["val"].numel() <= 2 * 36 for node in left), graph


@pytest.mark.parametrize("function", [wan, ltx])
def test_tokens_are_read_in_their_own_dtype(function: Any) -> None:
    kind = "f" if function is wan else "b"
    graph = fused(function, spell(f"h:BLD table:6D:{kind} e:BLP y:BLD w:DD"))
    (node,) = (n for n in graph.nodes if str(n.target).startswith("dkfuse."))
    arguments = bound_arguments(node)
    for name in ("gate", "scale", "shift"):
        assert arguments[name].meta["val"].dtype == BF16
        assert arguments[name].meta["val"].stride() == (6 * 6 * 36, 6 * 36, 1)  # a part, not a copy
        assert arguments[table_of(name)].meta["val"].dtype == {"f": FP32, "b": BF16}[kind]


TOKENS = 2 * 6 * 36


def norm_site(coverage: Any) -> Any:
    (site,) = (s for s in coverage.sites if s.with_site is None)
    return site


@pytest.mark.parametrize(("function", "kind", "rows"), [(wan, "f", 3 * 36 * 4), (ltx, "b", 0)])
def test_eager_roundings_keep_the_rounding_of_a_sum(function: Any, kind: str, rows: int) -> None:
    """A fp32 sum is not rounded; one in bf16 is computed outside."""
    args = spell(f"h:BLD table:6D:{kind} e:BLP y:BLD w:DD")
    results, coverage = run(function, args, roundings="eager")
    assert counts(coverage) == {"residual_gate_norm_modulate": 1, "absorbed": 1}, str(coverage)
    assert all(torch.equal(a, b) for a, b in zip(results, function(*args), strict=True))
    # h, y, the stream, the result and three parts, of the sum or of e
    assert norm_site(coverage).bytes_after == TOKENS * 2 * (2 + 2 + 3) + rows


@pytest.mark.parametrize("function", [wan, ltx])
def test_any_number_of_tokens(function: Any) -> None:
    args = spell(f"h:BLD table:6D:{'f' if function is wan else 'b'} e:BLP y:BLD w:DD")
    for index in (0, 2, 3):
        torch._dynamo.mark_dynamic(args[index], 1)
    results, coverage = run(function, args, dynamic=None)
    assert counts(coverage) == {"residual_gate_norm_modulate": 1, "absorbed": 1}, str(coverage)
    check_numerics(function, args, results)


def test_traffic_has_the_sum_and_the_addends() -> None:
    def shifted(x: torch.Tensor, s: torch.Tensor, e: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (ln(x) * (1 + s) + e) @ w

    def tabled(x: torch.Tensor, s: torch.Tensor, e: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (ln(x) * (1 + s) + (t + e)) @ w

    args = spell("x:BLD s:B1D e:BLD t:D w:DD")
    (without, with_table) = (norm_site(run(function, args)[1]) for function in (shifted, tabled))
    assert with_table.bytes_before - without.bytes_before == 2 * (TOKENS + 36 + TOKENS)
    assert with_table.bytes_after - without.bytes_after == 2 * 36


@pytest.mark.parametrize(
    ("kind", "kernels", "expected"),
    [
        ("BP", ("cute",), {"norm_modulate": 1}),
        ("BP", ("triton",), {"norm_modulate": 1}),
        ("BLP", ("triton",), {"norm_modulate": 1}),
        ("BLP", ("cute",), {"left:feeds_pointwise": 1}),  # a row for each token would have to be written
    ],
)
def test_a_kernel_that_adds_no_rows_is_given_the_sum(kind: str, kernels: tuple[str], expected: dict[str, int]) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, table: torch.Tensor, e: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            parts = table + e.unflatten(-1, (6, -1))
            shift, scale, *_ = parts.chunk(6, 1) if kind == "BP" else parts.unbind(-2)
            return (ln(x) * (1 + scale) + shift) @ w

    wide = {"D": 64, "P": 6 * 64, "B": 2, "L": 64, "6": 6}
    shapes = ("BLD", "6D", kind, "DD")
    inputs = [torch.empty([wide[c] for c in shape], device="meta", dtype=BF16) for shape in shapes]
    settings = dkfuse.Settings(target="sm90", kernels=kernels)
    coverage = dkfuse.coverage(Model(), *inputs, settings=settings)
    assert counts(coverage) == expected, str(coverage)
    assert norm_site(coverage).kernel == (kernels[0] if "norm_modulate" in expected else None)


@pytest.mark.parametrize("name", ["wan21-14b", "ltx", "pixart-sigma", "sana"])
def test_no_sum_of_a_table_is_left_in_a_model(name: str) -> None:
    """Each would be a launch of its own."""
    pytest.importorskip("diffusers")
    from dkfuse import zoo

    module, kwargs = zoo.build(name)

    def model(*values: Any) -> Any:
        return module(**dict(zip(kwargs, values, strict=True)))

    calls = [node for node in fused(model, list(kwargs.values())).nodes if str(node.target).startswith("dkfuse.")]
    given = [bound_arguments(node).get(table) for node in calls for table in TABLES]
    assert sum(table is not None for table in given) >= 3 * 2 * 2  # a shift and a scale, or a gate, of two blocks
    for node in calls:
        for argument in TABLED:
            operand = bound_arguments(node).get(argument)
            origin = None if operand is None else _origin(operand).target
            assert origin is not torch.ops.aten.add.Tensor, (node, argument)
