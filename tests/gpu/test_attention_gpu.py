"""Attention kernels on a GPU: as accurate as torch's, in the promised layout, in compiled code and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

import dkfuse.kernels.attention  # noqa: F401  (registers the op)
from dkfuse import Settings, Status, compat, seams
from dkfuse.kernels.attention_kernels import KERNELS, version_of
from dkfuse.seams import attention_measure
from dkfuse.seams.attention_call import calls

from .on_device import capability, random

pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16
EXACT = [name for name, kernel in KERNELS.items() if not kernel.lossy and version_of(name) is not None]


def operands(layout: str, dim: int, keys: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q [2, 4, 300, dim], k and v [2, 4/groups, keys, dim]."""
    if layout == "packed":
        return [t.transpose(1, 2) for t in random(2, 300, 3, 4, dim, dtype=dtype).unbind(2)]
    sizes = [(2, 300, 4, dim), *[(2, keys, 4 // groups, dim)] * 2]
    made = [random(*s, dtype=dtype, seed=i).transpose(1, 2) for i, s in enumerate(sizes)]
    return [t.contiguous() for t in made] if layout == "heads first" else made


CASES = {
    "d128": ("tokens first", 128, 300, 1, BF16, {}),
    "d64": ("tokens first", 64, 300, 1, BF16, {}),
    "d96": ("tokens first", 96, 300, 1, BF16, {}),
    "d72": ("tokens first", 72, 300, 1, BF16, {}),
    "fp16": ("tokens first", 128, 300, 1, FP16, {}),
    "text": ("tokens first", 128, 77, 1, BF16, {}),
    "grouped": ("tokens first", 128, 300, 2, BF16, {"gqa": True}),
    "causal": ("tokens first", 64, 300, 1, BF16, {"causal": True}),
    "scaled": ("tokens first", 64, 300, 1, BF16, {"scale": 0.3}),
    "heads first": ("heads first", 64, 300, 1, BF16, {}),
    "packed": ("packed", 64, 300, 1, BF16, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", EXACT)
def test_as_accurate_as_torch(kernel, case):
    *how, options = CASES[case]
    q, k, v = operands(*how)
    arguments = {"q": q, "k": k, "v": v, "mask": None, "causal": bool(options.get("causal"))}
    if (problem := KERNELS[kernel].problem(arguments, capability())) is not None:
        pytest.skip(problem.message)
    named = {"is_causal": arguments["causal"], "scale": options.get("scale"), "enable_gqa": bool(options.get("gqa"))}
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **named)
    torchs = F.scaled_dot_product_attention(q, k, v, **named)
    out = torch.ops.dkfuse.attention(q, k, v, None, **options, using=kernel)
    assert (out.dtype, out.shape) == (q.dtype, q.shape)
    error, theirs = ((t.double() - exact).square().mean().sqrt().item() for t in (out, torchs))
    assert error <= 1.25 * theirs, f"error {error:.3g}, torch's {theirs:.3g}"
    mode = FakeTensorMode()
    with mode:
        fake = torch.ops.dkfuse.attention(*map(mode.from_tensor, (q, k, v)), None, **options, using=kernel)
    assert out.stride() == fake.stride()


@pytest.mark.parametrize("kernel", EXACT)
def test_unaligned_inputs(kernel):
    """Against fp64: torch's own SDPA was wrong for such inputs, which it gave to cuDNN."""
    q = random(2 * 300 * 4 * 64 + 1)[1:].view(2, 300, 4, 64).transpose(1, 2)
    k = random(2, 300, 4, 65, seed=1)[..., :64].transpose(1, 2)
    out = torch.ops.dkfuse.attention(q, k, k, None, using=kernel)
    aligned = [t.clone(memory_format=torch.contiguous_format) for t in (q, k, k)]
    exact = F.scaled_dot_product_attention(*(t.double() for t in aligned))
    error, theirs = (
        (t.double() - exact).square().mean().sqrt().item() for t in (out, F.scaled_dot_product_attention(*aligned))
    )
    assert error <= 1.25 * theirs, f"error {error:.3g}, torch's of aligned inputs {theirs:.3g}"
    mode = FakeTensorMode()
    with mode:
        fake = torch.ops.dkfuse.attention(*map(mode.from_tensor, (q, k, k)), None, using=kernel)
    assert out.stride() == fake.stride()


# -- compiled ----------------------------------------------------------------------------------------------------------


def block(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A projection, attention of 8 heads of 64, a projection back."""
    q, k, v = (x @ weight).unflatten(2, (3, 8, 64)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ out


def run(kernel: str, mode: dict | None = None, graphs: list | None = None):
    """The compiled block with the seams rewritten: (results of three calls, eager's, sites, code)."""
    settings, sites = Settings(attention=kernel), []

    def hook(graph):
        if graphs is not None:
            graphs.append([(c.traced, c.chosen(capability())) for c in calls(graph)])
        sites.extend(seams.run(graph, settings))

    options = {"post_grad_custom_pre_pass": compat.graph_pass(hook, None), **(mode or {})}
    inputs = random(2, 320, 512), random(512, 1536, seed=1) / 22, random(512, 512, seed=2) / 22
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(block, options=options, dynamic=False)
        first, code = run_and_get_code(compiled, *inputs)
        results = [first.clone(), *(compiled(*inputs).clone() for _ in range(3))]
        return results, block(*inputs), sites, "\n".join(code)


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "cuda graphs"])
@pytest.mark.parametrize("kernel", [name for name in EXACT if name != "sdpa"])
def test_compiled(kernel, graphs):
    results, eager, (site,), code = run(kernel, {"triton.cudagraphs": True} if graphs else None)
    assert site.status is Status.FUSED or site.reason.code == "chosen", site.reason
    for result in results:
        torch.testing.assert_close(result, eager, atol=2e-2, rtol=2e-2)
    assert "triton_poi" not in code, "q, k, v or the result is copied"
    if KERNELS[kernel].distributions:
        assert code.count("torch.ops.dkfuse.attention.default(") == 1


def test_torch_chooses_what_is_assumed():
    graphs: list = []
    run("sdpa", graphs=graphs)
    ((pair,),) = graphs

    def masked(q, mask):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    seen: list = []
    hook = compat.graph_pass(lambda g: seen.extend((c.traced, c.mask is not None) for c in calls(g)), None)
    q = random(1, 4, 256, 64)
    with torch.no_grad():
        compiled = torch.compile(masked, options={"post_grad_custom_pre_pass": hook}, dynamic=False)
        compiled(q, torch.zeros(1, 1, 256, 256, device="cuda", dtype=BF16))
    print(f"torch {torch.__version__} chooses {pair[0]}, with a mask {seen}")
    if capability() // 10 == 9 and (torch.backends.cudnn.version() or 0) > 91500:
        assert pair == ("cudnn", "cudnn") and seen == [("cudnn", True)]


def test_kernels_are_timed_under_max_autotune(monkeypatch, tmp_path):
    monkeypatch.setattr(attention_measure, "_known", {})
    q = random(1, 4096, 24, 128).transpose(1, 2)
    found = attention_measure.times([q, q, q], False, EXACT[1:], str(tmp_path))
    assert set(found) == set(EXACT[1:]) and all(10 < time < 1e5 for time in found.values()), found
    assert len(list((tmp_path / "attention").glob("*.bin"))) == 1
    _, _, (site,), _ = run("auto", {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"})
    assert site.reason is None or site.reason.code in ("fastest", "launch_bound"), site.reason
    assert {a.code for a in site.attempts} <= {"slower", "version", "runtime"}, site.attempts


def test_a_kernel_is_built_before_the_code_runs():
    for kernel in EXACT[1:]:
        q = random(1, 64, 4, 64).transpose(1, 2)
        assert attention_measure.failure(kernel, q, q, False) is None
