"""The bench of models: kinds of kernels by name, medians and ratios, launches and their sites."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dkfuse
from dkfuse.bench import averages
from dkfuse.bench.classify import GLUE, KINDS, kind, op_of
from dkfuse.bench.device import Launched
from dkfuse.bench.results import OURS, ModelResult, Side
from dkfuse.bench.sites import site_times
from dkfuse.reporting.report import Site, Status

NAMES = {
    "gemm": [
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT",
        "kernel_cutlass_kernel_quackgemm_actGemmGatedSm90_object_at__TiledMMA_ThrLayoutVMNK1281111000",
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


def test_the_gain_of_a_plain_install_is_told_apart() -> None:
    names = {name: Side(split={"gemm": ms}) for name, ms in ((OURS, 2.0), ("inductor", 4.0), ("plain", 3.0))}
    result = ModelResult("m", names)
    assert result.rivals == ["inductor"]
    assert result.to_dict()["plain"]["gain"]["speedup"] == pytest.approx(4 / 3)
    assert result.gain("inductor")["speedup"] == pytest.approx(2.0)


def test_the_better_of_inductors_modes() -> None:
    def gpu(ms: float) -> Side:
        return Side(split={"gemm": ms})

    names = {OURS: gpu(1), "inductor": gpu(3), "max-autotune": gpu(2)}
    assert ModelResult("m", names).rivals == ["inductor", "max-autotune"]
    assert ModelResult("m", {**names, "inductor": gpu(1.5)}).rivals == ["inductor"]
    assert ModelResult("m", {OURS: gpu(1), "eager": gpu(4), "inductor": gpu(3)}).rivals == ["eager"]
    assert "better" not in ModelResult("m", {OURS: gpu(1), "inductor": gpu(3)}).to_dict()
    found = ModelResult("m", {**names, "plain": gpu(1.6)}).to_dict()["better"]
    assert (found["side"], found["gain"]["speedup"], found["plain"]["speedup"]) == ("max-autotune", 2.0, 1.25)
    assert found["gain"]["gemm"] == found["gain"]["total"] == 0.5
    assert ModelResult("m", {**names, "max-autotune": gpu(5)}).to_dict()["better"]["side"] == "inductor"


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


def test_every_fused_site_of_a_real_plan_has_a_row() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.layer_norm(x, (256,)) * (1 + scale) + shift
            return torch.nn.functional.layer_norm(x @ x.mT @ x, (256,)) * (1 + shift) + scale

    values = {name: torch.zeros(1, n, 256, dtype=torch.bfloat16) for name, n in (("x", 64), ("scale", 1), ("shift", 1))}
    coverage = dkfuse.coverage(Block(), settings=dkfuse.Settings(target="sm90"), **values)
    launches = [Launched(f"dkfuse_{site.op.removeprefix('dkfuse::')}", 2.0) for site in coverage.sites if site.op]
    (row,) = site_times(coverage.sites, [launches], lambda traffic: 1.0)
    assert (row.op, row.sites, row.microseconds, row.shared) == ("norm_modulate", 2, 2.0, False)


def test_launches_that_serve_several_sites_are_shared_out() -> None:
    found = [site("norm_rope", 3000, 8), site("norm_rope", 1000, 4)]
    (large, small) = site_times(found, [[Launched("dkfuse_norm_rope_x2", 8.0)]], lambda traffic: traffic / 1000)
    assert (large.microseconds, small.microseconds, large.of_copy, large.shared) == (6.0, 2.0, 0.5, True)
    assert site_times(found, [[Launched("nvjet", 8.0)]], lambda _: 1.0) == []
    assert site_times([], [[]], lambda _: 1.0) == []


def test_launches_of_a_graph_that_runs_several_times() -> None:
    launches = [Launched("dkfuse_norm_rope", t) for t in (4.0, 6.0)]
    (row,) = site_times([site("norm_rope", 2000, 8)], [launches], lambda traffic: traffic / 1000)
    assert (row.sites, row.microseconds, row.of_copy, row.shared) == (1, 10.0, 0.4, True)  # 2 of 5 us, twice


def test_the_cpus_time_is_taken_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from dkfuse.bench import timing

    waits: list[int] = []
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(calls)))
    (spent,) = timing.cpu_microseconds({"a": lambda: calls.append(1)}).values()
    assert waits == [20, 20 + timing.CALLS]
    assert 0 < spent < 1e4
