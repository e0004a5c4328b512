"""`dkfuse::attention` on a CPU: the definition, in the memory order of each kernel."""

from __future__ import annotations

import functools
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

import dkfuse.kernels.attention  # noqa: F401  (registers the op)
from dkfuse import Settings, seams
from dkfuse.compat import graph_pass
from dkfuse.kernels.attention_kernels import KERNELS

from .attentions import install, sdpa

OP = torch.ops.dkfuse.attention.default
Q = torch.randn(2, 6, 4, 16).transpose(1, 2)
KV = torch.randn(2, 10, 2, 16).transpose(1, 2)
LAYOUTS = {
    "tokens first": Q,
    "heads first": Q.contiguous(),
    "packed": torch.randn(2, 6, 3, 4, 16).unbind(2)[1].transpose(1, 2),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(kernel, layout):
    q = LAYOUTS[layout]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(OP, (q, KV, KV.flip(2)), {"gqa": True, "using": kernel}, test_utils=tests)
    torch.library.opcheck(OP, (q, q, q.flip(2)), {"causal": True, "scale": 0.2, "using": kernel}, test_utils=tests)


@pytest.mark.parametrize("kernel", KERNELS)
def test_is_the_definition_in_the_order_of_the_kernel(kernel):
    for q in LAYOUTS.values():
        out = OP(q, KV, KV.flip(2), gqa=True, scale=0.2, using=kernel)
        expected = F.scaled_dot_product_attention(q, KV, KV.flip(2), enable_gqa=True, scale=0.2)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        if KERNELS[kernel].order == "tokens":
            assert out.transpose(1, 2).is_contiguous()
        else:
            assert out.stride() == torch.empty_like(q).stride()


def test_masks():
    mask = torch.rand(2, 1, 6, 6) > 0.3
    mask[..., 0] = True
    out = OP(Q, Q, Q, mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(Q, Q, Q, attn_mask=mask), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"fa4 takes no mask.*\[2, 1, 6, 6\]"):
        OP(Q, Q, Q, mask, using="fa4")


def test_a_kernel_that_does_not_exist():
    with pytest.raises(ValueError, match="no kernel 'fa9'; known: sdpa, cudnn"):
        OP(Q, Q, Q, using="fa9")


def test_unaligned_tensors_are_copied_before_a_kernel_reads_them():
    from dkfuse.kernels.attention_run import readable

    fine = torch.randn(1, 8, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
    assert readable(fine) is fine
    odd = torch.randn(1 * 8 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(1, 8, 4, 64).transpose(1, 2)
    strided = torch.randn(1, 8, 4, 65, dtype=torch.bfloat16)[..., :64].transpose(1, 2)
    inner = torch.randn(1, 4, 64, 8, dtype=torch.bfloat16).transpose(2, 3)
    for tensor in (odd, strided, inner):
        copy = readable(tensor)
        assert copy.data_ptr() % 16 == 0 and copy.stride() == (4 * 8 * 64, 64, 4 * 64, 1)
        torch.testing.assert_close(copy, tensor, rtol=0, atol=0)


class Recorder:
    """Stands for `torch.ops.aten`, whose kernels need a GPU: keeps what they are called with."""

    def __init__(self):
        self.given = []

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        self.given.append(args[:3])
        return args[:1]


@pytest.mark.parametrize("kernel", ["sdpa", "cudnn", "flash", "efficient"])
def test_kernels_of_torch_are_given_aligned_tensors(monkeypatch, kernel):
    from dkfuse.kernels import attention, attention_run

    recorder = Recorder()
    monkeypatch.setattr(attention_run, "aten", recorder)
    if kernel == "sdpa":
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **_: recorder(*a)[0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    odd = torch.randn(1 * 8 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(1, 8, 4, 64).transpose(1, 2)
    strided = torch.randn(1, 8, 4, 65, dtype=torch.bfloat16)[..., :64].transpose(1, 2)
    attention._cuda(odd, strided, odd, using=kernel)
    ((q, k, v),) = recorder.given
    for given, of in ((q, odd), (k, strided), (v, odd)):
        assert given.data_ptr() % 16 == 0 and not any(s % 8 for s in given.stride()[:3])
        assert torch.equal(given, of)


def test_one_warning_of_the_compiler_of_fa4_is_silenced(monkeypatch):
    from dkfuse.kernels import attention_run

    package = types.ModuleType("flash_attn.cute")
    package.flash_attn_func = lambda q, k, v, **_: (q,)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    monkeypatch.setattr(attention_run, "_fa4_function", functools.cache(attention_run._fa4_function.__wrapped__))
    said = "Argument {} (position 17) cannot be converted to a JitArgument for function 'cutlass___call___{}fwd'."
    place = {"filename": "dsl.py", "lineno": 2214}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        attention_run.fa4(Q, Q, Q, False, None)
        for argument, function, module in (
            ("aux_data", "flash_attncuteflash_fwd", "cutlass.base_dsl.dsl"),  # the one
            ("mask", "flash_attncuteflash_fwd", "cutlass.base_dsl.dsl"),
            ("aux_data", "mine", "cutlass.base_dsl.dsl"),
            ("aux_data", "flash_attncuteflash_fwd", "mine"),
        ):
            warnings.warn_explicit(said.format(argument, function), UserWarning, module=module, **place)
    assert len(seen) == 3


def test_inductor_runs_it_on_views_without_copies(monkeypatch):
    from torch._inductor.utils import run_and_get_code

    install(monkeypatch, fa4="4.0.0b20")
    x = torch.randn(2, 24, 3 * 512, dtype=torch.bfloat16)

    def attention(x):
        return sdpa(*x.unflatten(2, (3, 8, 64)).unbind(2))

    seen = []
    settings = Settings(target="sm90", attention="fa4")
    hook = graph_pass(lambda graph: seen.extend(seams.run(graph, settings)), None)  # without identity: not cached
    options = {"post_grad_custom_pre_pass": hook}
    torch.compiler.reset()
    with torch.no_grad():
        out, (code,) = run_and_get_code(torch.compile(attention, options=options), x)
    assert [s.kernel for s in seen] == ["fa4"]
    assert "torch.ops.dkfuse.attention.default(" in code
    assert "cpp_fused" not in code and "clone" not in code, "q, k or v is copied"
    torch.testing.assert_close(out, attention(x), rtol=0, atol=0)
