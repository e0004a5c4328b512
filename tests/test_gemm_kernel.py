"""Which GEMM computes a linear: the table, the choice, timing, requests, reports, and the op."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dkfuse import Settings, Status
from dkfuse.errors import SettingsError
from dkfuse.kernels import disk_cache, gemm, gemm_kernels, gemm_quack
from dkfuse.seams import gemm_choice, gemm_measure, gemm_table
from dkfuse.seams.gemm_measure import Product
from dkfuse.seams.gemm_table import Row

from .gemms import calls, counts, install, of_gemms, on_gpu, rewritten
from .harness import BF16, FP32, check_numerics, exact, rms, run, spell

INPUTS = "x:BLI w:QI b:Q"


def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, w, b))


def without_bias(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, w))


def with_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b), approximate="tanh")


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the choice is tested on, apart from what was measured."""
    table = (
        Row(90, "none", 4096, 9216, 3072, {"128x192": 1.10, "128x160": 1.105}),
        Row(90, "none", 4096, 3072, 12288, {"128x192": 1.02, "128x160": 1.00}),
        Row(90, "none", 4096, 6144, 6144, {"128x192": 1.02, "128x160": 1.05}),
        Row(90, "gelu", 4096, 9216, 3072, {"128x192": 1.2}),
    )
    monkeypatch.setattr(gemm_table, "TABLE", table)


def only(module: Any, **settings: Any) -> Any:
    (site,) = rewritten(module, **settings)
    return site


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_is_sane() -> None:
    keys = [(r.capability, r.act, r.rows, r.columns, r.k) for r in gemm_table.TABLE]
    assert len(set(keys)) == len(keys)
    for row in gemm_table.TABLE:
        assert row.act in ("none", "gelu", "silu") and row.gains and set(row.gains) <= set(gemm_kernels.TILES)
        assert all(0.5 < gain < 1.5 for gain in row.gains.values())
        found = gemm_table.gains(row.capability, row.act, row.rows, row.columns, row.k)
        assert found == pytest.approx(row.gains), "a row speaks for itself"


def test_the_last_wave_of_tiles() -> None:
    """4096 x 3072 is 3.9 waves of 132 tiles of 128 x 192, 4608 x 3072 is 4.4."""
    assert gemm_table.efficiency(4096, 3072, "128x192") == pytest.approx(32 * 16 / (4 * 132))
    assert gemm_table.efficiency(4608, 3072, "128x192") == pytest.approx(36 * 16 / (5 * 132))
    assert gemm_table.efficiency(129, 192, "128x192") == pytest.approx(129 * 192 / (132 * 128 * 192))
    whole = [gemm_table.efficiency(128 * 132 * n, 192, "128x192") for n in (1, 2, 7)]
    assert whole == pytest.approx([1.0, 1.0, 1.0])


def test_near_and_far(rows: None) -> None:
    at = gemm_table.gains(90, "none", 4096, 9216, 3072)
    assert at == pytest.approx({"128x192": 1.10, "128x160": 1.105})
    near = gemm_table.gains(90, "none", 4352, 9216, 3072)
    assert near is not None and near["128x192"] < at["128x192"], "its last wave is emptier"
    for count in (2048, 4224, 5632, 8192):
        found = gemm_table.gains(90, "none", count, 9216, 3072)
        assert found is not None and found["128x192"] <= 1.10 + 1e-9, "no more is promised than was measured"
    for far in ((4096, 9216, 4096), (16384, 9216, 3072), (4096, 2048, 3072), (0, 9216, 3072)):
        assert gemm_table.gains(90, "none", *far) is None
    assert gemm_table.gains(100, "none", 4096, 9216, 3072) is None


def test_other_tiles_must_gain_more_than_their_compilation() -> None:
    assert gemm_choice._fastest({"128x192": 1.10, "128x160": 1.105}) == ("128x192", 1.10)
    assert gemm_choice._fastest({"128x192": 1.02, "128x160": 1.05}) == ("128x160", 1.05)
    assert gemm_choice._fastest({}) == ("128x192", 1.0)


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quack", "rows")
def test_a_linear_that_was_measured_to_be_faster() -> None:
    module = on_gpu(linear, (1, 4096, 3072), (9216, 3072), (9216,))
    site = only(module)
    assert (site.family, site.status, site.op, site.kernel) == ("gemm_kernel", Status.FUSED, "dkfuse::linear", "quack")
    assert calls(module) == [("none", "quack", "128x192")] and "aten.addmm" not in str(module.graph)
    module = on_gpu(without_bias, (2, 2048, 6144), (6144, 6144))
    assert only(module).status is Status.FUSED and calls(module) == [("none", "quack", "128x160")]


@pytest.mark.usefixtures("quack", "rows")
def test_a_gelu_moves_from_cublaslt_to_quack() -> None:
    module = on_gpu(with_gelu, (4096, 3072), (9216, 3072), (9216,))
    assert only(module).status is Status.FUSED
    assert calls(module) == [("gelu", "quack", "128x192")] and "_addmm_activation" not in str(module.graph)


@pytest.mark.usefixtures("quack", "rows")
@pytest.mark.parametrize(
    ("shapes", "settings", "code", "words"),
    [
        ([(4096, 12288), (3072, 12288), (3072,)], {}, "not_faster", "cuBLAS is as fast at 4096x3072x12288"),
        ([(4096, 4608), (9216, 4608), (9216,)], {}, "unmeasured", "no products were measured near 4096x9216x4608"),
        ([(4096, 3072), (9216, 3072), (9216,)], {"target": "sm100"}, "arch", "not on sm100"),
        ([(4096, 3072), (9216, 3072), (9216,)], {"gemm": "cublas"}, "disabled", "dkfuse.gemm=cublas"),
        ([(4096, 3072), (9216, 3072), (9216,)], {"rules": ("-gemm_kernel",)}, "disabled", "rule gemm_kernel"),
        ([(4096, 3068), (9216, 3068), (9216,)], {}, "alignment", "9216 x 3068"),
    ],
)
def test_what_stays_with_cublas(shapes: Any, settings: dict[str, Any], code: str, words: str) -> None:
    module = on_gpu(linear, *shapes)
    site = only(module, **settings)
    assert site.reason.code == code and words in site.reason.message, site.reason
    assert not calls(module) and site.kernel is None


@pytest.mark.usefixtures("quack", "rows")
def test_small_products_are_not_worth_a_line() -> None:
    for shapes in ([(1000, 3072), (9216, 3072), (9216,)], [(4096, 768), (3072, 768), (3072,)]):
        assert rewritten(on_gpu(linear, *shapes)) == []


@pytest.mark.usefixtures("rows")
def test_packages_that_are_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(4096, 3072), (9216, 3072), (9216,)]
    for version, code, words in ((None, "not_installed", "pip install"), ("0.7.0", "untested_version", "0.7.0")):
        install(monkeypatch, version)
        site = only(on_gpu(linear, *shapes))
        assert site.reason.code == code and words in site.reason.message


@pytest.mark.usefixtures("quack", "rows")
def test_a_kernel_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """quack is not installed here, so what it would be imported for fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gemm_measure, "_failures", {})
    monkeypatch.setattr(gemm_measure, "_operands", lambda product: (_ for _ in ()).throw(RuntimeError("no quack")))
    with caplog.at_level(logging.WARNING, "dkfuse"):
        module = on_gpu(linear, (4096, 3072), (9216, 3072), (9216,))
        site = only(module)
        assert only(on_gpu(linear, (4096, 3072), (9216, 3072), (9216,))).reason.code == "kernel_failed"
    assert site.reason.code == "kernel_failed" and "no quack" in site.reason.message and not calls(module)
    assert len(caplog.records) == 1, "tried once"


@pytest.mark.usefixtures("quack")
def test_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    args = spell(INPUTS)
    results, coverage = run(linear, args, target="sm90", gemm="quack")
    assert counts(coverage) == {"gemm_kernel": 1}
    check_numerics(linear, args, results)
    _, coverage = run(linear, spell(INPUTS, FP32), target="sm90", gemm="quack")
    assert counts(coverage) == {"left:dtype": 1}
    _, coverage = run(linear, spell("x:BLD w:QD b:Q"), target="sm90", gemm="quack")
    assert counts(coverage) == {"left:alignment": 1}
    assert of_gemms(run(linear, args, target="cpu", gemm="quack")[1]) == []


def test_asked_for_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.read({"dkfuse.gemm": "quack"}, {})
    for version, words in ((None, "not installed"), ("0.5.0", "outside of what was tested")):
        install(monkeypatch, version)
        with pytest.raises(SettingsError, match=words):
            settings.check_names((), ())
    install(monkeypatch)
    settings.check_names((), ())
    with pytest.raises(SettingsError, match="auto, quack, cublas"):
        Settings.read({"dkfuse.gemm": "cutlass"}, {})
    assert Settings.read({}, {"DKFUSE_GEMM": "cublas"}).gemm == "cublas"


@pytest.mark.usefixtures("quack")
def test_a_chain_of_rewritten_linears() -> None:
    def chain(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w, b), approximate="tanh"), v)

    args = spell(INPUTS + " v:IQ")
    results, coverage = run(chain, args, target="sm90", gemm="quack")
    assert counts(coverage) == {"gemm_kernel": 2}
    check_numerics(chain, args, results)


@pytest.mark.usefixtures("quack", "rows")
def test_the_cache_key_knows_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import fx, nn

    from dkfuse.reporting.store import graph_key

    gm, keys = fx.symbolic_trace(nn.Identity()), set()
    for version in (None, "0.6.1", "0.7.0"):
        install(monkeypatch, version)
        keys.add(graph_key(gm, [], Settings()))
    assert len(keys | {graph_key(gm, [], Settings(gemm="cublas"))}) == 4


# -- timing ------------------------------------------------------------------------------------------------------------

SHAPES = [(4096, 3072), (9216, 3072), (9216,)]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> dict[str, float]:
    """Max-autotune on a machine with a GPU, where kernels take the times in this dict."""
    found = {"cublas": 300.0, "128x192": 280.0, "128x160": 310.0}
    install(monkeypatch)
    monkeypatch.setattr(gemm_choice.compat, "inductor_config", lambda name: name == "max_autotune")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gemm_measure, "failure", lambda *_: None)
    monkeypatch.setattr(gemm_measure.compat, "environment_fingerprint", lambda: "here")
    monkeypatch.setattr(gemm_measure, "_known", {})
    monkeypatch.setattr(gemm_measure, "timed", lambda product, names: {name: found[name] for name in names})
    disk_cache.use(str(tmp_path))
    yield found
    disk_cache.use(None)


@pytest.mark.parametrize(
    ("times", "tiles"),
    [
        ({}, "128x192"),
        ({"128x160": 250.0}, "128x160"),
        ({"128x192": 295.0}, None),
        ({"128x192": float("inf"), "128x160": float("inf")}, None),
        ({"128x192": float("inf"), "128x160": 100.0}, "128x160"),
    ],
)
def test_the_fastest_timed_is_taken(timed: dict[str, float], times: dict[str, float], tiles: str | None) -> None:
    timed.update(times)
    module = on_gpu(linear, *SHAPES)
    site = only(module)
    assert [t for *_, t in calls(module)] == ([tiles] if tiles else [])
    if tiles is None:
        assert site.reason.code == "not_faster" and "300 us" in site.reason.message


def test_without_memory_to_time_them_the_table_decides(timed: dict[str, float]) -> None:
    timed.update(dict.fromkeys(timed, float("inf")))
    module = on_gpu(linear, *SHAPES)
    assert only(module).status is Status.FUSED and calls(module) == [("none", "quack", "128x192")]


def test_operands_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(product: Product) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gemm_measure, "_operands", full)
    product = Product(4096, 9216, 3072, "none", True, BF16, torch.device("cuda:0"))
    assert gemm_measure.timed(product, ["cublas", "128x192"]) == dict.fromkeys(["cublas", "128x192"], float("inf"))


def test_operands_are_no_draw_from_the_models_numbers() -> None:
    product = Product(8, 16, 8, "none", True, BF16, torch.device("cpu"))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    x, weight, bias = gemm_measure._operands(product)
    assert torch.equal(torch.rand(3), expected)
    assert (x.shape, weight.shape, bias.shape) == ((8, 8), (16, 8), (16,))
    assert gemm_measure._operands(Product(8, 16, 8, "none", False, BF16, torch.device("cpu")))[2] is None


def test_times_are_kept(timed: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    product = Product(4096, 9216, 3072, "none", True, BF16, torch.device("cuda:0"))
    timed["128x160"] = float("inf")
    assert gemm_measure.times(product, ["128x192"], None) == {"cublas": 300.0, "128x192": 280.0}
    assert gemm_measure.times(product, ["128x160"], None)["128x160"] == float("inf")
    asked: list[list[str]] = []
    monkeypatch.setattr(gemm_measure, "_known", {})
    monkeypatch.setattr(gemm_measure, "timed", lambda p, names: asked.append(names) or dict.fromkeys(names, 1.0))
    assert gemm_measure.times(product, ["128x192"], None) == {"cublas": 300.0, "128x192": 280.0}, "from disk"
    assert asked == []
    gemm_measure.times(product, ["128x192", "128x160"], None)
    assert asked, "a failure is not kept on disk"
    kept = [json.loads(f.read_bytes()[40:]) for f in disk_cache.contents()["gemm"]]
    assert kept and all("cublas" in k for k in kept)


# -- the op ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", gemm_kernels.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float64])
def test_the_op_is_what_it_says(act: str, dtype: torch.dtype) -> None:
    x, w, b = spell("x:LI w:QI b:Q", dtype)
    op = torch.ops.dkfuse.linear.default
    for using in gemm_kernels.NAMES:
        torch.library.opcheck(
            op, (x, w, b), {"act": act, "using": using}, test_utils=("test_schema", "test_faketensor")
        )

    def meaning(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = F.linear(x, w, b)
        first, second = h[:, :96], h[:, 96:]
        return {
            "none": h,
            "gelu": 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))),
            "silu_first": first * torch.sigmoid(first) * second,
            "silu_second": first * second * torch.sigmoid(second),
        }[act]

    (reference,) = exact(meaning, (x, w, b))
    tolerance = {BF16: 3e-3, FP32: 1e-6}.get(dtype, 1e-12)
    assert rms(op(x, w, b, act=act) - reference) <= tolerance * rms(reference)
    plain = rms(op(x, w, None, act=act) - meaning(x.double(), w.double(), torch.zeros_like(b).double()))
    assert plain <= tolerance * rms(reference)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4, 5)), {}, "parts have 3 columns together, but weight 5"),
        ((torch.ones(2, 3), torch.ones(4, 3).bfloat16()), {}, "one floating dtype"),
        ((torch.ones(2, 3), torch.ones(5, 3)), {"act": "silu_first"}, "even number of rows in weight, not 5"),
        ((torch.ones(2, 3), torch.ones(4, 3)), {"act": "relu"}, "no act 'relu'; known: none, gelu"),
        ((torch.ones(2, 3), torch.ones(4, 3)), {"using": "triton"}, "no kernel 'triton'; known: cublas, quack"),
        ((torch.ones(2, 3), torch.ones(4, 3)), {"tiles": "64x64"}, "no tiles '64x64'"),
    ],
)
def test_calls_without_a_meaning(arguments: tuple, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gemm.reference(*arguments, **options)


# -- what is handed to quack -------------------------------------------------------------------------------------------


def test_matrices_that_cannot_be_read_in_place_are_copied() -> None:
    whole = torch.randn(6, 64).bfloat16()
    for view in (whole, whole[:, :32], whole[1:, 32:], whole[:1]):
        assert gemm_quack.readable(view) is view
    for view in (
        whole[:, 1:33],
        whole[:, ::2],
        whole.t()[:8, :4],
        whole[:, :60].contiguous()[:, :56],
        whole[:1].expand(6, 64),
    ):
        copy = gemm_quack.readable(view)
        assert copy is not view and copy.is_contiguous() and torch.equal(copy, view)
    three = gemm_quack.batched(whole[1:, 32:])
    assert three.shape == (5, 32, 1) and three.stride() == (64, 1, 320) and torch.equal(three[..., 0], whole[1:, 32:])


def test_a_bias_lies_as_the_columns_of_the_product() -> None:
    bias = torch.arange(8).bfloat16()
    assert gemm_quack.vector(bias, "none").data_ptr() == bias.data_ptr()
    assert gemm_quack.vector(bias, "silu_first").tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
    odd = torch.arange(9).bfloat16()[1:]
    assert gemm_quack.vector(odd, "gelu").data_ptr() % 16 == 0 and gemm_quack.vector(odd, "gelu").tolist() == [
        odd.tolist()
    ]


def test_a_fake_quack_is_given_what_its_kernels_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The arguments, in the order and with the None where a value is compiled in, and one kernel for each kind."""
    built: list[dict[str, Any]] = []

    def kernel(a: Tensor, b: Tensor, d: Any, c: Any, epilogue: Any, schedule: Any, lengths: Any) -> None:
        assert (c, schedule, lengths) == (None, (66, None, 8, None), None) and a.shape[2] == b.shape[2] == 1
        given, kind = (Plain if d is not None else Act)(*epilogue), built[-1]
        row, out = given.mRowVecBroadcast, d if d is not None else given.mAuxOut
        assert sum(value is not None for value in given) == (row is not None) + (d is None)
        h = a[..., 0].float() @ b[..., 0].float().t()
        if kind.get("concat_layout") == ("B",):
            assert kind["gemm_cls_name"] == "gated"
            h = torch.stack(h.chunk(2, -1), -1).flatten(1)
        h = h + row if row is not None else h
        if kind.get("gemm_cls_name") == "gated":
            h = kind["function"](h[:, ::2], h[:, 1::2])
        elif kind.get("activation"):
            h = F.gelu(h, approximate="tanh")
        out[..., 0].copy_(h)

    def silu_product(x: Tensor, y: Tensor) -> Tensor:
        return F.silu(x) * y

    table = {"swiglu": silu_product}

    def compile_gemm(**kwargs: Any) -> Any:
        built.append({**kwargs, "function": table.get(kwargs.get("activation", ""))})
        return kernel

    Plain = namedtuple("Plain", "alpha beta mRowVecBroadcast add_to_output")
    Act = namedtuple("Act", "mAuxOut act_fn alpha mRowVecBroadcast rounding_mode")
    Options = namedtuple("Options", "max_active_clusters raster_order max_swizzle_size semaphore")

    def schedule(clusters: int, swizzle: int, semaphore: None) -> tuple[Any, ...]:
        return Options(object(), None, swizzle, semaphore)  # the first is a number of the CuTe DSL's

    of = types.SimpleNamespace
    modules: dict[str, dict[str, Any]] = {
        "quack": {},
        "quack.cute_dsl_utils": {"torch2cute_dtype_map": {BF16: "bf16"}},
        "quack.gemm": {"_compile_gemm": compile_gemm},
        "quack.gemm_act": {"_compile_gemm_act": compile_gemm, "GemmActMixin": of(EpilogueArguments=Act)},
        "quack.gemm_default_epi": {"GemmDefaultEpiMixin": of(EpilogueArguments=Plain)},
        "quack.gemm_tvm_ffi_utils": {"make_scheduler_args": schedule},
        "quack.rounding": {"RoundingMode": of(RN=0)},
        "quack.activation": {"gate_fn_map": table, "swiglu": silu_product},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gemm_quack, "_calls", {})
    monkeypatch.setattr(gemm_quack, "compiled", gemm_quack.compiled.__wrapped__)
    disk_cache.use(str(tmp_path))
    x, w, b = spell("x:LI w:QI b:Q")
    for act in gemm_kernels.ACTIVATIONS:
        for bias in (None, b):
            for _ in range(2):
                out = x.new_empty((x.shape[0], gemm.columns(w, act)))
                gemm_quack.run(x, w, bias, act, out)
                assert torch.equal(out, gemm.reference(x, w, bias, act=act)), (act, bias is not None)
    assert len(built) == 8 and {(k["tile_shape_mn"], k["cluster_shape_mnk"]) for k in built} == {
        ((128, 192), (2, 1, 1))
    }
    monkeypatch.setattr(
        sys.modules["quack.gemm_tvm_ffi_utils"], "make_scheduler_args", lambda *_: Options(1, 2.5, 8, None)
    )
    with pytest.raises(TypeError, match="scheduler takes other arguments than were read"):
        gemm_quack.Form.of("none")
    disk_cache.use(None)


# -- the bench ---------------------------------------------------------------------------------------------------------


def test_the_bench_reads_products_and_prints_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dkfuse.bench import gemm as bench

    assert bench.parse("4096x9216x3072") == (4096, 9216, 3072, "none")
    assert bench.parse("4352x16384x3072:SILU") == (4352, 16384, 3072, "silu")
    for wrong in ("4096x9216", "4096x9216x3072:relu", "0x1x2", "axbxc", "1x2x3x4"):
        with pytest.raises(ValueError, match=wrong):
            bench.parse(wrong)
    assert bench.main(["64x64x64"]) == bench.NO_GPU and "no CUDA device" in capsys.readouterr().err
    install(monkeypatch)
    for name, value in (("is_available", True), ("get_device_name", "H100"), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    times = {"cublas": 300.0, "128x192": 250.0, "128x160": 400.0}
    monkeypatch.setattr(gemm_measure, "timed", lambda product, names, *_: {name: times[name] for name in names})
    monkeypatch.setattr(bench, "overhead", lambda: {"addmm": 18.0})
    assert bench.main(["4096x9216x3072:gelu"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].strip().rstrip(",")
    assert eval(row, {"Row": Row}) == Row(90, "gelu", 4096, 9216, 3072, {"128x192": 1.2, "128x160": 0.75})
