"""Masks that say how many keys take part: proved from the graph or refused, and never taken for what they are not."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dkfuse.seams.key_lengths import Unproved, prove, sure

from .masks import INF, KEYS, NEAR_MISSES, SPELLINGS, arange, mask_of, proved, same_mask, traced

PADDING = torch.tensor([[1] * 9 + [0] * 3, [1] * 5 + [0] * 7])
ONE = PADDING[:1]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_proved_and_are_what_was_proved(name):
    build = SPELLINGS[name]
    same_mask(build, *((torch.tensor(n), PADDING) for n in ([3, 7], [0, 12], [-2, 40])))
    same_mask(build, (torch.tensor([5], dtype=torch.int32), ONE))


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused_with_a_reason(name):
    build, said = NEAR_MISSES[name]
    n = torch.tensor([3, 7])
    with pytest.raises(Unproved) as why:
        proved(build, n, PADDING, batch=2)
    assert re.search(said, why.value.message), why.value.message


def test_reasons_have_codes_that_aggregate():
    found = {}
    for name in ("an input", "finite", "scaled"):
        with pytest.raises(Unproved) as why:
            proved(NEAR_MISSES[name][0], torch.tensor([3, 7]), PADDING, batch=2)
        found[name] = why.value.code
    assert found == {"an input": "mask_input", "finite": "mask_values", "scaled": "mask"}


def test_samples_must_be_those_of_q():
    build = SPELLINGS["lt"]
    with pytest.raises(Unproved, match="4 samples"):
        proved(build, torch.tensor([3, 7]), PADDING, batch=4)
    assert proved(build, torch.tensor([3]), ONE, batch=4).add == 0  # one number for all


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_numbers_overflow_as_they_do_in_the_graph(dtype):
    most = torch.iinfo(dtype).max
    n = torch.tensor([most - 2, 3, most], dtype=dtype)
    same_mask(lambda n: (arange() < (n + 6)[:, None])[:, None, None], (n,))


def test_numbers_far_from_those_of_any_key():
    n = torch.tensor([2**62, 3, -(2**62)])
    same_mask(lambda n: (arange() < (n - 2**62 - 2**62)[:, None])[:, None, None], (n,))


def test_a_comparison_in_fewer_bits_than_the_number_has():
    def build(n):  # torch compares with a 0-dim tensor in the dtype of the other
        return (arange(dtype=torch.int32) < n[0])[None, None, None]

    assert build(torch.tensor([2**32 + 3])).sum() == 3
    with pytest.raises(Unproved, match=r"compares in torch\.int32"):
        proved(build, torch.tensor([2**32 + 3]), batch=1)
    same_mask(build, (torch.tensor([3], dtype=torch.int32),))


def test_keys_joined_as_integers_are_no_truths():
    def build(n):  # bitwise not of 1 is -2, which is true
        integers = torch.cat([torch.ones(2, 4, dtype=torch.int64), arange(8) < n[:, None]], 1)
        return (~((~integers).bool()))[:, None, None]

    assert not build(torch.tensor([3, 7])).any()
    with pytest.raises(Unproved, match="no boolean mask"):
        proved(build, torch.tensor([3, 7]), batch=2)


def test_symbolic_sizes_of_sums_that_are_viewed():
    def build(p):
        return (arange() < (p.sum(1).view(p.shape[0], 1) + 4))[:, None, None]

    module = traced(build, torch.ones(3, 5, dtype=torch.int64), mode="symbolic")
    mask = mask_of(module)
    assert sure(prove(mask, mask.meta["val"].shape[0], KEYS)) == 4


def test_symbolic_sizes_are_proved_without_a_guard():
    def build(n, k):
        return (torch.arange(k.shape[0]) < n[:, None])[:, None, None]

    module = traced(build, torch.tensor([3, 7]), torch.zeros(KEYS), mode="symbolic")
    mask = mask_of(module)
    batch, keys = mask.meta["val"].shape[0], mask.meta["val"].shape[3]
    assert isinstance(keys, torch.SymInt)
    environment = keys.node.shape_env
    before = len(environment.guards)
    assert prove(mask, batch, keys).add == 0
    with pytest.raises(Unproved, match="does not count"):
        prove(mask, batch, keys + 1)
    assert len(environment.guards) == before


# -- masks put together at random -------------------------------------------------------------------------------------

COMPARISONS = {
    "j < n": lambda j, n: j < n,
    "j <= n": lambda j, n: j <= n,
    "n > j": lambda j, n: n > j,
    "n >= j": lambda j, n: n >= j,
    "not j >= n": lambda j, n: ~(j >= n),
    "not n < j": lambda j, n: torch.logical_not(n < j),
}
FORMS = {
    "bool": lambda m: m,
    "where": lambda m: torch.where(m, 0.0, INF),
    "where not": lambda m: torch.where(~m, torch.full((), INF), torch.zeros(())),
    "masked_fill": lambda m: torch.zeros(m.shape, dtype=torch.bfloat16).masked_fill(~m, INF),
    "both": lambda m: torch.where(m & m, 0.0, INF).to(torch.float16),
}
SHAPES = {
    "unsqueeze": lambda m: m.unsqueeze(1).unsqueeze(1),
    "index": lambda m: m[:, None, None, :],
    "view": lambda m: m.view(m.shape[0], 1, 1, m.shape[1]),
    "expand": lambda m: m[:, None, None].expand(-1, 2, 3, -1),
    "repeat": lambda m: m[:, None, None].repeat(1, 2, 1, 1),
    "permute": lambda m: m[:, :, None, None].permute(0, 2, 3, 1),
}


@settings(max_examples=40, deadline=None)
@given(
    compare=st.sampled_from(sorted(COMPARISONS)),
    form=st.sampled_from(sorted(FORMS)),
    shape=st.sampled_from(sorted(SHAPES)),
    front=st.integers(0, 3),
    fronts=st.sampled_from(["cat", "pad"]),
    form_first=st.booleans(),
    n=st.lists(st.integers(-3, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.int32, torch.int64, torch.int16]),
    keys=st.integers(2, 8),
)
def test_a_proof_is_never_wrong(compare, form, shape, front, fronts, form_first, n, dtype, keys):
    def build(n):
        mask = COMPARISONS[compare](arange(keys)[None], n[:, None])
        if front and fronts == "cat":
            mask = torch.cat([torch.ones(mask.shape[0], front, dtype=torch.bool), mask], 1)
        elif front:
            mask = torch.nn.functional.pad(mask, (front, 0), value=True)
        first, second = (FORMS[form], SHAPES[shape]) if form_first else (SHAPES[shape], FORMS[form])
        return second(first(mask))

    same_mask(build, (torch.tensor(n, dtype=dtype),), keys=keys + front)
