"""The bench of models: kernel kinds, numbers, the measuring loop on a made-up device, sites, rendering."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from dkfuse import cli_bench, loading
from dkfuse.bench import averages, measure, reference, show_models, sides, targets
from dkfuse.bench.classify import GLUE, KINDS, kind, op_of
from dkfuse.bench.device import Launched, Timed
from dkfuse.bench.others import OTHERS
from dkfuse.bench.results import OURS, ModelResult, Side, SiteTime, report
from dkfuse.bench.sides import Options
from dkfuse.bench.sites import site_times
from dkfuse.errors import ModelError
from dkfuse.report import Site, Status

NAMES = {
    "gemm": [
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_32x6_tn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128>",
        "void gemvNSP_kernel<__nv_bfloat16, float>",
        "triton_tem_fused_mm_3",
        "triton_tem_fused_addmm_gelu_view_12",
        "triton_tem_fused__scaled_dot_product_cudnn_attention_addmm_t_view_7",
        "triton_tem_fused_convolution_0",
        "void cudnn::cnn::conv2d_grouped_direct_kernel<false>",
        "void dot_kernel_gemm",
    ],
    "attention": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128_4x1x1_cga1x1x1_kernel0_0",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>",
        "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensorptrbf16gmem",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90>>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "triton_tem_fused_flex_attention_0",
        "void qk_int8_sv_f8_accum_f32_attn_kernel",
    ],
    "dkfuse": [
        "dkfuse_norm_modulate",
        "dkfuse_residual_norm_modulate_branch",
        "dkfuse_norm_rope_x4",
        "kernel_cutlass_dkfuse_norm_modulate_tensorptrbf16gmemalign16",
        "kernel_cutlass_kernel_dkfusekernelscute_normNormModulate_object_at",
        "void flashinfer::norm::RMSNormKernel<8u, __nv_bfloat16>",
        "void flashinfer::BatchQKApplyRotaryPosIdsCosSinCacheEnhancedKernel<true, 128u>",
    ],
    "inductor": [
        "triton_red_fused_native_layer_norm_2",
        "triton_poi_fused_cat_gelu_mm_5",
        "triton_per_fused__scaled_dot_product_flash_attention_mean_pow_1",
        "triton_poi_fused_convolution_0",
        "triton_red_fused__to_copy_add_dkfuse_norm_modulate_4",
    ],
    "copy": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned int, 4, 64, 64>",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>",
    ],
    "other": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>",
        "void convert_kernel<float>",
    ],
}


@pytest.mark.parametrize(("expected", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_kinds_by_name(expected: str, name: str) -> None:
    assert kind(name) == expected


def test_every_kind_is_in_the_table() -> None:
    assert set(NAMES) == set(KINDS)
    assert set(KINDS) - set(GLUE) == {"gemm", "attention"}


def test_op_of_a_kernel_is_the_longest_that_fits() -> None:
    ops = ("norm_modulate", "residual_norm_modulate", "norm_modulate_dual")
    assert op_of("dkfuse_residual_norm_modulate_branch", ops) == "residual_norm_modulate"
    assert op_of("dkfuse_norm_modulate_dual", ops) == "norm_modulate_dual"
    assert op_of("dkfuse_scale_shift", ops) is None


positive = st.floats(1e-3, 1e6)


@given(st.lists(positive, min_size=1), positive)
def test_geometric_mean(values: list[float], factor: float) -> None:
    mean = averages.geometric_mean(values)
    assert mean is not None
    assert min(values) * (1 - 1e-9) <= mean <= max(values) * (1 + 1e-9)
    scaled = averages.geometric_mean([value * factor for value in values])
    inverse = averages.geometric_mean([1 / value for value in values])
    assert scaled == pytest.approx(mean * factor)
    assert inverse == pytest.approx(1 / mean)


def test_ratios_of_what_is_missing() -> None:
    assert averages.geometric_mean([]) is None
    assert averages.ratio(None, 1.0) is None
    assert averages.ratio(1.0, None) is None
    assert averages.ratio(1.0, 0.0) is None
    assert averages.ratio(3.0, 2.0) == 1.5


@given(st.lists(st.dictionaries(st.sampled_from("abc"), positive), min_size=1, max_size=7), st.randoms())
def test_medians_by_name(rounds: list[dict[str, float]], random: Any) -> None:
    found = averages.medians(rounds)
    assert set(found) == {name for row in rounds for name in row}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    for name, value in found.items():
        values = [row.get(name, 0.0) for row in rounds]
        assert sum(v < value for v in values) <= len(values) / 2 >= sum(v > value for v in values)
    random.shuffle(rounds)
    assert averages.medians(rounds) == found


splits = st.fixed_dictionaries({name: st.floats(0, 100) for name in KINDS})


@given(splits, splits)
def test_the_gain_adds_up(ours: dict[str, float], theirs: dict[str, float]) -> None:
    result = ModelResult("m", {OURS: Side(split=ours), "inductor": Side(split=theirs)})
    gain = result.gain("inductor")
    assert gain["total"] == pytest.approx(gain["glue"] + gain["gemm"] + gain["attention"])
    whole = math.fsum(theirs.values())
    if whole > 1e-3:
        assert gain["total"] == pytest.approx(1 - math.fsum(ours.values()) / whole, abs=1e-9)
    ratio = result.ratios("inductor")["gpu"]
    if ratio:
        assert gain["speedup"] == pytest.approx(1 / ratio)


def test_the_better_of_inductors_modes() -> None:
    def gpu(ms: float) -> Side:
        return Side(split={"gemm": ms})

    names = {OURS: gpu(1), "inductor": gpu(3), "max-autotune": gpu(2)}
    assert ModelResult("m", names).rivals == ["inductor", "max-autotune"]
    assert ModelResult("m", {**names, "inductor": gpu(1.5)}).rivals == ["inductor"]
    assert ModelResult("m", {OURS: gpu(1), "eager": gpu(4), "inductor": gpu(3)}).rivals == ["eager"]


class FakeDevice:
    """A device whose kernels and times are made up: each call of a side takes the next of its times."""

    kind, name = "cpu", "made-up <device>"

    def __init__(self) -> None:
        self.order: list[str] = []
        self.current = ""
        self.launches = 2

    def seconds(self, run: Callable[[], Any]) -> float:
        run()
        return {OURS: 2.0, "inductor": 1.0}.get(self.current, 0.5)

    def timed(self, run: Callable[[], Any]) -> Timed:
        run()
        self.order.append(self.current)
        slow = 9.0 if self.order.count(self.current) == 2 else 1.0  # an outlier, which a median does not see
        return Timed({OURS: 3.0, "inductor": 4.0}.get(self.current, 8.0) * slow, 0.5)

    def profiled(self, run: Callable[[], Any]) -> list[Launched]:
        run()
        name, time = {OURS: ("dkfuse_norm_modulate", 1000.0)}.get(self.current, ("triton_red_fused_0", 2000.0))
        return [Launched("nvjet_tst", 4000.0), *[Launched(name, time)] * (self.launches - 1)]

    def peak(self, run: Callable[[], Any]) -> float:
        run()
        return 1.5

    def copy(self, traffic: int) -> float:
        return traffic / 1000

    def synchronize(self) -> None: ...
    def free(self) -> None: ...


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8).bfloat16()

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"sample": (self.linear(x) * 2,), "ids": torch.arange(3)}


def on_fake_device(options: Options, device: FakeDevice) -> ModelResult:
    def compile(module: nn.Module, backend: str, **_: Any) -> Callable[..., Any]:
        def call(**kwargs: Any) -> Any:
            device.current = backend
            return module(**kwargs)

        return call

    module = Doubles().requires_grad_(False)
    inputs = {"x": torch.randn(4, 8, dtype=torch.bfloat16)}
    weights = module.linear.weight.clone()
    result = measure.compare(targets.Target("m", "file"), module, inputs, options, device, compile, lambda _: None)
    assert module.linear.weight.dtype is torch.bfloat16
    assert torch.equal(module.linear.weight, weights)  # widened for the reference, and narrowed back
    return result


def test_the_measuring_loop() -> None:
    device = FakeDevice()
    result = on_fake_device(Options(rounds=5, profiles=3), device)
    assert device.order == [OURS, "inductor"] * 5
    ours, theirs = result.sides[OURS], result.sides["inductor"]
    assert (ours.wall, theirs.wall, ours.cpu) == (3.0, 4.0, 0.5)
    assert (ours.compile_cold, ours.compile_warm, theirs.compile_cold) == (2.0, 2.0, 1.0)
    assert (ours.gemm, ours.glue, theirs.glue, ours.gpu) == (4.0, 1.0, 2.0, 5.0)
    assert ours.split["dkfuse"] == 1.0
    assert theirs.split["inductor"] == 2.0
    assert result.reference == "fp32"
    assert result.note is None
    assert 0 < ours.error < 0.01  # type: ignore[operator]
    assert result.gain("inductor")["glue"] == pytest.approx(1 / 6)


def test_a_full_queue_hides_the_cpu_time_and_eager_is_no_error_of_itself() -> None:
    device = FakeDevice()
    device.launches = 2000
    result = on_fake_device(Options(("eager",), rounds=1, profiles=1, fp32=False), device)
    assert result.sides[OURS].cpu is None
    assert result.reference == "eager"
    assert result.note == "no fp32 reference was asked for"
    assert result.sides["eager"].error is None
    assert result.sides["eager"].compile_cold is None
    assert result.sides[OURS].error == 0.0


def test_a_model_that_does_not_run_in_fp32() -> None:
    class Mixed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.bfloat16())

    module = Mixed(4, 4).bfloat16().requires_grad_(False)
    found, name, why = reference.outputs(module, {"x": torch.ones(2, 4)})
    assert (name, len(found), found[0].dtype) == ("eager", 1, torch.bfloat16)
    assert why is not None
    assert why.startswith("the model does not run in fp32 (")


def test_arguments_of_the_sides() -> None:
    options = Options(mode="reduce-overhead", attention="cudnn")
    own = {"dkfuse.attention": "cudnn", "mode": "reduce-overhead"}
    assert sides.arguments(OURS, options) == {"backend": "dkfuse", "dynamic": False, "options": own}
    assert sides.arguments("inductor", options)["mode"] == "reduce-overhead"
    assert sides.arguments("max-autotune", options)["mode"] == "max-autotune-no-cudagraphs"
    assert sides.arguments(OURS, Options()) == {"backend": "dkfuse", "dynamic": False}
    assert options.graphs(OURS)
    assert not options.graphs("max-autotune")


def test_caches_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    monkeypatch.delenv("DKFUSE_CACHE_DIR", raising=False)
    with sides.caches_in(tmp_path):
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
        assert os.environ["DKFUSE_CACHE_DIR"] == str(tmp_path / "dkfuse")
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert "DKFUSE_CACHE_DIR" not in os.environ


def site(op: str, traffic: int | None, rows: int, with_site: str | None = None) -> Site:
    shapes: dict[str, list[int | str]] = {"x": [1, rows, 64]}
    return Site("s", op, Status.FUSED, op, op, "triton", shapes=shapes, bytes_after=traffic, with_site=with_site)


def test_launches_belong_to_sites_by_size() -> None:
    found = [site("norm_modulate", 1000, 8), site("norm_modulate", 4000, 32), site("norm_modulate", 1000, 8)]
    found += [site("residual_norm_modulate", 2000, 16), site("gated_residual", 9, 1, with_site="s")]
    names = ["dkfuse_norm_modulate", "dkfuse_residual_norm_modulate", "dkfuse_norm_modulate", "dkfuse_norm_modulate"]
    profiles = [
        [Launched(n, t * noise) for n, t in zip(names, [2.0, 5.0, 8.0, 4.0], strict=True)] for noise in (1, 1, 50)
    ]
    rows = site_times(found, profiles, lambda traffic: traffic / 1000)
    assert [(r.op, r.sites, r.microseconds, r.of_copy, r.shared) for r in rows] == [
        ("norm_modulate", 1, 8.0, 0.5, False),
        ("norm_modulate", 2, 3.0, 1 / 3, False),
        ("residual_norm_modulate", 1, 5.0, 0.4, False),
    ]


def test_launches_that_serve_several_sites_are_shared_out() -> None:
    found = [site("norm_rope", 3000, 8), site("norm_rope", 1000, 4)]
    (large, small) = site_times(found, [[Launched("dkfuse_norm_rope_x2", 8.0)]], lambda traffic: traffic / 1000)
    assert (large.microseconds, small.microseconds, large.of_copy, large.shared) == (6.0, 2.0, 0.5, True)
    assert site_times(found, [[Launched("nvjet", 8.0)]], lambda _: 1.0) == []
    assert site_times([], [[]], lambda _: 1.0) == []


@pytest.fixture
def result() -> ModelResult:
    ours = Side({"gemm": 4.0, "attention": 2.0, "dkfuse": 0.5}, 7.0, 0.9, 40, 20.0, 3.0, 9.5, 2e-3, {"nvjet": 4.0})
    theirs = Side({"gemm": 4.1, "attention": 2.0, "inductor": 0.9, "copy": 0.1}, 7.5, 1.0, 50, 19.0, 3.1, 9.5, 3e-3)
    eager = Side({"gemm": 4.2, "attention": 2.0, "other": 2.0}, 9.0, None, 90, None, None, 12.0, 3e-3)
    found = [SiteTime("norm_rope", "triton", {"x": [1, 4096, 24, 128]}, 8, 12.5, 50_000_000, 0.97, True)]
    coverage = {"sites": 11, "fused": 11}
    names = {OURS: ours, "inductor": theirs, "eager": eager}
    return ModelResult("<flux>", names, 2, 1, note="the model does not fit in fp32", coverage=coverage, sites=found)


def test_text(result: ModelResult) -> None:
    out = io.StringIO()
    show_models.print_result(result, Console(file=out, width=150))
    text = out.getvalue()
    for part in ("<flux>", "batch 2", "11 of 11 sites fused", "GEMM, ms", "does not fit in fp32", "12.5*", "0.97"):
        assert part in text
    line = next(line for line in text.splitlines() if line.strip().startswith("glue"))
    assert line.split()[-4:] == ["0.500", "1.000", "2.000", "0.500"]
    assert "1.092x the speed of inductor, +8.5 % of its GPU time saved: glue +7.0 %, GEMM +1.4 %" in text


def test_json(result: ModelResult) -> None:
    data = json.loads(json.dumps(report([result], "a GPU")))
    assert data["schema"] == "dkfuse.bench.model/1"
    (row,) = data["models"]
    assert set(row["sides"]) == set(row["ratios"]) | {OURS}
    assert row["sides"]["inductor"]["glue"] == pytest.approx(1.0)
    assert row["ratios"]["inductor"]["glue"] == pytest.approx(0.5)
    assert row["ratios"]["eager"]["compile_cold"] is None
    assert row["sites"][0]["shapes"]["x"] == [1, 4096, 24, 128]


def test_picture(result: ModelResult) -> None:
    root = ElementTree.fromstring(show_models.picture([result, result], "H100 <80GB> & more"))
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "GPU time of one forward, H100 <80GB> & more"
    assert texts.count("<flux>, batch 2") == 2
    bars = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.find("{*}title") is not None]
    assert len(bars) == 2 * (3 + 4 + 3)
    widths = [float(bar.attrib["width"]) for bar in bars[:7]]
    assert sum(widths[:3]) / sum(widths[3:]) == pytest.approx(6.5 / 7.1, abs=1e-2)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_run(name: str) -> None:
    pytest.importorskip("transformers")
    module, kwargs = targets.build(targets.Target(name, "others", 1), None, "tiny", "fp32", "cpu")
    with torch.no_grad():
        found = reference.tensors(module(**kwargs))
    assert found
    assert all(t.shape[0] == 1 and t.isfinite().all() for t in found)
    assert not any(p.requires_grad for p in module.parameters())


def test_targets(tmp_path: Path) -> None:
    assert targets.find("Flux@2") == [targets.Target("flux", "zoo", 2)]
    assert targets.find("dit-xl/2") == [targets.Target("dit-xl-2", "zoo")]
    assert [t.name for t in targets.find("others")] == list(OTHERS)
    with pytest.raises(ModelError, match="the batch size in 'flux@0' is '0'"):
        targets.find("flux@0")
    with pytest.raises(ModelError, match="did you mean 'bert'"):
        targets.find("bertt")
    with pytest.raises(ModelError, match="no file"):
        targets.find(f"{tmp_path / 'none.py'}:make")
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\ndef make(batch=3):\n    return torch.nn.ReLU(), {'input': torch.ones(batch)}\n"
        "def meta():\n    return torch.nn.Linear(2, 2, device='meta'), {}\n"
    )
    (target,) = targets.find(f"{file}:make@5")
    module, kwargs = targets.build(target, None, "full", "bf16", "cpu")
    assert isinstance(module, nn.ReLU)
    assert kwargs["input"].shape == (5,)
    with pytest.raises(ModelError, match="meta device"):
        targets.build(targets.Target(f"{file}:meta", "file"), None, "full", "bf16", "cpu")
    with pytest.raises(ModelError, match="no parameter 'layers'"):
        loading.load_real(f"{file}:make", {"layers": 2})


def test_layers_are_at_most_the_published_ones() -> None:
    pytest.importorskip("diffusers")
    module, _ = targets.build(targets.Target("auraflow", "zoo"), 5, "tiny", "bf16", "cpu")
    assert len(module.joint_transformer_blocks) == 4  # type: ignore[arg-type]
    assert len(module.single_transformer_blocks) == 5  # type: ignore[arg-type]


Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["flx"], 64, "did you mean 'flux'"),
        (["flux", "--against", "eager,tensorrt"], 64, "--against tensorrt is not allowed"),
        (["flux", "--against", ","], 64, "--against names nothing"),
        (["flux", "--mode", "fast"], 64, "--mode fast is not allowed"),
        (["flux", "--rounds", "0"], 64, "'--rounds'"),
        (["flux", "--json", "/no/such/folder/x.json"], 4, "there is no folder"),
        (["flux"], 4, "needs a CUDA GPU, and torch sees none here"),
    ],
)
def test_model_errors(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, out, err = run("bench", "model", *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1


def test_help(run: Run) -> None:
    code, out, _ = run("bench")
    assert code == 0
    assert "model" in out
    assert "kernels" in out


def test_a_model_that_fails_does_not_end_the_bench(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: ModelResult
) -> None:
    def measured(target: targets.Target, *_: Any, **__: Any) -> ModelResult:
        if target.name == "sana":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nmore")
        return result

    monkeypatch.setattr(cli_bench, "_device", FakeDevice)
    monkeypatch.setattr(measure, "prime", lambda _: None)
    monkeypatch.setattr(measure, "measure", measured)
    files = ["--json", tmp_path / "x.json", "--picture", tmp_path / "x.svg"]
    code, out, err = run("bench", "model", "sana", "flux@2", "--top", 1, *files)
    assert code == 3
    assert "1 of 2 models were measured; sana: OutOfMemoryError: CUDA out of memory." in err
    assert "the speed of inductor" in out
    assert "4.000 ms  nvjet" in out
    assert len(json.loads((tmp_path / "x.json").read_text())["models"]) == 1
    ElementTree.parse(tmp_path / "x.svg")
