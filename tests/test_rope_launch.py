"""Launch plans of norm_rope from meta and symbolic tensors, and what compilers make of them; no kernel runs."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dkfuse.kernels.launch import Launch, plan, supports
from dkfuse.kernels.rope_configs import choose_rope
from dkfuse.kernels.rope_launch import Call, plan_group
from dkfuse.kernels.rope_support import supports_rope
from dkfuse.kernels.unsupported import Unsupported

pytest.importorskip("triton")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def meta(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def rope_call(x: Any, *outer: int, **more: Any) -> dict[str, Any]:
    """RMS norm with a weight and an interleaved rotation by half tables of these outer dims."""
    pairs = x.shape[-1] // 2
    tables = {"cos": meta(*outer, pairs, dtype=FP32), "sin": meta(*outer, pairs, dtype=FP32)}
    norm = {"norm": "rms", "eps": 1e-6, "weight": meta(x.shape[-1])}
    return {"x": x, **norm, **tables, "rotation": "interleaved", "out_dtype": BF16, **more}


def planned(arguments: dict[str, Any], out: Any = None, **more: Any) -> Launch:
    x = arguments["x"]
    out = torch.empty(x.shape, dtype=BF16, device=x.device) if out is None else out
    return plan("norm_rope", arguments, {"out": out}, sm_count=132, **more)


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
    from dkfuse import symbols

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


# -- what compilers see --


@pytest.fixture
def sm90() -> Any:
    """Triton's front end without a GPU: the driver answers with an H100's target."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    previous = driver._active
    driver.set_active(Driver())
    yield GPUTarget("cuda", 90, 32)
    driver._active = previous


@pytest.mark.parametrize("rotation", ["none", "interleaved", "half"])
@pytest.mark.parametrize("count", [1, 4])
def test_inductor_sees_that_only_outputs_are_written(sm90: Any, rotation: str, count: int) -> None:
    """A kernel that its analysis does not understand counts as writing every operand, which costs a copy of each."""
    import torch._higher_order_ops.triton_kernel_wrap as wrap

    x, table = torch.empty(2, 8, 4, 64, dtype=BF16), torch.empty(8, 1, 48) if rotation != "none" else None
    arguments = {
        "x": x,
        "weight": torch.empty(64),
        "bias": torch.empty(64),
        "cos": table,
        "sin": table,
        "norm": "layer",
    }
    arguments.update(rotation=rotation, tables="full", eps=1e-6, out_dtype=BF16)
    launch = plan_group([Call({**arguments, "across": 2 if i % 2 else None}, x) for i in range(count)])
    tensors = {f"{i}.{k}": v for i in range(count) for k, v in {**arguments, "out": x}.items()}
    kwargs = {**{p: tensors[n] for p, n in launch.tensors.items()}, **launch.scalars, **launch.constants}
    if hasattr(wrap, "identify_mutated_tensors"):  # torch 2.11
        written = set(wrap.identify_mutated_tensors(launch.kernel, kwargs, {}))
    else:
        accesses = wrap.identify_accessed_tensors(launch.kernel, kwargs, {})
        written = {dep.name for dep in accesses.read_writes.writes}
    assert written == {f"out_{i}" for i in range(count)}


def ptx_of(launch: Launch, dtypes: dict[str, str], target: Any) -> str:
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    names = list(launch.kernel.arg_names)
    signature = {n: dtypes.get(n, "*bf16") if n in launch.tensors else "i32" for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in launch.tensors}
    source = ASTSource(launch.kernel, signature, constexprs={}, attrs=aligned)
    return compile_kernel(source, target=target, options={"num_warps": launch.num_warps}).asm["ptx"]


FP32_TABLES = {"cos": "*fp32", "sin": "*fp32"}


@pytest.mark.parametrize("kind", ["half", "full", "complex"])
@pytest.mark.parametrize("heads", [24, 40])
@pytest.mark.parametrize("last", [False, True])
def test_interleaved_pairs_stay_in_registers(sm90: Any, kind: str, heads: int, last: bool) -> None:
    """16 bytes per access, nothing through shared memory, nothing spilled."""
    arguments = rope_call(meta(1, 4096, heads, 128), 4096, 1, tables=kind, norm_last=last)
    if kind != "half":
        arguments.update(cos=meta(4096, 1, 128, dtype=FP32), sin=meta(4096, 1, 128, dtype=FP32))
        arguments.update({"sin": None} if kind == "complex" else {})
    ptx = ptx_of(planned(arguments), FP32_TABLES, sm90)
    loads, stores = ([line for line in ptx.splitlines() if f"{op}.global" in line] for op in ("ld", "st"))
    assert all(".v4." in line for line in (*loads, *stores))
    assert not any(word in ptx for word in (".local", "bar.sync", "st.shared"))


@pytest.mark.parametrize("rotation", ["interleaved", "half"])
@pytest.mark.parametrize("d", [40, 72, 88, 96, 112, 1024])
def test_compiles_for_every_head_dim(sm90: Any, rotation: str, d: int) -> None:
    ptx = ptx_of(planned(rope_call(meta(1, 64, 12, d), 64, 1, rotation=rotation)), FP32_TABLES, sm90)
    assert ".local" not in ptx


def test_a_norm_across_heads_crosses_warps_once(sm90: Any) -> None:
    arguments = rope_call(meta(1, 32760, 40, 128), 1, 32760, 1, across=2, weight=meta(40, 128))
    ptx = ptx_of(planned(arguments), FP32_TABLES, sm90)
    assert ptx.count("st.shared") <= 2  # the warps' sums, and with Triton 3.6 what the first warp makes of them
    assert ".local" not in ptx


def test_fp64_tables_multiply_in_fp64(sm90: Any) -> None:
    tables = {"cos": meta(64, 1, 64, dtype=FP64), "sin": meta(64, 1, 64, dtype=FP64)}
    ptx = ptx_of(planned(rope_call(meta(1, 64, 24, 128), 64, 1, **tables)), {"cos": "*fp64", "sin": "*fp64"}, sm90)
    assert ".f64" in ptx
    plain = ptx_of(planned(rope_call(meta(1, 64, 24, 128), 64, 1)), FP32_TABLES, sm90)
    assert ".f64" not in plain


def test_the_roundings_of_a_rotation_survive_the_compiler(sm90: Any) -> None:
    """LLVM would contract a rounded product and the next sum to one half-precision FMA."""
    tables = {"cos": meta(64, 1, 128), "sin": meta(64, 1, 128), "tables": "full", "rotation": "half"}
    ptx = ptx_of(planned(rope_call(meta(1, 64, 24, 128), 64, 1, **tables, roundings=512)), {}, sm90)
    assert "fma.rn.bf16" not in ptx
