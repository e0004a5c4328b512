"""Attention in two parts: the merge under Triton's interpreter, and which keys are known to take part in any case."""

from __future__ import annotations

import pytest
import torch

from dkfuse.seams.key_lengths import sure

from .interpreter import INTERPRETED, run_interpreted
from .masks import KEYS, proved, same_mask

pytest.importorskip("triton")
INF = float("-inf")


def mask_of(numbers: torch.Tensor) -> torch.Tensor:
    return (torch.arange(KEYS) < numbers[:, None])[:, None, None]


# -- keys that take part in any case -----------------------------------------------------------------------------------

SPELLINGS = {
    "the sum of a mask behind 9 keys": (lambda n, p: mask_of(9 + p[:, 9:].sum(1)), 9),
    "an int32 sum, added twice": (lambda n, p: mask_of(p[:, 9:].sum(1, dtype=torch.int).add(4).add(5)), 9),
    "a sum in another dtype": (lambda n, p: mask_of(p[:, 9:].float().sum(1).to(torch.int64) + 9), 9),
    "counted": (lambda n, p: mask_of(torch.count_nonzero(p, 1) + 2), 2),
    "keys before the counted ones": (
        lambda n, p: torch.cat([torch.ones(2, 1, 1, 5, dtype=torch.bool), mask_of(n)[..., :7]], -1),
        5,
    ),
    "a number that may be negative": (lambda n, p: mask_of(n + 9), 0),
    "less than a sum": (lambda n, p: mask_of(9 - p[:, 9:].sum(1)), 0),
    "a sum and a negative number": (lambda n, p: mask_of(p.sum(1) - 3), 0),
    "a sum that may overflow, then counted on": (lambda n, p: mask_of(p.sum(1).to(torch.int8).long() + 4), 0),
    "a narrow sum": (lambda n, p: mask_of(p.sum(1, dtype=torch.int8).long() + 4), 0),
    "up to a sum": (lambda n, p: ~(torch.arange(KEYS) > (p.sum(1) + 4)[:, None])[:, None, None], 5),
    "twice a number": (lambda n, p: mask_of(torch.add(p.sum(1), 3, alpha=2)), 0),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_keys_that_take_part_in_any_case(name: str) -> None:
    build, expected = SPELLINGS[name]
    n, p = torch.tensor([3, 11]), torch.ones(2, KEYS, dtype=torch.int64)
    assert sure(proved(build, n, p, batch=2)) == expected
    same_mask(build, *((n, (torch.arange(KEYS) < k).long().expand(2, -1).contiguous()) for k in (0, 2, KEYS)))


# -- the merge ---------------------------------------------------------------------------------------------------------

if not INTERPRETED:

    def test_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    from dkfuse.kernels import attention_parts
    from dkfuse.kernels.triton_merge import merge

    def with_sums(q, k, v, bias, scale):
        scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if bias is None else scores + bias.double()
        sums = scores.logsumexp(-1)
        out = (scores - sums[..., None]).exp() @ v.double()
        return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), sums.float()

    @pytest.mark.parametrize("d", [8, 72])
    @pytest.mark.parametrize("scale", [None, 0.5])
    @pytest.mark.parametrize("numbers", [(20, 24), (21, 22)])
    def test_two_parts_are_the_whole(monkeypatch, d, scale, numbers) -> None:
        monkeypatch.setattr(attention_parts, "_with_sums", with_sums)
        generator = torch.Generator().manual_seed(d)
        q, k, v = (torch.randn(2, n, 3, d, generator=generator).half().transpose(1, 2) for n in (37, 24, 24))
        n = torch.tensor(numbers, dtype=torch.int32)
        out = attention_parts.cudnn(q, k, v, n, scale, 20)
        bias = torch.where(torch.arange(24) < n[:, None], 0.0, INF)[:, None, None]
        exact, _ = with_sums(q.double(), k, v, bias, scale)
        assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
        assert (out.double() - exact).norm() <= 2**-11 * exact.norm()

    def test_a_broken_promise_is_not_a_number() -> None:
        a, b = torch.ones(2, 1, 3, 8), torch.zeros(2, 1, 3, 8)
        sums, n = torch.zeros(2, 1, 3), torch.tensor([4, 5], dtype=torch.int32)
        out = merge(a, sums, b, sums, n, 5)
        assert out[0].isnan().all() and torch.equal(out[1], a[1])

    def test_large_sums_do_not_overflow() -> None:
        a, b = torch.ones(1, 1, 2, 8), torch.zeros(1, 1, 2, 8)
        la, lb = torch.tensor([[[300.0, -300.0]]]), torch.tensor([[[-300.0, 300.0]]])
        out = merge(a, la, b, lb, torch.tensor([9], dtype=torch.int32), 5)
        assert torch.equal(out[0, 0, :, 0], torch.tensor([1.0, 0.0]))

    def test_what_lies_behind_the_keys_does_not_matter_where_only_the_sure_ones_take_part() -> None:
        a, b = torch.ones(1, 1, 3, 8), torch.full((1, 1, 3, 8), float("inf"))
        sums = torch.zeros(1, 1, 3)
        assert torch.equal(merge(a, sums, b, sums, torch.tensor([5], dtype=torch.int32), 5), a)

    def test_parts_with_the_elements_of_a_row_apart_are_read_all_the_same() -> None:
        a, b = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
        sums, n = torch.zeros(2, 3, 5), torch.tensor([6, 7], dtype=torch.int32)
        apart = a.mT.contiguous().mT, b.mT.contiguous().mT
        assert apart[0].stride(-1) != 1
        torch.testing.assert_close(merge(apart[0], sums, apart[1], sums, n, 5), (a + b) / 2)
