"""The CuTe DSL provider without a GPU: what it refuses, what a kernel is compiled for, and that it compiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dkfuse.kernels.cute_key import split
from dkfuse.kernels.cute_norm_key import see_norm
from dkfuse.kernels.cute_rope_key import see_rope
from dkfuse.kernels.provider_cute import IMPLEMENTATIONS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BY_OP = {implementation.op: implementation for implementation in IMPLEMENTATIONS}


def meta(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def norm_call(rows: int = 5, width: int = 512, batch: int = 2, **more: Any) -> dict[str, Any]:
    vectors = meta(batch, 1, 6 * width).chunk(6, dim=-1)
    arguments = {"x": meta(batch, rows, width), "weight": None, "bias": None, "scale": vectors[1], "shift": vectors[0]}
    return {**arguments, "norm": "layer", "eps": 1e-6, "out_dtype": BF16, "roundings": 0, **more}


def residual_call(rows: int = 5, width: int = 512, batch: int = 2, **more: Any) -> dict[str, Any]:
    gate = meta(batch, 1, 6 * width).chunk(6, dim=-1)[2]
    own = {"residual": meta(batch, rows, width), "gate": gate, "branch_norm": "none", "branch_weight": None}
    return norm_call(rows, width, batch, **{**own, "sum_dtype": BF16, **more})


def rope_call(heads: int = 12, d: int = 128, **more: Any) -> dict[str, Any]:
    tables = {"cos": meta(5, 1, d // 2, dtype=FP32), "sin": meta(5, 1, d // 2, dtype=FP32)}
    arguments = {"x": meta(2, 5, heads, d), "weight": meta(heads, d), "norm": "rms", "eps": 1e-6, "across": 2}
    return {**arguments, **tables, "rotation": "interleaved", "tables": "half", "out_dtype": BF16, **more}


FOUR_AXES = {
    "x": meta(2, 2, 3, 2, 512),
    "residual": meta(2, 2, 3, 2, 512),
    "gate": meta(2, 1, 3, 1, 512),
    "scale": meta(1, 2, 1, 2, 512),
    "shift": None,
}


def refused(op: str, arguments: dict[str, Any]) -> str | None:
    reason = BY_OP[op].problem(arguments)
    assert reason is None or reason.message.endswith(".")
    return None if reason is None else reason.code


def test_what_it_serves() -> None:
    assert refused("norm_modulate", norm_call()) is None
    assert refused("norm_modulate", norm_call(width=2432, norm="rms", weight=meta(2432, dtype=FP32))) is None
    assert refused("residual_norm_modulate", residual_call()) is None
    assert refused("residual_norm_modulate", residual_call(gate=None, scale=meta(2, 5, 512), shift=None)) is None
    assert refused("norm_rope", rope_call()) is None
    assert refused("norm_rope", rope_call(across=-2, weight=meta(128))) is None


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("pick", {"pick": meta(2, 5, 1, dtype=torch.bool)}),
        ("table", {"scale_table": meta(512)}),
        ("roundings", {"roundings": 1}),
        ("norm", {"norm": "none"}),
        ("width", {"x": meta(2, 5, 516)}),
        ("width", {"x": meta(2, 5, 16392)}),
        ("call", {"scale": meta(2, 1, 512, dtype=torch.float64)}),
        ("call", {"scale": meta(3, 1, 512)}),
        ("call", {"out_dtype": torch.float64}),
        ("call", {"x": meta(2, 5, 1024)[..., ::2]}),
        ("operands", {"scale": meta(2, 5, 1)}),
        ("operands", {"shift": meta()}),
        ("operands", {"weight": meta(1024)[::2]}),
        ("alignment", {"x": meta(2, 5, 516)[..., :512]}),
        ("alignment", {"scale": meta(2, 1, 6 * 512 + 4)[..., :512]}),
        ("alignment", {"scale": meta(2, 1, 6 * 512 + 2, dtype=FP32)[..., :512]}),
    ],
)
def test_what_norms_are_refused(code: str, more: dict[str, Any]) -> None:
    assert refused("norm_modulate", norm_call(**more)) == code


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("branch_bias", {"branch_bias": meta(512)}),
        ("second_branch", {"x2": meta(2, 5, 512)}),
        ("limit", {"limit": 65504.0}),
        ("branch_norm", {"branch_norm": "rms"}),
        ("branch_weight", {"branch_weight": meta(512)}),
        ("pick", {"pick": meta(2, 5, 1, dtype=torch.bool)}),
        ("table", {"gate_table": meta(512)}),
        ("roundings", {"roundings": 2}),
        ("operands", {"gate": meta(2, 5, 1)}),
        ("alignment", {"residual": meta(2, 5, 516)[..., :512]}),
        ("call", FOUR_AXES),
    ],
)
def test_what_residual_norms_are_refused(code: str, more: dict[str, Any]) -> None:
    assert refused("residual_norm_modulate", residual_call(**more)) == code


def test_dual_and_pointwise_ops_are_not_offered() -> None:
    assert sorted(BY_OP) == ["norm_modulate", "norm_rope", "residual_norm_modulate"]


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("roundings", {"roundings": 1}),
        ("norm", {"norm": "none", "across": None}),
        ("norm_last", {"norm_last": True}),
        ("rotation", {"rotation": "half"}),
        ("rotation", {"rotation": "none", "cos": None, "sin": None}),
        ("tables", {"tables": "complex", "cos": meta(5, 1, 128), "sin": None}),
        ("tables", {"tables": "matrix", "cos": meta(5, 1, 256), "sin": None}),
        ("width", {"across": None}),
        ("width", {"x": meta(2, 5, 65, 128), "weight": None}),
        ("width", {"x": meta(2, 5, 12, 92), "weight": None}),
        ("call", {"weight": meta(12, 128, dtype=torch.float64)}),
        ("table_dtype", {"cos": meta(5, 1, 64, dtype=torch.float64)}),
        ("table_width", {"cos": meta(5, 1, 32), "sin": meta(5, 1, 32)}),
        ("operands", {"weight": meta(12, 1)}),
        ("operands", {"weight": meta(256)[::2]}),
        ("operands", {"cos": meta(5, 1, 1, dtype=FP32).expand(5, 1, 64)}),
        ("alignment", {"x": meta(2, 5, 12, 132)[..., :128]}),
    ],
)
def test_what_rotations_are_refused(code: str, more: dict[str, Any]) -> None:
    assert refused("norm_rope", rope_call(**more)) == code


def key_of(arguments: dict[str, Any], **outputs: torch.Tensor) -> Any:
    outputs = outputs or {"out": meta(*arguments["x"].shape)}
    return see_norm(arguments, outputs).key


def test_a_key_has_no_row_count_and_no_stride() -> None:
    key = key_of(norm_call())
    assert key == key_of(norm_call(rows=999))
    assert key == key_of(norm_call(batch=3))
    assert key == key_of(norm_call(eps=1e-5))
    assert key == key_of(norm_call(scale=meta(2, 1, 512)))  # not a piece of a longer vector
    wider = meta(2, 5, 1536)
    assert key == key_of(norm_call(x=wider[..., :512]), out=meta(2, 5, 512))


@pytest.mark.parametrize(
    "more",
    [
        {"width": 1024},
        {"norm": "rms"},
        {"scale": None},
        {"weight": meta(512)},
        {"scale": meta(512)},
        {"scale": meta(2, 5, 512)},
        {"scale": meta(2, 1, 512, dtype=FP32)},
        {"x": meta(2, 5, 512, dtype=FP16)},
        {"scale_offset": 0.0},
        {"scale": meta(2, 1, 513)[..., 1:]},
    ],
)
def test_what_makes_another_key(more: dict[str, Any]) -> None:
    assert key_of(norm_call()) != key_of(norm_call(**more))


def test_an_offset_of_an_absent_operand_makes_no_key() -> None:
    bare = {"scale": None, "shift": None}
    assert key_of(norm_call(**bare, scale_offset=0.0, weight_offset=1.0)) == key_of(norm_call(**bare))


def test_integers_of_a_launch() -> None:
    seen = see_norm(norm_call(rows=7), {"out": meta(2, 7, 512)})
    row, batch = 512 * 2, 7 * 512 * 2
    assert seen.rows == 14
    assert seen.sizes == [7, 1]
    # x and out move along both axes, scale and shift along the batch only
    assert seen.strides == [row, batch, 6 * 512 * 2, 6 * 512 * 2, row, batch, 0]
    assert [operand.moves for operand in seen.key.operands] == [
        (True, True),
        (False, True),
        (False, True),
        (True, True),
    ]


def test_symbolic_rows_are_not_guarded_on() -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)

    def symbolic(tensor: torch.Tensor) -> torch.Tensor:
        sizes = [DimDynamic.DYNAMIC if size == 40 else DimDynamic.STATIC for size in tensor.shape]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    arguments = residual_call(x=symbolic(torch.empty(2, 40, 512, dtype=BF16)))
    arguments["residual"] = arguments["x"]
    with mode:
        arguments.update({name: torch.empty(2, 1, 512, dtype=BF16) for name in ("gate", "scale", "shift")})
        out = torch.empty_like(arguments["x"])
    assert refused("residual_norm_modulate", arguments) is None
    key = see_norm(arguments, {"sum": out, "out": out}).key
    assert key == see_norm(residual_call(), {"sum": meta(2, 5, 512), "out": meta(2, 5, 512)}).key
    with mode:
        rope = rope_call(x=arguments["x"].unflatten(-1, (4, 128)), cos=torch.empty(1, 64), sin=torch.empty(1, 64))
        rope["weight"] = torch.empty(4, 128)
    assert refused("norm_rope", rope) is None
    assert refused("norm_rope", {**rope, "cos": symbolic(torch.empty(40, 40))}) is not None
    assert not environment.guards


def test_alignment_is_the_pointers_and_the_strides() -> None:
    x = torch.empty(4 * 512 + 8, dtype=BF16)
    shifted = x[1:].as_strided((4, 512), (512, 1))
    operand = see_norm(norm_call(x=shifted, scale=None, shift=None), {"out": torch.empty(4, 512, dtype=BF16)}).key
    assert operand.operand("x").align == 2
    assert operand.operand("out").align == 16


@pytest.mark.parametrize("width", [256, 1024, 1152, 1536, 2048, 2432, 3072, 3840, 5120, 8192, 16384, 8, 264])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_row_is_covered_once(width: int, dtype: torch.dtype) -> None:
    chosen = split(width, [dtype])
    covered = chosen.vector * chosen.threads
    assert chosen.threads % 32 == 0 and chosen.threads <= 1024
    assert (chosen.pieces - 1) * covered < width <= chosen.pieces * covered
    assert chosen.partial == (width != chosen.pieces * covered)


def test_how_heads_are_addressed() -> None:
    arguments = {**rope_call(), "bias": None}
    key = see_rope(arguments, {"out": meta(2, 12, 5, 128).transpose(1, 2)}).key
    heads = {operand.name: operand.heads for operand in key.operands}
    assert heads == {"x": "dense", "weight": "dense", "cos": "shared", "sin": "shared", "out": "strided"}
    table = meta(5, 1, 128, dtype=FP32)
    halves = {**arguments, "cos": table[..., ::2], "sin": table[..., 1::2], "weight": meta(128)}
    key = see_rope(halves, {"out": meta(2, 5, 12, 128)}).key
    assert (key.operand("cos").inner, key.operand("cos").align) == (2, 4)
    assert key.operand("weight").heads == "shared"
    row = {**arguments, "x": meta(2, 5, 1536), "across": None, "weight": meta(1536)}
    key = see_rope({**row, "cos": meta(5, 768), "sin": meta(5, 768)}, {"out": meta(2, 5, 1536)}).key
    assert (key.heads, key.d, key.operand("cos").heads) == (1, 1536, "dense")


def test_it_compiles_without_a_gpu() -> None:
    pytest.importorskip("cutlass")
    from dkfuse.kernels import cute_norm, cute_rope
    from dkfuse.kernels.cute_launch import compiled_keys

    arguments, outputs = residual_call(), {"out": meta(2, 5, 512), "sum": meta(2, 5, 512)}
    cute_norm.prepare(arguments, outputs)
    cute_norm.prepare(residual_call(rows=9), {"out": meta(2, 9, 512), "sum": meta(2, 9, 512)})
    key = see_norm(arguments, outputs).key
    assert compiled_keys().count(key) == 1
    out = {"out": meta(2, 5, 12, 128)}
    cute_rope.prepare(rope_call(), out)
    assert see_rope(rope_call(), out).key in compiled_keys()


def test_a_launch_hands_over_addresses_strides_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cutlass")
    from dkfuse.kernels import cute_launch

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    arguments = norm_call(x=torch.zeros(2, 3, 512, dtype=BF16), scale=torch.zeros(512), shift=None)
    outputs = {"out": torch.zeros(2, 3, 512, dtype=BF16)}
    launch = cute_launch.launch_for(lambda *given: calls.append(given), see_norm(arguments, outputs), 1e-5, 0)
    launch({**arguments, **outputs})
    ((addresses, strides, sizes, rows, eps, stream),) = calls
    assert addresses == tuple(tensor.data_ptr() for tensor in (arguments["x"], arguments["scale"], outputs["out"]))
    assert (list(strides), list(sizes), rows, eps, stream) == ([1024, 1024, 0], [1], 6, 1e-5, 77)


def test_a_launch_is_made_once_per_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    from dkfuse.kernels import cute_launch

    built: list[Any] = []
    ran: list[tuple[Any, float]] = []

    def launch_for(kernel: Any, seen: Any, eps: float, device: int | None) -> Any:
        made = (seen.strides, eps)
        return lambda tensors: ran.append(made)

    monkeypatch.setattr(cute_launch, "_kernels", {})
    monkeypatch.setattr(cute_launch, "launch_for", launch_for)
    monkeypatch.setattr(cute_launch, "MAX_LAUNCHES", 3)
    host = cute_launch.Host(see_norm, lambda key, options: built.append(key), ("x",), ("out",), values=("eps", "norm"))

    def run(rows: int = 4, **more: Any) -> int:
        x = torch.zeros(rows, 1024, dtype=BF16)[:, :512]
        host.run(norm_call(x=x, scale=None, shift=None, **more), {"out": torch.zeros(rows, 512, dtype=BF16)})
        return len(host.launches)

    assert [run(), run(), run(rows=9), run(eps=1e-3)] == [1, 1, 2, 3]
    assert len(built) == 1 and len(ran) == 4 and ran[0] is ran[1] and ran[3] == ([2048, 1024, 0], 1e-3)
    assert run(rows=0) == 3 and len(ran) == 4  # nothing to launch
    assert run(norm="rms") == 1 and len(built) == 2  # full: emptied
