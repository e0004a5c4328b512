"""Launch plans of norm_rope from meta and symbolic tensors, and what compilers make of them; no kernel runs."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dkfuse.kernels.launch import Launch, supports
from dkfuse.kernels.rope_configs import choose_rope
from dkfuse.kernels.rope_launch import Call, plan_group
from dkfuse.kernels.rope_support import supports_rope
from dkfuse.kernels.unsupported import Unsupported

from .rope_plans import meta, planned, rope_call

pytest.importorskip("triton")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def source_of(launch: Launch) -> str:
    return inspect.getsource(launch.kernel.fn)


def test_a_launch_names_every_parameter_and_no_more() -> None:
    launch = planned(rope_call(meta(1, 4096, 24, 128), 4096, 1))
    assert set(launch.kernel.arg_names) == {*launch.tensors, *launch.scalars, *launch.constants}
    assert set(launch.tensors) == {"x", "weight", "cos", "sin", "out"}
    assert launch.scalars == {}  # one image needs no run-time integer
    assert launch.grid == (4096, 1, 1)
    assert launch.kernel.__name__ == "dkfuse_norm_rope"
    batch = planned(rope_call(meta(2, 4096, 24, 128), 4096, 1))
    tokens = 4096 * 24 * 128
    assert batch.scalars == {"n1": 4096, "x_s2": tokens, "out_s2": tokens}


def test_kernels_are_shared_between_calls_of_one_pattern() -> None:
    first = planned(rope_call(meta(1, 4096, 24, 128), 4096, 1))
    assert planned(rope_call(meta(1, 512, 24, 128), 512, 1)).kernel is first.kernel
    assert planned(rope_call(meta(1, 512, 30, 128), 512, 1)).kernel is not first.kernel


@pytest.mark.parametrize(
    ("arguments", "axes"),
    [
        (rope_call(meta(2, 6, 4, 16), 6, 1), 3),
        (rope_call(meta(1, 6, 4, 16), 6, 1), 2),
        (rope_call(meta(2, 4, 6, 16), 6), 2),  # tokens inside, heads and batch merge
        (rope_call(meta(2, 6, 4, 16).transpose(1, 2), 6), 3),
        (rope_call(meta(2, 6, 4, 16), 2, 6, 4), 1),  # tables per head merge with everything
        (rope_call(meta(2, 6, 4, 16), rotation="none", cos=None, sin=None), 1),
        (rope_call(meta(2, 6, 3, 4, 16)[:, :, 1], rotation="none", cos=None, sin=None), 2),
        (rope_call(meta(2, 6, 4, 16), 6, 1, across=2), 3),
        (rope_call(meta(2, 6, 2048), 1, 6), 3),  # a long row is an axis of its own
        (rope_call(meta(6, 2048), rotation="none", cos=None, sin=None, norm="none"), 1),
    ],
)
def test_row_dims(arguments: dict[str, Any], axes: int) -> None:
    launch = planned(arguments)
    x = arguments["x"]
    assert len([k for k in launch.scalars if k == "n1"]) == (axes == 3)
    assert launch.grid[0] <= x.numel() // x.shape[-1] * max(1, x.shape[-1] // 1024)


def test_a_group_has_the_pointers_that_differ() -> None:
    text, image = (rope_call(meta(1, n, 24, 128), n, 1) for n in (512, 4096))
    joint = meta(1, 4608, 24, 128)
    calls = [Call(text, joint[:, :512]), Call(text, joint[:, :512])]
    calls += [Call(image, joint[:, 512:], 512 * 3072), Call(image, joint[:, 512:], 512 * 3072)]
    alias = {"2.out": "0.out", "3.out": "1.out", "1.cos": "0.cos", "1.sin": "0.sin", "3.cos": "2.cos", "3.sin": "2.sin"}
    launch = plan_group(calls, alias=alias)
    assert launch.kernel.__name__ == "dkfuse_norm_rope_x4"
    assert set(launch.kernel.arg_names) == {*launch.tensors, *launch.scalars, *launch.constants}
    assert launch.grid == (2 * 4608, 1, 1)
    assert [launch.scalars[f"first{i}"] for i in (1, 2, 3)] == [512, 1024, 1024 + 4096]
    assert launch.scalars["out_offset_3"] == 512 * 3072
    assert launch.tensors["x_3"] == "3.x"
    assert len(launch.tensors) == 4 * 5 - len(alias)
    assert source_of(launch).count("rope_rows(") == 4
    one = plan_group(calls[:1])
    assert one.tensors["x_0"] == "0.x"
    assert one.kernel.__name__ == "dkfuse_norm_rope"


@pytest.mark.parametrize("alias", [{"0.cos": "4.cos"}, {"0.bias": "0.cos"}, {"1.cos": "0.cos", "0.cos": "1.cos"}])
def test_an_alias_leads_to_a_tensor(alias: dict[str, str]) -> None:
    call = Call(rope_call(meta(1, 6, 4, 16), 6, 1), meta(1, 6, 4, 16))
    with pytest.raises(ValueError, match="alias"):
        plan_group([call, call], alias=alias)
    with pytest.raises(ValueError, match="at least one"):
        plan_group([])


def test_configurations_waste_little() -> None:
    """Head counts of the models, and the whole range of a norm across heads."""
    for heads, across in itertools.product((1, 3, 4, 12, 16, 20, 24, 28, 30, 32, 38, 40, 48, 56, 64), (False, True)):
        for columns in (64, 128, 256):
            config = choose_rope(columns, columns, heads, across)
            tile = config.rows * config.blocks
            assert -(-heads // tile) * tile <= max(1.15 * heads, heads + 1), (heads, columns, across, config)
            assert config.rows & (config.rows - 1) == 0
            assert not across or tile >= heads
    for columns, rows in ((128, 128), (64, 256), (2, 8192), (1024, 16), (16384, 1)):
        config = choose_rope(columns, columns, rows, True)
        assert config.rows * config.blocks >= rows
    assert choose_rope(128, 128, 24, False, num_warps=2).num_warps == 2


X = meta(2, 6, 4, 16)


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("dtype", rope_call(meta(2, 6, 4, 16, dtype=FP64), 6, 1)),
        ("dtype", rope_call(X, 6, 1, out_dtype=FP64)),
        ("device", rope_call(X, 6, 1, weight=torch.empty(16))),
        ("rank", {**rope_call(X, 6, 1), "x": meta()}),
        ("row_too_long", rope_call(meta(2, 6, 16386), 6)),
        ("row_too_long", rope_call(meta(2, 6, 129, 128), 6, 1, across=2)),
        ("empty", rope_call(meta(2, 0, 4, 16), 1, 1)),
        ("broadcast", rope_call(X, 5, 1)),
        ("broadcast", rope_call(X, 6, 1, weight=meta(3, 16))),
        ("inner_stride", rope_call(meta(2, 6, 16, 4).transpose(2, 3), 6, 1)),
        ("odd_head_dim", rope_call(meta(2, 6, 4, 17), 6, 1)),
        ("table_width", rope_call(X, 6, 1, cos=meta(6, 1, 9), sin=meta(6, 1, 9))),
        ("tables", rope_call(X, 6, 1, sin=None)),
        ("outer_dims", rope_call(meta(2, 3, 4, 5, 16).permute(3, 2, 1, 0, 4), 5, 4, 3, 1)),
    ],
)
def test_supports_says_why_not(code: str, arguments: dict[str, Any]) -> None:
    reason = supports("norm_rope", arguments)
    assert isinstance(reason, Unsupported)
    assert (reason.code, reason.message[-1]) == (code, ".")
    with pytest.raises(Unsupported):
        planned(arguments)


def test_fp64_tables_are_supported_and_an_output_may_be_anywhere() -> None:
    tables = {"cos": meta(6, 1, 8, dtype=FP64), "sin": meta(6, 1, 8, dtype=FP64)}
    assert supports("norm_rope", rope_call(X, 6, 1, **tables)) is None
    launch = planned(rope_call(X, 6, 1), out=meta(2, 9, 4, 16)[:, 3:], offsets={"out": 3 * 64 + 2**40})
    assert launch.scalars["out_offset"] == 3 * 64 + 2**40
    with pytest.raises(ValueError, match="inner stride 2"):
        planned(rope_call(X, 6, 1), out=meta(2, 6, 4, 32)[..., ::2])


# -- symbolic sizes --


def test_symbolic_tokens_and_batch_without_guards() -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    dynamic = [DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC]
    context = StatelessSymbolicContext(dynamic_sizes=dynamic, constraint_sizes=[None] * 4)
    packed = mode.from_tensor(torch.empty(2, 40, 24, 3 * 128, dtype=BF16), symbolic_context=context)
    with mode:
        x, tokens = packed[..., 128:256], packed.shape[1]
        tables = {"cos": torch.empty(tokens, 1, 64), "sin": torch.empty(1, tokens, 1, 64), "weight": torch.empty(128)}
        out = torch.empty(packed.shape[0], 2 * tokens, 24, 128, dtype=BF16)
        heads_first = x.transpose(1, 2)
    guards = len(environment.guards)
    call = {**rope_call(X, 6, 1), "x": x, **tables}
    assert supports_rope(call) is None
    alone = planned(call, out=out[:, :tokens])
    assert alone.grid[0] == x.shape[0] * tokens
    calls = [Call(call, out[:, :tokens]), Call({**call, "across": 2}, out[:, tokens:], tokens * 3072)]
    calls.append(Call({**call, "x": heads_first, "cos": tables["sin"], "rotation": "none"}, out[:, :tokens]))
    calls[2].arguments.update(dict.fromkeys(("cos", "sin")))
    calls[2] = Call(calls[2].arguments, out[:, :tokens].transpose(1, 2))
    launch = plan_group(calls)
    assert len(environment.guards) == guards
    assert set(launch.kernel.arg_names) == {*launch.tensors, *launch.scalars, *launch.constants}
    assert isinstance(launch.scalars["first2"], torch.SymInt)
    assert launch.scalars["out_offset_1"] == tokens * 3072


def test_a_symbolic_grid_becomes_graph_nodes() -> None:
    """A norm alone has all rows on one axis: the number of programs is a rounded-up quotient."""
    from dkfuse.rewriting import symbols

    environment = ShapeEnv()
    context = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC],
        constraint_sizes=[None] * 4,
    )
    x = FakeTensorMode(shape_env=environment).from_tensor(torch.empty(2, 77, 24, 64), symbolic_context=context)
    call = Call({"x": x, "norm": "rms", "eps": 1e-6, "out_dtype": FP32}, x)
    launch = plan_group([call, call])
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    graph.output(symbols.arguments(graph, launch.grid, [node]))
    for size in (77, 1, 1000):
        tensor = torch.empty(2, size, 24, 64)
        programs, _, _ = torch.fx.GraphModule({}, graph)(tensor)
        assert programs == plan_group([Call({**call.arguments, "x": tensor}, tensor)] * 2).grid[0]
