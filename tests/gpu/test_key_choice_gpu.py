"""Attention whose mask chooses keys, on a GPU: against fp64, compiled, in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dkfuse
from dkfuse.kernels.attention_kernels import version_of

from .on_device import random

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
TOKENS, TEXT = 2100, 260


class Joint(torch.nn.Module):
    """Joint attention of tokens and padded text, which is masked on both sides or as keys."""

    def __init__(self, both: bool, text_first: bool):
        super().__init__()
        self.both, self.text_first = both, text_first
        self.qkv, self.out = torch.nn.Linear(512, 3 * 512), torch.nn.Linear(512, 512)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        sure = torch.ones(text.shape[0], TOKENS - TEXT, dtype=torch.bool, device=text.device)
        taken = torch.cat([text.bool(), sure] if self.text_first else [sure, text.bool()], 1)[:, None, None]
        mask = taken & taken.transpose(2, 3) if self.both else taken
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(2, (3, 4, 128)).permute(2, 0, 3, 1, 4)
            q, k = F.rms_norm(q, (128,)), F.rms_norm(k, (128,))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "fa4"])
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_compiled_against_fp64(kernel: str, text_first: bool, both: bool) -> None:
    if version_of(kernel) is None:
        pytest.skip(f"{kernel} is not installed")
    model = Joint(both, text_first).to("cuda", BF16).eval()
    x = random(2, TOKENS, 512, dtype=BF16)
    text = torch.zeros(2, TEXT, device="cuda", dtype=torch.long)
    text[0, :17], text[1, 5:200:2] = 1, 1
    seen = torch.cat([text.bool(), torch.ones(2, TOKENS - TEXT, device="cuda").bool()], 1)
    seen = seen if text_first else seen.roll(-TEXT, 1)
    torch.compiler.reset()
    options = {"dkfuse.attention": kernel, "triton.cudagraphs": True}
    with torch.no_grad(), dkfuse.record() as coverage:
        compiled = torch.compile(model, backend="dkfuse", options=options, dynamic=False)
        for _ in range(3):  # the last from a CUDA graph
            out = compiled(x, text).clone()
        sites = [s for s in coverage.seams if s.family == "attention"]
        assert [s.kernel for s in sites] == [kernel] * 2, [s.reason for s in sites]
        torchs = model(x, text)
        exact = model.double()(x.double(), text)
        # padded queries are anything in torch's kernels: they may not reach others
        error, theirs = ((t.double() - exact)[seen].square().mean().sqrt().item() for t in (out, torchs))
        assert out.isfinite().all() and error <= (1.42 if kernel == "cudnn" else 1.25) * theirs
        model.to(BF16)
        flipped = compiled(x, text.flip(1)).clone()  # the same graph, other keys
        seen = torch.cat([text.flip(1).bool(), seen.new_ones(2, TOKENS - TEXT)], 1)
        seen = seen if text_first else seen.roll(-TEXT, 1)
        again = model(x, text.flip(1))
    torch.testing.assert_close(flipped[seen], again[seen], atol=3e-2, rtol=3e-2)
