"""The CUDA kernel of norm_rope on a GPU: against fp64, in place, strided, beyond 2^31 elements, in a CUDA graph."""

from __future__ import annotations

import functools
import itertools
import threading
from typing import Any

import pytest
import torch

from .. import rope_calls, tensors
from ..rope_calls import call_of

pytestmark = pytest.mark.gpu

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {BF16: 2.4e-3, FP16: 3e-4, FP32: 1e-6}
DEVICE = "cuda"
HEAD_DIMS = (64, 128, 256, 512, 1024)
ROTATIONS = ("interleaved", "half")


random = functools.partial(tensors.random, device=DEVICE)
tables = functools.partial(rope_calls.tables, device=DEVICE)


def launched(arguments: dict[str, Any], out: torch.Tensor | None = None) -> torch.Tensor:
    from dkfuse.kernels.provider_cuda import IMPLEMENTATIONS

    (rope,) = IMPLEMENTATIONS
    assert rope.problem(arguments) is None
    if out is None:
        out = torch.empty(arguments["x"].shape, dtype=arguments["out_dtype"], device=DEVICE)
    rope.load()(arguments, {"out": out})
    return out


def compare(arguments: dict[str, Any], out: torch.Tensor | None = None) -> torch.Tensor:
    """Within one rounding of fp64."""
    from dkfuse.kernels.ops import reference_outputs

    expected = reference_outputs("norm_rope", arguments, compute=FP64)["out"]
    out = launched(arguments, out)
    error = ((out.double() - expected).norm() / expected.norm()).item()
    assert error < LIMIT[out.dtype], (error, {k: v for k, v in arguments.items() if not isinstance(v, torch.Tensor)})
    return out


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("rotation", ["none", *ROTATIONS])
def test_head_dims(d: int, rotation: str) -> None:
    x, weight, rope, part = random(2, 7, 11, d), random(d), {}, {}
    if rotation != "none":
        rope, part = (tables("half", r, 7, 1, rotation=rotation) for r in (d, d // 4))
    compare(call_of(x, **part))
    compare(call_of(x, norm="rms", eps=1e-6, weight=weight, **rope))
    compare(call_of(x, norm="layer", eps=1e-5, weight=weight, bias=random(d, dtype=FP32), **rope))
    compare(call_of(x, norm="rms", norm_last=True, weight=weight, weight_offset=1.0, **part))


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("kind", ["half", "full", "complex"])
def test_tables_and_dtypes(rotation: str, kind: str) -> None:
    for dtype, table, result in (
        (BF16, FP32, BF16),
        (BF16, BF16, FP32),
        (FP16, FP32, FP16),
        (FP16, FP16, BF16),
        (FP32, FP32, FP32),
    ):
        rope = tables(kind, 96, 33, 1, dtype=table, rotation=rotation)
        call = call_of(random(2, 33, 12, 128, dtype=dtype), norm="rms", eps=1e-6, weight=random(128), **rope)
        compare({**call, "out_dtype": result})
        per_head = tables(kind, 64, 2, 12, 33, dtype=table, rotation=rotation)
        x = random(2, 33, 12, 64, dtype=dtype).transpose(1, 2)
        compare(call_of(x, norm="rms", eps=1e-6, **per_head))


def test_layouts() -> None:
    rope, first = tables("half", 128, 33, 1), tables("full", 128, 33, rotation="half")
    for part in random(2, 33, 3, 24, 128).unbind(2):
        compare(call_of(part, norm="rms", eps=1e-6, weight=random(128), **rope))
    x = random(2, 24, 33, 128)
    compare(call_of(x, norm="rms", **first))
    compare(call_of(random(2, 33, 24, 128).transpose(1, 2), norm="rms", **first), x)
    compare(call_of(random(2, 33, 24, 129)[..., 1:], norm="rms", weight=random(129)[1:], **rope))
    joint = torch.zeros(2, 40, 24, 128, dtype=BF16, device=DEVICE)
    compare(call_of(random(2, 33, 24, 128), norm="rms", **rope), joint[:, 5:38])
    assert joint[:, :5].count_nonzero() + joint[:, 38:].count_nonzero() == 0
    for tokens, heads in ((1, 1), (1, 3), (5, 38), (77, 1)):
        compare(call_of(random(1, tokens, heads, 64), norm="rms", **tables("half", 64, tokens, 1)))


@pytest.mark.parametrize("rotation", ["none", *ROTATIONS])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_in_place(d: int, rotation: str) -> None:
    for dtype in (BF16, FP32):
        x = random(1, 501, 13, d, dtype=dtype)
        rope = tables("full", d, 501, 1, rotation=rotation) if rotation != "none" else {}
        compare(call_of(x, norm="rms", eps=1e-6, weight=random(d), **rope), x)
        compare(call_of(x, **rope), x)


def test_as_good_as_triton() -> None:
    from dkfuse.kernels.ops import reference_outputs

    rope = tables("full", 128, 512, 1)
    arguments = call_of(random(1, 512, 24, 128), norm="rms", eps=1e-6, weight=random(128), **rope)
    expected = reference_outputs("norm_rope", arguments, compute=FP64)["out"]
    ours, triton = launched(arguments), torch.ops.dkfuse.norm_rope(**arguments)
    assert (ours.double() - expected).norm() <= 1.01 * (triton.double() - expected).norm()


def test_nan_and_infinity_stay_where_they_are() -> None:
    x = random(2, 33, 24, 128)
    x[1, 2, 3, 4] = float("nan")
    out = launched(call_of(x, norm="rms", **tables("half", 128, 33, 1)))
    assert out[1, 2, 3].isnan().all()
    assert out.isnan().sum() == 128
    x[1, 2, 3, 4] = float("inf")
    out = launched(call_of(x, **tables("half", 8, 33, 1)))
    assert torch.equal(out[..., 8:], x[..., 8:])
    wide = torch.full((1, 1, 1, 64), 1e6, dtype=FP32, device=DEVICE)
    assert launched({**call_of(wide), "out_dtype": FP16}).isinf().all()


def test_more_than_2_31_elements() -> None:
    """Tokens far apart, and many tokens, in place: what repeats every 16 tokens repeats on both sides of 2^31."""
    step = 2**31 - 2**31 % 3072
    storage = torch.empty(step + 4 * 3072, dtype=BF16, device=DEVICE)
    x = storage.as_strided((2, 3, 24, 128), (step, 3072, 128, 1))
    x.copy_(random(2, 3, 24, 128))
    compare(call_of(x, norm="rms", eps=1e-6, weight=random(128), **tables("half", 128, 3, 1)), x)
    del storage, x
    tokens = 2**19 + 16 * 33
    x = random(16, 32, 128).repeat(tokens // 16, 1, 1)
    assert x.numel() > 2**31
    rope = tables("half", 128, 1, 1)
    few = launched(call_of(x[:16].clone(), norm="rms", eps=1e-6, **rope))
    launched(call_of(x, norm="rms", eps=1e-6, **rope), x)
    assert torch.equal(x[-16:], few)
    assert torch.equal(x[2**18 : 2**18 + 16], few)


def test_captured_in_a_graph_without_a_warm_up() -> None:
    """Also the kernel's load, which is no part of the graph: no other test has this kernel."""
    x, out = random(1, 77, 3, 256, dtype=FP16), torch.empty(1, 77, 3, 256, dtype=FP16, device=DEVICE)
    arguments = call_of(x, norm="layer", eps=1e-4, bias=random(256, dtype=FP16), **tables("half", 64, 77, 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launched(arguments, out)
    for seed in (1, 2):
        x.copy_(random(1, 77, 3, 256, dtype=FP16, seed=seed))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, compare(arguments))


def test_another_thread_and_another_stream() -> None:
    arguments = call_of(random(1, 77, 3, 128), norm="rms", **tables("half", 128, 77, 1))
    expected, results = compare(arguments), []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(launched(arguments))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_no_spills() -> None:
    from dkfuse.kernels import cuda_rope

    for d, rotation in itertools.product(HEAD_DIMS, ROTATIONS):
        launched(
            call_of(random(1, 8, 8, d), norm="rms", weight=random(d), **tables("full", d, 8, 1, rotation=rotation))
        )
    plans = [plan for plan in cuda_rope._plans.values() if plan is not None]
    assert len(plans) >= 2 * len(HEAD_DIMS)
    assert {plan.kernel.attribute(3) for plan in plans} == {0}


def test_prepare_fills_the_disk_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from dkfuse.kernels import cuda_compile, cuda_rope

    monkeypatch.setenv("DKFUSE_CACHE_DIR", str(tmp_path))
    arguments = call_of(random(1, 9, 3, 128), norm="layer", weight=random(128, dtype=FP16), weight_offset=0.5)
    cuda_rope.prepare(arguments, {"out": arguments["x"]})
    assert len(list(tmp_path.rglob("*.bin"))) == 1

    def fail(*_: Any) -> bytes:
        raise AssertionError("compiled again")

    name = cuda_compile._compiler()[0]
    monkeypatch.setattr(cuda_compile, "_compiler", lambda: (name, fail))
    compare(arguments)
