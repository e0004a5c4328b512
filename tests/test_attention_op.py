"""`dkfuse::attention` on a CPU: the definition, in the memory order of each kernel."""

from __future__ import annotations

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
    from dkfuse.kernels.attention_run import _readable

    fine = torch.randn(1, 8, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
    assert _readable(fine) is fine
    odd = torch.randn(1 * 8 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(1, 8, 4, 64).transpose(1, 2)
    strided = torch.randn(1, 8, 4, 65, dtype=torch.bfloat16)[..., :64].transpose(1, 2)
    inner = torch.randn(1, 4, 64, 8, dtype=torch.bfloat16).transpose(2, 3)
    for tensor in (odd, strided, inner):
        copy = _readable(tensor)
        assert copy.data_ptr() % 16 == 0 and copy.stride() == (4 * 8 * 64, 64, 4 * 64, 1)
        torch.testing.assert_close(copy, tensor, rtol=0, atol=0)


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
