"""Launch plans and `supports`, from real, meta and symbolic tensors; nothing here runs a kernel."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dkfuse.kernels.configs import WARPS, choose
from dkfuse.kernels.launch import Launch, candidates, plan, supports
from dkfuse.kernels.support import MAX_ROW
from dkfuse.kernels.unsupported import Unsupported

from .norm_plans import branch_call, meta, norm_call, planned

pytest.importorskip("triton")

BF16 = torch.bfloat16


def parameters(launch: Launch) -> set[str]:
    return set(launch.kernel.arg_names)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_launch_names_every_parameter_and_no_more(batch: int) -> None:
    vectors = meta(batch, 1, 6 * 3072).chunk(6, dim=-1)
    x = meta(batch, 4096, 3072)
    launch = planned(norm_call(x, scale=vectors[1], shift=vectors[0]))
    assert parameters(launch) == {*launch.tensors, *launch.scalars, *launch.constants}
    assert launch.grid == (batch * 4096, 1, 1)
    assert set(launch.tensors) == {"x", "scale", "shift", "out"}
    # One image needs no run-time integer; a batch needs its token count and the strides that depend on it.
    tokens = {"n0": 4096, "x_s1": 4096 * 3072, "out_s1": 4096 * 3072}
    assert launch.scalars == ({} if batch == 1 else tokens)
    assert "6 * D" in inspect.getsource(launch.kernel.fn) or batch == 1


def test_kernels_are_shared_between_calls_of_one_pattern() -> None:
    first = planned(norm_call(meta(1, 4096, 3072), scale=meta(1, 1, 3072)))
    second = planned(norm_call(meta(1, 512, 3072), scale=meta(1, 1, 3072)))
    assert first.kernel is second.kernel
    assert planned(norm_call(meta(1, 512, 3072))).kernel is not first.kernel
    assert first.kernel.__name__ == "dkfuse_norm_modulate"


def test_a_branch_norm_has_a_kernel_of_its_own() -> None:
    x = meta(1, 4096, 3840)
    launch = planned(branch_call(x), "residual_norm_modulate")
    assert parameters(launch) == {*launch.tensors, *launch.scalars, *launch.constants}
    assert set(launch.tensors) == {"x", "residual", "gate", "branch_weight", "weight", "scale", "sum", "out"}
    assert launch.scalars == {}
    assert launch.kernel.__name__ == "dkfuse_residual_norm_modulate_branch"
    branch = {k: v for k, v in launch.constants.items() if k.startswith("BRANCH")}
    assert branch == {"BRANCH_NORM": True, "BRANCH_CENTER": False, "BRANCH_EPS": 1e-5, "BRANCH_WEIGHT_OFFSET": 0.0}


@pytest.mark.parametrize("branch_norm", ["none", "rms"])
def test_a_branch_bias_is_one_more_pointer(branch_norm: str) -> None:
    x = meta(1, 4096, 3840)
    call = branch_call(x, branch_norm=branch_norm, branch_weight=None)
    without = planned(call, "residual_norm_modulate")
    launch = planned({**call, "branch_bias": meta(3840)}, "residual_norm_modulate")
    assert parameters(launch) == {*launch.tensors, *launch.scalars, *launch.constants}
    assert set(launch.tensors) == {*without.tensors, "branch_bias"}
    assert launch.scalars == {}
    assert launch.constants == without.constants
    gated = {"x": x, "residual": x, "gate": meta(1, 1, 3840), "branch_bias": meta(3840), "out_dtype": BF16}
    launch = plan("gated_residual", gated, {"out": x}, sm_count=132)
    assert set(launch.tensors) == {"x", "residual", "gate", "branch_bias", "out"}


@pytest.mark.parametrize("branch_norm", ["none", "rms"])
def test_a_second_branch_is_one_more_pointer_and_its_gate_another(branch_norm: str) -> None:
    x = meta(1, 4096, 3840)
    call = branch_call(x, branch_norm=branch_norm, branch_weight=None)
    without = planned(call, "residual_norm_modulate")
    for more in ({"x2": x}, {"x2": x, "gate2": meta(1, 1, 3840)}, {"x2": x, "gate2": meta()}):
        launch = planned({**call, **more}, "residual_norm_modulate")
        assert parameters(launch) == {*launch.tensors, *launch.scalars, *launch.constants}
        assert set(launch.tensors) == {*without.tensors, *more}
        assert launch.scalars == {}
        assert launch.constants == without.constants


def test_a_second_branch_has_dense_rows_and_a_gate_has_a_branch() -> None:
    x = meta(1, 4096, 3840)
    for more, code in (
        ({"x2": meta(1, 3840, 4096).mT}, "inner_stride"),
        ({"x2": meta(1, 4096, 64)}, "broadcast"),
        ({"gate2": meta(1, 1, 3840)}, "second_branch"),
    ):
        assert supports("residual_norm_modulate", {**branch_call(x), **more}).code == code


def test_a_factor_of_the_second_branch_is_one_more_constant() -> None:
    x = meta(1, 4096, 3840)
    call = branch_call(x, branch_norm="none", branch_weight=None, x2=x)
    without, launch = (planned({**call, "factor2": factor}, "residual_norm_modulate") for factor in (1.0, 0.7))
    assert parameters(launch) == {*launch.tensors, *launch.scalars, *launch.constants}
    assert launch.constants == {**without.constants, "FACTOR2": 0.7}
    assert planned(call, "residual_norm_modulate").kernel is without.kernel


def test_a_limit_is_one_more_constant() -> None:
    x = meta(1, 4096, 3840)
    call = branch_call(x, branch_norm="none", branch_weight=None)
    without, launch = (planned({**call, "limit": limit}, "residual_norm_modulate") for limit in (0.0, 65504.0))
    assert parameters(launch) == {*launch.tensors, *launch.scalars, *launch.constants}
    assert launch.constants == {**without.constants, "LIMIT": 65504.0}
    assert planned(call, "residual_norm_modulate").kernel is without.kernel
    for limit in (-1.0, float("inf"), float("nan")):
        assert supports("residual_norm_modulate", {**call, "limit": limit}).code == "limit"


def test_calls_without_a_branch_norm_keep_their_kernel() -> None:
    x = meta(1, 4096, 3840)
    call = branch_call(x, branch_norm="none", branch_weight=None, branch_weight_offset=0.0)
    launch = planned(call, "residual_norm_modulate")
    plain = planned({k: v for k, v in call.items() if not k.startswith("branch")}, "residual_norm_modulate")
    assert launch == plain
    assert launch.kernel is plain.kernel
    assert launch.kernel.__name__ == "dkfuse_residual_norm_modulate"
    assert not any("branch" in name.lower() for name in (*launch.constants, *launch.kernel.arg_names))
    assert "branch" not in inspect.getsource(launch.kernel.fn)


@pytest.mark.parametrize("call", [branch_call(meta(2, 5, 64), branch_norm=norm) for norm in ("none", "group")])
def test_supports_refuses_a_branch_weight_without_a_norm(call: dict[str, Any]) -> None:
    reason = supports("residual_norm_modulate", call)
    assert reason is not None
    assert reason.code == "branch_norm"


@pytest.mark.parametrize(
    ("x", "scale", "rows"),
    [
        (meta(2, 3, 5, 64), meta(64), [30]),  # everything merges
        (meta(2, 3, 5, 64), meta(1, 1, 1, 64), [30]),
        (meta(2, 3, 5, 64), meta(2, 1, 1, 64), [15, 2]),
        (meta(2, 3, 5, 64), meta(2, 3, 1, 64), [5, 6]),  # per frame
        (meta(2, 3, 5, 64), meta(2, 3, 5, 64), [30]),  # per token
        (meta(2, 3, 5, 64), meta(3, 1, 64), [5, 3, 2]),
        (meta(5, 2, 64).transpose(0, 1), meta(2, 1, 64), [5, 2]),
        (meta(1, 64), meta(64), [1]),
        (meta(64), meta(), [1]),
    ],
)
def test_row_dims_collapse(x: torch.Tensor, scale: torch.Tensor, rows: list[int]) -> None:
    launch = planned(norm_call(x, scale=scale))
    product = 1
    for size in rows:
        product *= size
    assert launch.grid == (product, 1, 1)
    assert launch.constants["AXES"] == len(rows)
    assert [v for k, v in launch.scalars.items() if k in ("n0", "n1")] == rows[:-1]


def test_offsets_beyond_32_bits_are_passed_whole() -> None:
    x = torch.empty_strided((2, 3, 64), (2**33, 64, 1), dtype=BF16, device="meta")
    launch = planned(norm_call(x))
    assert launch.scalars["x_s1"] == 2**33
    assert "out_s1" not in launch.scalars  # 3 * D, fixed in the source


def test_an_output_may_be_a_slice() -> None:
    buffer = meta(2, 12, 64)
    x = meta(2, 7, 64)
    launch = planned(norm_call(x), out=buffer[:, 5:], offsets={"out": 5 * 64 + 2**40})
    assert launch.scalars["out_offset"] == 5 * 64 + 2**40
    assert launch.constants["AXES"] == 2
    with pytest.raises(ValueError, match="inner stride 2"):
        planned(norm_call(x), out=meta(2, 7, 128)[..., ::2])
    with pytest.raises(ValueError, match="they must be equal"):
        planned(norm_call(x), out=meta(14, 64))


def test_configurations_cover_every_width() -> None:
    for width in (1, 2, 72, 513, 1152, 1408, 1920, 2240, 2432, 3072, 5120, MAX_ROW):
        config = choose(width)
        assert config.chunk & (config.chunk - 1) == 0
        assert (config.chunks - 1) * config.chunk < width <= config.chunks * config.chunk
        assert config.chunk <= 8 * 32 * config.num_warps
    assert WARPS[-1][0] == MAX_ROW


@pytest.mark.parametrize(
    ("width", "dtype", "residual", "expected"),
    [
        (5120, torch.float32, False, (256, 2)),
        (5120, BF16, False, (1024, 4)),
        (5120, torch.float32, True, (1024, 4)),
        (2048, torch.float32, False, (1024, 4)),
    ],
)
def test_long_rows_with_fp32_parameters_take_narrower_accesses(width, dtype, residual, expected) -> None:
    x, row = meta(1, 64, width), meta(1, 1, width, dtype=dtype)
    given = {"residual": x, "sum_dtype": BF16} if residual else {}
    op = "residual_norm_modulate" if residual else "norm_modulate"
    results = {"out": x, **({"sum": x} if residual else {})}
    arguments = {**norm_call(x, scale=row, shift=row), **given}
    (taken,) = plan(op, arguments, results, sm_count=132).config
    assert (taken.chunk, taken.num_warps) == expected
    assert candidates(op, arguments, results)[0] == taken


def test_two_modulations_of_rows_that_fill_few_chunks() -> None:
    assert (choose(2432, "norm_modulate_dual").chunk, choose(2432, "norm_modulate").chunk) == (512, 1024)


X = meta(2, 5, 64)


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("dtype", norm_call(meta(2, 5, 64, dtype=torch.float64))),
        ("dtype", norm_call(X, scale=meta(64, dtype=torch.int32))),
        ("dtype", {**norm_call(X), "out_dtype": torch.float64}),
        ("device", norm_call(X, scale=torch.empty((), dtype=BF16))),
        ("rank", norm_call(meta())),
        ("row_too_long", norm_call(meta(2, MAX_ROW + 1))),
        ("empty", norm_call(meta(2, 0, 64))),
        ("broadcast", norm_call(X, shift=meta(5, 1, 64))),
        ("broadcast", norm_call(X, shift=meta(1, 2, 5, 64))),
        ("inner_stride", norm_call(meta(2, 64, 5).transpose(1, 2))),
        ("outer_dims", norm_call(meta(2, 3, 4, 5, 64).permute(3, 2, 1, 0, 4))),
    ],
)
def test_supports_says_why_not(code: str, arguments: dict[str, Any]) -> None:
    reason = supports("norm_modulate", arguments)
    assert isinstance(reason, Unsupported)
    assert reason.code == code
    assert reason.message.endswith(".")
    with pytest.raises(Unsupported):
        planned(arguments)


def test_supports_residual_shapes_and_unknown_ops() -> None:
    reason = supports("gated_residual", {"x": X, "residual": meta(2, 4, 64), "out_dtype": BF16})
    assert reason is not None
    assert reason.code == "shape"
    unknown = supports("conv", {"x": X})
    assert unknown is not None
    assert unknown.code == "op"
    assert supports("norm_modulate", norm_call(X)) is None


# -- symbolic sizes --


def symbolic(
    environment: ShapeEnv, mode: FakeTensorMode, *size: int, dynamic: tuple[int, ...], like: Any = None
) -> Any:
    """A fake tensor of this size with the dims in `dynamic` as symbols."""
    kinds = [DimDynamic.DYNAMIC if i in dynamic else DimDynamic.STATIC for i in range(len(size))]
    context = StatelessSymbolicContext(dynamic_sizes=kinds, constraint_sizes=[None] * len(size))
    return mode.from_tensor(torch.empty(size, dtype=BF16), symbolic_context=context)


def test_symbolic_tokens_and_batch_without_guards() -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    x = symbolic(environment, mode, 2, 40, 96, dynamic=(0, 1))
    with mode:
        vectors = torch.empty(x.shape[0], 1, 6 * 96, dtype=BF16).chunk(6, dim=-1)
        frames = torch.empty(x.shape[0], x.shape[1], 96, dtype=BF16)
        out = torch.empty(x.shape, dtype=BF16)
    guards = len(environment.guards)
    arguments = norm_call(x, scale=vectors[1], shift=frames)
    assert supports("norm_modulate", arguments) is None
    launch = plan("norm_modulate", arguments, {"out": out}, sm_count=132)
    assert len(environment.guards) == guards
    assert launch.grid[0] == x.shape[0] * x.shape[1]
    assert isinstance(launch.scalars["n0"], torch.SymInt)
    assert isinstance(launch.scalars["x_s1"], torch.SymInt)
    assert "scale_s1" not in launch.scalars  # 6 * D does not depend on the tokens
    assert parameters(launch) == {*launch.tensors, *launch.scalars, *launch.constants}


def test_a_symbolic_row_is_refused() -> None:
    environment = ShapeEnv()
    x = symbolic(environment, FakeTensorMode(shape_env=environment), 2, 40, 96, dynamic=(2,))
    reason = supports("norm_modulate", norm_call(x))
    assert reason is not None
    assert reason.code == "symbolic_row"
