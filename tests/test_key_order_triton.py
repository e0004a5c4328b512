"""The kernel that brings keys in order, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from .interpreter import INTERPRETED, run_interpreted

pytest.importorskip("triton")

if not INTERPRETED:

    def test_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    from dkfuse.kernels.triton_key_order import reorder

    @pytest.mark.parametrize("heads", [1, 3])
    @pytest.mark.parametrize("d", [16, 24, 128])
    def test_tokens_in_another_order(heads: int, d: int) -> None:
        memory = torch.randn(2, 70, heads, 3 * d)
        order = torch.stack([torch.randperm(70), torch.arange(70)]).to(torch.int32)
        for x in (memory[..., d : 2 * d].transpose(1, 2), memory.transpose(1, 2).contiguous()[..., ::3]):
            for numbers in (order, order.long(), order[:, :37], order.t().contiguous().t()):
                out = torch.full((2, numbers.shape[1], heads, d), float("nan")).transpose(1, 2)
                reorder(x, out, numbers)
                for b in range(2):
                    assert out[b].equal(x[b][:, numbers[b].long()])
