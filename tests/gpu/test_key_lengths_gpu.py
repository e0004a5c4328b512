"""Attention by numbers of keys on a GPU: against fp64, as models give q, k and v, compiled, and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

import dkfuse.kernels.attention  # noqa: F401  (registers the op)
from dkfuse import Settings, Status, compat, seams
from dkfuse.kernels.attention_kernels import KERNELS, version_of
from dkfuse.kernels.attention_lengths import LENGTHS
from dkfuse.seams import attention_measure
from dkfuse.seams.attention_table import DENSE

from .on_device import capability, random

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
INSTALLED = [name for name in LENGTHS if version_of(name) is not None]
KEYS, SURE = 300, 270
NUMBERS = {"one": (1, 1), "few": (7, 7), "a tile": (128, 128), "all but one": (299, 299), "all": (300, 300)}
MIXED = {"mixed": (7, 299), "ends": (1, 300), "beyond": (-3, 1000)}


def operands(layout: str, batch: int, dim: int = 128, dtype: torch.dtype = BF16) -> list[torch.Tensor]:
    """q, k, v [batch, 4, 300, dim]."""
    if layout == "packed":
        return [t.transpose(1, 2) for t in random(batch, KEYS, 3, 4, dim, dtype=dtype).unbind(2)]
    made = [random(batch, KEYS, 4, dim, dtype=dtype, seed=i).transpose(1, 2) for i in range(3)]
    if layout == "heads first":
        return [t.contiguous() for t in made]
    if layout == "a part":  # of a longer sequence
        longer = [random(batch, KEYS + 20, 4, dim, dtype=dtype, seed=i).transpose(1, 2) for i in range(3)]
        return [t[:, :, 5 : 5 + KEYS] for t in longer]
    return made


def mask(numbers: torch.Tensor, keys: int = KEYS) -> torch.Tensor:
    return (torch.arange(keys, device="cuda") < numbers.clamp(1, keys)[:, None])[:, None, None]


def check(kernel: str, tensors: list[torch.Tensor], numbers: torch.Tensor, **options) -> None:
    """`numbers` of keys; for a kernel that needs most of them in any case, SURE to all of them."""
    q, k, v = tensors
    if kernel == "cudnn":
        numbers, options = SURE + numbers.clamp(0, KEYS) % (KEYS - SURE + 1), {**options, "sure": SURE}
    arguments = {"q": q, "k": k, "v": v, "mask": None, "key_lengths": numbers, "causal": False, **options}
    if (problem := KERNELS[kernel].problem(arguments, capability())) is not None:
        pytest.skip(problem.message)
    scaled = {"scale": options.get("scale")}
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask(numbers), **scaled)
    torchs = F.scaled_dot_product_attention(q, k, v, mask(numbers), **scaled)
    out = torch.ops.dkfuse.attention(q, k, v, None, numbers, using=kernel, **options)
    assert (out.dtype, out.shape) == (q.dtype, q.shape)
    error, theirs = ((t.double() - exact).square().mean().sqrt().item() for t in (out, torchs))
    # two parts are rounded before they are merged: sqrt(2) where the attention looks at few keys (test_many_tokens)
    limit = 1.42 if kernel == "cudnn" else 1.25
    assert error <= limit * theirs + 1e-7, f"error {error:.3g}, torch's {theirs:.3g}"
    mode = FakeTensorMode()
    with mode:
        fakes = [mode.from_tensor(t) for t in (q, k, v)]
        fake = torch.ops.dkfuse.attention(*fakes, None, mode.from_tensor(numbers), using=kernel, **options)
    assert out.stride() == fake.stride()


@pytest.mark.parametrize("numbers", [*NUMBERS, *MIXED])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", INSTALLED)
def test_against_fp64(kernel, batch, numbers):
    n = torch.tensor({**NUMBERS, **MIXED}[numbers][-batch:], device="cuda")
    check(kernel, operands("tokens first", batch), n)


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("layout", ["packed", "heads first", "a part"])
@pytest.mark.parametrize("kernel", INSTALLED)
def test_layouts_and_head_dims(kernel, layout, dim):
    check(kernel, operands(layout, 1, dim), torch.tensor([217], device="cuda", dtype=torch.int32))
    if dim == 128:  # each dtype and head_dim is another kernel to build
        check(kernel, operands(layout, 1, dim, torch.float16), torch.tensor([30], device="cuda"), scale=0.2)


@pytest.mark.parametrize("kernel", INSTALLED)
def test_what_lies_behind_is_not_weighed(kernel):
    q, k, v = operands("tokens first", 1)
    n = torch.tensor([280], device="cuda")
    before = torch.ops.dkfuse.attention(q, k, v, None, n, using=kernel, sure=SURE)
    k[:, :, 280:], v[:, :, 280:] = 30.0, 1000.0
    after = torch.ops.dkfuse.attention(q, k, v, None, n, using=kernel, sure=SURE)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_broken_promise_is_not_a_number():
    q, k, v = operands("tokens first", 2)
    n = torch.tensor([SURE - 1, SURE], device="cuda")
    out = torch.ops.dkfuse.attention(q, k, v, None, n, using="cudnn", sure=SURE)
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_many_tokens():
    """As many as a video has: offsets and tiles far from the first. Normed q and k: at most 1.25 of torch's error."""
    q, k, v = (random(1, 20000, 2, 128, seed=i).transpose(1, 2) for i in range(3))
    n = torch.tensor([19876], device="cuda")
    few = q[:, :, -512:]
    exact = F.scaled_dot_product_attention(few.double(), k[:, :, :19876].double(), v[:, :, :19876].double())
    torchs = F.scaled_dot_product_attention(q, k, v, mask(n, 20000))[:, :, -512:]
    theirs = (torchs.double() - exact).square().mean().sqrt()
    for kernel in INSTALLED:
        out = torch.ops.dkfuse.attention(q, k, v, None, n, using=kernel, sure=19800)[:, :, -512:]
        error = (out.double() - exact).square().mean().sqrt()
        print(f"{kernel}: {error / theirs:.3f} of torch's error")
        assert error <= 1.25 * theirs, kernel


# -- compiled ----------------------------------------------------------------------------------------------------------


def block(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """A projection, attention of 8 heads of 64 to the image and the text that is there, a projection back."""
    q, k, v = (x @ weight).unflatten(2, (3, 8, 64)).permute(2, 0, 3, 1, 4)
    n = 280 + padding.sum(dim=1, dtype=torch.int)
    taken = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    taken = taken.masked_fill(torch.arange(x.shape[1], device=x.device).unsqueeze(0) >= n.unsqueeze(1), False)
    first = F.scaled_dot_product_attention(q, k, v, taken[:, None, None])
    second = F.scaled_dot_product_attention(q + 1, k, v, taken[:, None, None])
    return (first + second).transpose(1, 2).flatten(2) @ out


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "cuda graphs"])
@pytest.mark.parametrize("kernel", INSTALLED)
def test_compiled_with_numbers_that_change(kernel, graphs):
    batch = 2
    settings, sites = Settings(attention=kernel), []
    hook = compat.graph_pass(lambda graph: sites.extend(seams.run(graph, settings)), None)
    options = {"post_grad_custom_pre_pass": hook, **({"triton.cudagraphs": True} if graphs else {})}
    inputs = random(batch, 320, 512), random(512, 1536, seed=1) / 22, random(512, 512, seed=2) / 22
    padding = torch.ones(batch, 40, device="cuda", dtype=BF16)
    torch.compiler.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(block, options=options, dynamic=False)
        _, code = run_and_get_code(compiled, *inputs, padding)
        for numbers in ((40, 40), (3, 17), (0, 40), (40, 1)):
            for row, n in zip(padding, numbers, strict=False):
                row.copy_(torch.arange(40, device="cuda") < n)
            for _ in range(2):
                result = compiled(*inputs, padding).clone()
                torch.testing.assert_close(result, block(*inputs, padding), atol=2e-2, rtol=2e-2)
    assert [(s.status, s.kernel) for s in sites] == [(Status.FUSED, kernel)] * 2, [s.reason for s in sites]
    assert "\n".join(code).count("torch.ops.dkfuse.attention.default(") == 2


def test_the_host_waits_for_nothing():
    q, k, v = operands("tokens first", 1)
    n = torch.tensor([277], device="cuda")
    for kernel in INSTALLED:
        torch.ops.dkfuse.attention(q, k, v, None, n, using=kernel, sure=SURE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kernel in INSTALLED:
            torch.ops.dkfuse.attention(q, k, v, None, n, using=kernel, sure=SURE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_are_timed_by_numbers_of_keys(monkeypatch, tmp_path):
    monkeypatch.setattr(attention_measure, "_known", {})
    q = random(1, 4096, 24, 128).transpose(1, 2)
    names = [DENSE, *INSTALLED]
    found = attention_measure.times([q, q, q], False, names, str(tmp_path), True, 4000)
    print({n: round(t) for n, t in found.items()})
    assert set(found) == set(names) and all(10 < t < 1e5 for t in found.values()), found
    for kernel in INSTALLED:
        assert attention_measure.failure(kernel, q, q, False, True) is None
