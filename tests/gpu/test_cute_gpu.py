"""The CuTe DSL kernels on a GPU: every element within one rounding of fp64, whatever the layout, and in CUDA graphs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from .on_device import random

pytestmark = pytest.mark.gpu
pytest.importorskip("cutlass")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Half a unit in the last place, relative; and the smallest step of numbers next to 0.
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
SMALLEST = {BF16: 0.0, FP16: 2.0**-24, FP32: 0.0}
FP32_NOISE = 3e-6  # of the largest value of a row: what fp32 arithmetic may lose where terms cancel
WIDTHS = (256, 1024, 1152, 1536, 2048, 2432, 3072, 3840, 5120, 8192, 16384)
NORM_DEFAULTS = {"weight": None, "bias": None, "scale": None, "shift": None, "norm": "layer", "eps": 1e-6}
OFFSETS = {"weight_offset": 0.0, "scale_offset": 1.0, "roundings": 0}


def check(values: torch.Tensor, expected: torch.Tensor) -> None:
    """Every element rounded once, from fp32 arithmetic."""
    dtype = values.dtype
    limit = expected.abs() * ROUNDING[dtype] + expected.abs().amax(-1, keepdim=True) * FP32_NOISE + SMALLEST[dtype]
    excess = (values.double() - expected).abs() - limit
    worst = excess.argmax().item()
    message = f"{values.flatten()[worst].item()} for {expected.flatten()[worst].item()} at element {worst}"
    assert excess.max().item() <= 0, (message, tuple(values.shape), dtype)


def call_of(op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    more = {"branch_norm": "none", "gate": None, "branch_weight": None, "sum_dtype": arguments["x"].dtype}
    own = {} if op == "norm_modulate" else more
    return {**NORM_DEFAULTS, **OFFSETS, "out_dtype": arguments["x"].dtype, **own, **arguments}


def run(op: str, outputs: dict[str, torch.Tensor] | None = None, **given: Any) -> dict[str, torch.Tensor]:
    """Run the call if the provider takes it, compare every output with fp64, return the outputs."""
    from dkfuse.kernels.ops import reference_outputs
    from dkfuse.kernels.provider_cute import IMPLEMENTATIONS

    arguments = call_of(op, given)
    implementation = next(each for each in IMPLEMENTATIONS if each.op == op)
    reason = implementation.problem(arguments)
    assert reason is None, reason
    if outputs is None:
        shape = arguments["x"].shape
        outputs = {"out": torch.full(shape, 7.0, device="cuda").to(arguments["out_dtype"])}
        if op != "norm_modulate" and arguments["sum_dtype"] is not None:
            outputs["sum"] = torch.full(shape, 7.0, device="cuda").to(arguments["sum_dtype"])
    implementation.load()(arguments, outputs)
    expected = reference_outputs(op, arguments, compute=torch.float64)
    for name, value in outputs.items():
        check(value, expected[name])
    return outputs


def vectors(batch: int, width: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    """Six modulation vectors `[batch, 1, width]`, pieces of one, as models chunk them."""
    return random(batch, 1, 6 * width, dtype=dtype).chunk(6, dim=-1)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int) -> None:
    gate, scale, shift, *_ = vectors(2, width)
    run("norm_modulate", x=random(2, 3, width), scale=scale, shift=shift)
    run("residual_norm_modulate", x=random(2, 3, width), residual=random(2, 3, width, seed=5), gate=gate, scale=scale)
    run("norm_modulate", x=random(1, 1, width), norm="rms", weight=random(width))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("there", list(itertools.product([False, True], repeat=4)))
def test_operands_present_and_absent(norm: str, there: tuple[bool, ...]) -> None:
    names = [name for name, given in zip(("weight", "bias", "scale", "shift"), there, strict=True) if given]
    operands = {name: random(256, seed=i + 1) for i, name in enumerate(names)}
    run("norm_modulate", x=random(2, 5, 256), norm=norm, **operands)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sum_dtype", [None, BF16, FP32])
def test_residuals(norm: str, gated: bool, sum_dtype: torch.dtype | None) -> None:
    gate, scale, shift, *_ = vectors(2, 1024)
    x, residual = random(2, 5, 1024), random(2, 5, 1024, dtype=sum_dtype or BF16, seed=3)
    operands = {"gate": gate if gated else None, "scale": scale, "shift": shift, "sum_dtype": sum_dtype}
    run("residual_norm_modulate", x=x, residual=residual, norm=norm, **operands)


@pytest.mark.parametrize("out", [BF16, FP16, FP32])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("parameters", [BF16, FP16, FP32])
def test_dtypes(dtype: torch.dtype, parameters: torch.dtype, out: torch.dtype) -> None:
    _, scale, shift, *_ = vectors(1, 512, parameters)
    weight = random(512, dtype=FP32 if parameters == BF16 else BF16)
    run("norm_modulate", x=random(1, 7, 512, dtype=dtype), weight=weight, scale=scale, shift=shift, out_dtype=out)


@pytest.mark.parametrize("shape", [(512,), (1, 1, 512), (2, 1, 512), (1, 7, 512), (2, 7, 512)])
@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift", "gate"])
def test_broadcasts(shape: tuple[int, ...], name: str) -> None:
    operands = {name: random(*shape, dtype=FP32)}
    run("residual_norm_modulate", x=random(2, 7, 512), residual=random(2, 7, 512, seed=1), **operands)
    wide = random(*shape[:-1], 3 * 512, dtype=FP32)[..., 512:1024]
    run("residual_norm_modulate", x=random(2, 7, 512), residual=random(2, 7, 512, seed=1), **{name: wide})


def test_strided_rows() -> None:
    _, scale, shift, *_ = vectors(2, 512)
    operands = {"scale": scale, "shift": shift}
    run("norm_modulate", x=random(2, 7, 1536)[..., 512:1024], **operands)
    run("norm_modulate", x=random(7, 2, 512).transpose(0, 1), **operands)
    run("norm_modulate", x=random(2, 9, 512)[:, 2:], **operands)
    run("norm_modulate", x=random(2, 1, 512).expand(2, 7, 512), **operands)
    deep = random(3, 2, 5, 512).permute(1, 0, 2, 3)
    run("norm_modulate", x=deep, scale=random(2, 1, 1, 512), shift=random(3, 1, 512))


def test_outputs_in_a_larger_buffer() -> None:
    gate, scale, shift, *_ = vectors(2, 512)
    buffer, sums = (torch.full((2, 12, 1024), 5.0, device="cuda", dtype=BF16) for _ in range(2))
    outputs = {"out": buffer[:, 3:10, 512:], "sum": sums[:, 5:, :512]}
    operands = {"gate": gate, "scale": scale, "shift": shift}
    run("residual_norm_modulate", outputs, x=random(2, 7, 512), residual=random(2, 7, 512, seed=1), **operands)
    for tensor, view in ((buffer, outputs["out"]), (sums, outputs["sum"])):
        view.fill_(5.0)
        assert (tensor == 5.0).all()


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_pointers_that_are_not_aligned(offset: int) -> None:
    flat = random(2 * 7 * 512 + 8)
    x = flat[offset : offset + 2 * 7 * 512].view(2, 7, 512)
    run("norm_modulate", x=x, scale=random(512 + offset)[offset:])
    out = torch.zeros(2 * 7 * 512 + 8, device="cuda", dtype=BF16)
    run("norm_modulate", {"out": out[offset : offset + 2 * 7 * 512].view(2, 7, 512)}, x=random(2, 7, 512))
    assert (out[:offset] == 0).all() and (out[offset + 2 * 7 * 512 :] == 0).all()


def test_offsets_and_eps() -> None:
    operands = {"weight": random(512), "scale": random(512, seed=1)}
    run("norm_modulate", x=random(2, 7, 512), **operands, weight_offset=1.0, scale_offset=0.0)
    run("norm_modulate", x=random(2, 7, 512), **operands, weight_offset=0.5, scale_offset=2.0, eps=0.0, norm="rms")
    for eps in (1e-5, 1e-2, 1.0):
        run("norm_modulate", x=random(2, 7, 512) * 0.1, eps=eps)


def test_a_mean_much_larger_than_the_deviation() -> None:
    run("norm_modulate", x=(random(3, 512, dtype=FP32) + 30).to(FP16), out_dtype=FP16)


def test_one_kernel_for_all_row_counts_and_strides() -> None:
    from dkfuse.kernels.cute_launch import compiled_keys

    _, scale, shift, *_ = vectors(2, 768)
    run("norm_modulate", x=random(2, 3, 768), scale=scale, shift=shift)
    before = len(compiled_keys())
    for rows in (2, 5, 257, 4001):
        run("norm_modulate", x=random(2, rows, 768), scale=scale, shift=shift)
        run("norm_modulate", x=random(2, rows, 1536)[..., 768:], scale=random(2, 1, 768), shift=shift)
    assert len(compiled_keys()) == before


def test_no_rows() -> None:
    run_nothing = torch.empty(2, 0, 512, device="cuda", dtype=BF16)
    from dkfuse.kernels import cute_norm

    cute_norm.run(call_of("norm_modulate", {"x": run_nothing}), {"out": run_nothing.clone()})


def test_beyond_two_billion_elements() -> None:
    buffer = torch.zeros(2**31 + 4096, device="cuda", dtype=BF16)
    x = buffer.as_strided((2, 3, 256), (2**31, 256, 1))
    x.copy_(random(2, 3, 256))
    run("norm_modulate", x=x, scale=random(256))


def test_a_cuda_graph() -> None:
    from dkfuse.kernels import cute_norm

    gate, scale, shift, *_ = vectors(2, 1024)
    x, residual = random(2, 5, 1024), random(2, 5, 1024, seed=3)
    operands = {"x": x, "residual": residual, "gate": gate, "scale": scale, "shift": shift}
    outputs = run("residual_norm_modulate", **operands)
    arguments = call_of("residual_norm_modulate", operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cute_norm.run(arguments, outputs)
    x.copy_(random(2, 5, 1024, seed=8))
    wanted = run("residual_norm_modulate", **operands)
    for value in outputs.values():
        value.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for name, value in outputs.items():
        assert torch.equal(value, wanted[name])


def test_another_stream() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run("norm_modulate", x=random(2, 4000, 1024))


def rotate(heads: int, d: int, rows: int = 7, out: torch.Tensor | None = None, **more: Any) -> None:
    from dkfuse.kernels.ops import reference_outputs
    from dkfuse.kernels.provider_cute import IMPLEMENTATIONS
    from dkfuse.kernels.rope_support import with_defaults

    given = {"x": random(2, rows, heads, d), "norm": "rms", "eps": 1e-6, "across": 2, "rotation": "interleaved"}
    columns = d // 2 if more.get("tables", "half") == "half" else d
    given.update(cos=random(rows, 1, columns, dtype=FP32), sin=random(rows, 1, columns, dtype=FP32, seed=1))
    arguments = with_defaults({**given, "out_dtype": BF16, **more})
    implementation = next(each for each in IMPLEMENTATIONS if each.op == "norm_rope")
    reason = implementation.problem(arguments)
    assert reason is None, reason
    if out is None:
        out = torch.full(arguments["x"].shape, 7.0, device="cuda").to(arguments["out_dtype"])
    implementation.load()(arguments, {"out": out})
    expected = reference_outputs("norm_rope", arguments, compute=torch.float64)["out"]
    check(out, expected)


@pytest.mark.parametrize(("heads", "d"), [(12, 128), (40, 128), (64, 128), (24, 64), (9, 72), (8, 32)])
@pytest.mark.parametrize("tables", ["half", "full"])
def test_rotations(heads: int, d: int, tables: str) -> None:
    rotate(heads, d, tables=tables, weight=random(heads, d))
    if tables == "half":
        rotate(heads, d, rows=1, tables=tables, weight=random(d), bias=random(heads, d, seed=4), norm="layer")


def test_rotations_of_a_whole_row() -> None:
    x = random(2, 7, 2048)
    tables = {"cos": random(1, 7, 2048), "sin": random(1, 7, 2048, seed=1), "tables": "full"}
    rotate(1, 2048, x=x, across=None, weight=random(2048), **tables)


@pytest.mark.parametrize("d", [64, 72, 128])
def test_tables_with_gaps_and_heads(d: int) -> None:
    both = random(7, 1, d, dtype=FP32)
    rotate(12, d, cos=both[..., ::2], sin=both[..., 1::2], weight=random(12, d))
    own = random(7, 12, d // 2)
    rotate(12, d, cos=own, sin=own + 1)
    rotate(12, d, cos=random(2, 7, 1, d // 2, dtype=FP16), sin=random(7, 1, d // 2))


def test_layouts_of_heads() -> None:
    rotate(12, 128, out=torch.zeros(2, 12, 7, 128, device="cuda", dtype=BF16).transpose(1, 2))
    rotate(12, 128, x=random(2, 12, 7, 128).transpose(1, 2))
    rotate(12, 128, x=random(2, 7, 3 * 1536)[..., 1536:3072].unflatten(-1, (12, 128)))
    rotate(12, 128, x=random(2, 7, 12, 128, dtype=FP32), out_dtype=FP32, weight=random(12, 128, dtype=FP32))
    joint = torch.zeros(2, 12, 20, 128, device="cuda", dtype=BF16)
    rotate(12, 128, out=joint[:, :, 5:12].transpose(1, 2))
    assert (joint[:, :, :5] == 0).all() and (joint[:, :, 12:] == 0).all()
    tables = {"cos": random(1, 7, 64), "sin": random(1, 7, 64, seed=1)}
    rotate(12, 128, x=random(2, 12, 7, 128), across=1, weight=random(12, 1, 128), **tables)
