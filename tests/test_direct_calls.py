"""Direct calls in what Inductor writes: which ops get one, that it computes what the op does, and that no other graph's
code has one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch._inductor.utils import run_and_get_code

from dkfuse import compat_direct
from dkfuse.backend import dkfuse as backend
from dkfuse.choosing import watch
from dkfuse.kernels import cute_ahead, gemm, gemm_quack, joint_linear, linear_ops
from dkfuse.rewriting import direct_calls

aten, ops = torch.ops.aten, torch.ops.dkfuse
X, W, WIDE, B = torch.randn(16, 64), torch.randn(64, 64), torch.randn(64, 96), torch.randn(64)
Q = torch.randn(2, 16, 4, 32).transpose(1, 2)
LENGTHS = torch.tensor([3, 16], dtype=torch.int32)


@pytest.fixture(autouse=True)
def no_cache(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cute_ahead, "fa4_is_known", lambda: True)
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def code_of(function: Callable[..., Any], *tensors: torch.Tensor, dynamic: bool = False) -> str:
    """What is written for `function` where calls are direct; its result is compared with eager's."""
    expected = function(*tensors)
    with torch.no_grad(), compat_direct.direct_calls():
        compat_direct.begin(direct_calls.OPS)
        found, (code,) = run_and_get_code(torch.compile(function, dynamic=dynamic), *tensors)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
    return code


def written(name: str) -> str:
    """A function of CALLS as generated code names it."""
    return name if name.startswith("torch.") else f"_dkfuse_{name}"


CALLS: dict[str, tuple[str, Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "linear": ("gemm.into_batched", lambda x, w, b: ops.linear(x, w, b, act="gelu", using="quack"), (X, W, B)),
    "linear, no bias": (
        "gemm.into_batched",
        lambda x, w: ops.linear(x, w, using="quack", tiles="128x160"),
        (X, W),
    ),
    "linear, gated": (
        "gemm.into_batched",
        lambda x, w: ops.linear(x, w, act="silu_first", using="quack"),
        (X, W),
    ),
    "linear, gated, bias": (
        "gemm.into",
        lambda x, w, b: ops.linear(x, w, b, act="silu_second", using="quack"),
        (X, W, B),
    ),
    "linear, a part": (
        "gemm.into_batched",
        lambda x, w, b: ops.linear(x[:, 8:40], w[:, :32], b, using="quack"),
        (X, W, B),
    ),
    "linear, not aligned": ("gemm.into", lambda x, w: ops.linear(x[:, 1:33], w[:, :32], using="quack"), (X, W)),
    "linear, columns": ("gemm.into", lambda x, w: ops.linear(x, w.t(), using="quack"), (X, W)),
    "linear, computed": ("gemm.into_batched", lambda x, w: ops.linear((x * 2).relu(), w, using="quack"), (X, W)),
    "joint_linear": (
        "joint_linear.into_pieces",
        lambda x, w, b: ops.joint_linear([x, x[:8]], [w, w * 2], [None, b], 2, ["", "128x192"]),
        (X, W, B),
    ),
    "joint_linear, one sample": (
        "joint_linear.into_pieces",
        lambda x, w, b: ops.joint_linear([x, x[:6] * 2], [w, w], [b, b], 1, ["128x160", ""]),
        (X, W, B),
    ),
    "joint_linear, not aligned": (
        "joint_linear.into",
        lambda x, w, b: ops.joint_linear(
            [x[:, 1:33], x[:, 8:40]], [w[:, :32], w[:, :32]], [b, None], 2, ["128x192", ""]
        ),
        (X, W, B),
    ),
    "split_linear": (
        "linear_ops.sum_of_products",
        lambda x, w, b: ops.split_linear([x, x[:, :32] * 2], w, b),
        (X, WIDE, B),
    ),
    "split_linear, no bias": (
        "linear_ops.sum_of_products",
        lambda x, w: ops.split_linear([x[:, :32], x], w, None),
        (X, WIDE),
    ),
    "adapted_linear": (
        "adapted_linear.into",
        lambda x, w, b: ops.adapted_linear(x, w, b, [x[:, :8], x * 2], [w[:, :8], w], [0.5, -1.0], "128x192"),
        (X, W, B),
    ),
    "adapted_linear, no bias": (
        "adapted_linear.into",
        lambda x, w: ops.adapted_linear(x, w, None, [x[:, 3:7]], [w[:, 3:7]], [2.0]),
        (X, W),
    ),
    "addmm_gelu": (
        "torch._addmm_activation",
        lambda x, w, b: aten._addmm_activation.default(b, x, w.t(), use_gelu=True),
        (X, W, B),
    ),
    "attention": ("attention.into", lambda q: ops.attention(q, q, q * 2, using="fa4", scale=0.1), (Q,)),
    "attention, causal": ("attention.into", lambda q: ops.attention(q, q, q, using="fa4", causal=True), (Q,)),
    "attention, grouped": (
        "attention.into",
        lambda q: ops.attention(q, q[:, :2], q[:, 2:], using="fa4", gqa=True),
        (Q,),
    ),
    "attention, lengths": (
        "attention.into",
        lambda q, n: ops.attention(q, q, q, None, n, using="fa4", bounded=True),
        (Q, LENGTHS),
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_direct_call_is_written(case: str) -> None:
    name, function, tensors = CALLS[case]
    code = code_of(function, *tensors)
    assert code.count(f" {written(name)}(") == 1, code
    module = name.partition(".")[0]
    assert module == "torch" or f"\nimport dkfuse.kernels.{module} as _dkfuse_{module}\n" in code, "for a warm start"
    assert "torch.ops.dkfuse" not in code and "torch.ops.aten._addmm_activation" not in code


@pytest.mark.parametrize("case", ["linear", "joint_linear", "addmm_gelu", "attention"])
def test_with_symbolic_sizes(case: str) -> None:
    name, function, tensors = CALLS[case]
    code = code_of(function, *tensors, dynamic=True)
    assert f" {written(name).removesuffix('_batched').removesuffix('_pieces')}(" in code, code
    if case == "attention":
        assert "key=None" in code, "a key that names sizes must not be of symbols"


def test_parts_of_symbolic_width_stay_with_the_op() -> None:
    code = code_of(lambda x, w: ops.split_linear([x, x], w, None), X, torch.randn(64, 128), dynamic=True)
    assert "torch.ops.dkfuse.split_linear.default(" in code


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (lambda x, w: ops.linear(x, w, using="cublas"), (X, W)),
        (lambda q: ops.attention(q, q, q, using="cudnn"), (Q,)),
        (lambda q: ops.attention(q, q, q, q[0, 0, 0, 0] > torch.zeros(1, 1, 16, 16), using="sdpa"), (Q,)),
    ],
)
def test_other_kernels_stay_with_the_op(function: Callable[..., Any], tensors: tuple[torch.Tensor, ...]) -> None:
    code = code_of(function, *tensors)
    assert "torch.ops.dkfuse" in code and "dkfuse_" not in code


def test_a_version_whose_kernels_are_not_known_stays_with_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cute_ahead, "fa4_is_known", lambda: False)
    assert "torch.ops.dkfuse.attention" in code_of(CALLS["attention"][1], Q)


def test_another_form_of_torchs_op_stays_with_it() -> None:
    code = code_of(lambda x, w, b: aten._addmm_activation.default(b, x, w.t(), use_gelu=False), X, W, B)
    assert "torch._addmm_activation(" not in code


def test_graphs_in_cpp_stay_with_the_op() -> None:
    with torch._inductor.config.patch(cpp_wrapper=True):
        code = code_of(CALLS["addmm_gelu"][1], X, W, B)
    assert "dkfuse" not in code


# -- whose code has them -----------------------------------------------------------------------------------------------


def gelu(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return aten._addmm_activation.default(b, x, w.t(), use_gelu=True)


def test_graphs_of_the_backend_have_them() -> None:
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(gelu, backend=backend), X, W, B)
    assert " torch._addmm_activation(" in code


def test_graphs_that_are_passed_through_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's cache may give their code to a process that does not know dkfuse."""
    from dkfuse import fuse

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("planned")

    monkeypatch.setattr(fuse, "run", broken)
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(gelu, backend=backend), X, W, B)
    assert " torch._addmm_activation(" not in codes[-1] and "_addmm_activation.default(" in codes[-1]


def test_a_failure_in_one_is_not_taken_for_a_kernel_that_can_be_left_out() -> None:
    assert watch.OURS.search("dkfuse_norm_modulate_0.run(x)")
    assert not any(watch.OURS.search(f" {written(name)}(x, w)") for name, *_ in CALLS.values())


def test_afterwards_torch_is_as_it_was() -> None:
    from torch._inductor import lowering

    before = dict(lowering.lowerings)
    with contextlib.suppress(KeyError), compat_direct.direct_calls():
        assert lowering.lowerings == before, "the graph may be in the cache"
        compat_direct.begin(direct_calls.OPS)
        assert lowering.lowerings[aten._addmm_activation.default] is not before[aten._addmm_activation.default]
        raise KeyError
    compat_direct.begin(direct_calls.OPS)  # of a graph that is not ours
    assert lowering.lowerings == before
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(gelu), X, W, B)
    assert "dkfuse" not in code


# -- the functions -----------------------------------------------------------------------------------------------------


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnCuda)


@pytest.mark.parametrize("aligned", [True, False])
def test_addresses_that_are_no_vectors_are_seen_to(monkeypatch: pytest.MonkeyPatch, aligned: bool) -> None:
    """What Inductor cannot know: where an input of the graph begins."""
    called = []
    monkeypatch.setattr(gemm_quack, "launch", lambda *args: called.append("launch"))
    monkeypatch.setattr(gemm_quack, "run", lambda x, w, b, *rest: called.append((x.shape, w.shape, b.shape)))
    x = on_cuda(torch.empty(16 * 64 + 1)[0 if aligned else 1 :][: 16 * 64].view(16, 64, 1))
    gemm.into_batched(x, W[..., None], B[None], act="none", tiles="128x192", out=on_cuda(torch.empty(16, 64, 1)))
    assert called == (["launch"] if aligned else [((16, 64), (64, 64), (64,))])


def test_nothing_is_launched_for_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_quack, "launch", lambda *args: pytest.fail("launched"))
    empty = on_cuda(torch.empty(0, 64, 1))
    gemm.into_batched(empty, W[..., None], act="none", tiles="128x192", out=empty.clone())


@pytest.mark.parametrize("batch", [1, 2])
def test_pieces(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Of a result that begins inside of a buffer; quack's share is computed by the definition."""
    monkeypatch.setattr(
        gemm_quack,
        "launch",
        lambda a, b, row, act, out, tiles: out.copy_(torch.addmm(row[0], a[..., 0], b[..., 0].t())[..., None]),
    )
    x, y, w, b = torch.randn(4 * batch, 16), torch.randn(6 * batch, 16), torch.randn(8, 16), torch.randn(8)
    expected = ops.joint_linear([x, y], [w, w * 2], [b, None], batch, ["128x192", ""])
    tensors, pieces = [], []
    for i in range(batch):
        tensors += [on_cuda(x[4 * i : 4 * i + 4, :, None]), w[..., None], b[None], y[6 * i : 6 * i + 6], 2 * w.t()]
        pieces += [(10 * i, 4, True, "128x192"), (10 * i + 4, 6, False, "")]
    out = torch.empty(80 * batch + 4)[4:].view(batch, 10, 8)
    joint_linear.into_pieces(*tensors, pieces=pieces, out=on_cuda(out))
    torch.testing.assert_close(out, expected)
    joint_linear.into(
        x, y, w, w * 2, b, biased=[True, False], batch=batch, tiles=["128x192", ""], out=on_cuda(out.zero_())
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_sum_of_products(bias: bool) -> None:
    a, b, c, d = torch.randn(5, 3), torch.randn(3, 7), torch.randn(5, 4), torch.randn(4, 7)
    added, out = torch.randn(7), torch.empty(5, 7)
    linear_ops.sum_of_products(a, b, c, d, *([added] if bias else []), out=out)
    torch.testing.assert_close(out, a @ b + c @ d + (added if bias else 0))
