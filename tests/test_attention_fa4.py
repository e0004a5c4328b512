"""Direct calls of FlashAttention 4's compiled kernels: the same as by its own function, and only where that is sure.

The package is a stand-in with the structure of 4.0.0b20: a function with a cache of compiled kernels, each called with
sixteen arguments.
"""

from __future__ import annotations

import json
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F

from dkfuse.kernels import (
    attention,
    attention_fa4,
    attention_fa4_kept,
    attention_kept,
    attention_kernels,
    attention_lengths,
    attention_run,
    cute_ahead,
)

BF16 = torch.bfloat16


class Package:
    """`flash_attn.cute`: `calls` of its function, `launches` of its compiled kernels (q, k, v, out, lengths, scale)."""

    def __init__(self):
        self.calls, self.launches = 0, []
        self.change = lambda kernel, args: kernel(*args)  # how its function calls a kernel
        self.interface = types.ModuleType("flash_attn.cute.interface")
        self.forward = self.interface._flash_attn_fwd = self._forward()
        self.forward.compile_cache = {}
        self.cute = types.ModuleType("flash_attn.cute")
        self.cute.interface = self.interface
        self.cute.flash_attn_func = lambda q, k, v, softmax_scale=None, causal=False: (
            self.forward(q, k, v, None, softmax_scale, causal),
            None,
        )
        self.cute.flash_attn_varlen_func = lambda q, k, v, seqused_k=None, softmax_scale=None: (
            self.forward(q, k, v, seqused_k, softmax_scale, False),
            None,
        )

    def _forward(self):
        def forward(q, k, v, lengths, scale, causal):
            self.calls += 1
            out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            key = q.dtype, q.shape[-1], q.shape[2] // k.shape[2], causal, lengths is None
            if key not in forward.compile_cache:
                forward.compile_cache[key] = self.kernel(causal)
            nothing = (None, None)  # their AuxData
            args = (q, k, v, out.detach(), None, scale, None, None, None, lengths, *(None,) * 5, nothing)
            self.change(forward.compile_cache[key], args)
            return out

        return forward

    def kernel(self, causal):
        def compiled(q, k, v, out, lse, scale, *rest):
            lengths = rest[3] if rest else None
            self.launches.append((q, k, v, out, lengths, scale))
            mask = None
            if lengths is not None:
                mask = (torch.arange(k.shape[1]) < lengths[:, None])[:, None, None]
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            gqa = q.shape[1] != k.shape[1]
            found = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)
            out.copy_(found.transpose(1, 2))

        return compiled


@pytest.fixture
def package(monkeypatch):
    made = Package()
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", made.cute)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", made.interface)
    monkeypatch.delitem(sys.modules, "flash_attn.cute.cache_utils", raising=False)
    monkeypatch.setattr(attention_kernels, "version_of", lambda name: "4.0.0b20")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # as of tensors on a CPU
    monkeypatch.setattr(attention_fa4, "_direct", {})
    monkeypatch.setattr(attention_fa4, "_named", {})
    monkeypatch.setattr(attention_fa4, "_compared", {})
    for function in (attention_run._fa4_function, attention_lengths._fa4_function):
        function.cache_clear()
    yield made
    for function in (attention_run._fa4_function, attention_lengths._fa4_function):
        function.cache_clear()


def tensors(*heads: int, tokens: int = 40, keys: int | None = None, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v `[2, H, tokens, 64]` of so many heads, each a part of a packed tensor."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [tokens, keys or tokens, keys or tokens]
    packed = [torch.randn(2, s, 2 * h + 1, 64, generator=generator).to(BF16) for s, h in zip(sizes, heads, strict=True)]
    return [t[:, :, 1 : 1 + h].transpose(1, 2) for t, h in zip(packed, heads, strict=True)]


CASES = {
    "plain": ((4, 4, 4), {}, {}),
    "keys": ((4, 4, 4), {"keys": 50}, {}),
    "grouped": ((4, 2, 2), {}, {"gqa": True}),
    "causal": ((4, 4, 4), {}, {"causal": True}),
    "scaled": ((4, 4, 4), {}, {"scale": 0.3}),
    "lengths": ((4, 4, 4), {"keys": 50}, {"key_lengths": torch.tensor([3, 77])}),
    "bounded": ((4, 4, 4), {"keys": 50}, {"key_lengths": torch.tensor([3, 50], dtype=torch.int32), "bounded": True}),
    "long": ((1, 1, 1), {"tokens": 300}, {"causal": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_later_calls_go_to_the_compiled_kernel(package, case):
    heads, sizes, options = CASES[case]
    attention._cuda(*tensors(*heads, **sizes), using="fa4", **options)
    package.calls, package.launches = 0, []
    for seed in (1, 2):
        q, k, v = tensors(*heads, **sizes, seed=seed)
        out = attention._cuda(q, k, v, using="fa4", **options)
        expected = attention.reference(q, k, v, using="fa4", **options)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        assert out.stride() == expected.stride()
        *given, made, lengths, _ = package.launches[-1]
        assert [t.data_ptr() for t in given] == [t.data_ptr() for t in (q, k, v)], "copied"
        assert made.data_ptr() == out.data_ptr()
        if case == "bounded":
            assert lengths is options["key_lengths"]
    assert package.calls == 0 and len(package.launches) == 2


def test_the_first_call_compares_few_tokens_once_per_compiled_kernel(package):
    q, k, v = tensors(4, 4, 4, tokens=600)
    attention._cuda(q, k, v, using="fa4")
    sizes = [(made.shape[0], made.shape[1]) for _, _, _, made, _, _ in package.launches]
    assert sizes == [(2, 600), (1, 256), (1, 256)]  # theirs; theirs and ours, compared
    attention._cuda(*tensors(4, 4, 4, tokens=80), using="fa4")  # another key of the same kernel
    assert len(package.launches) == 4 and package.calls == 3


def test_numbers_of_keys_are_read_at_each_call(package):
    q, k, v = tensors(4, 4, 4)
    lengths = torch.tensor([1, 2], dtype=torch.int32)
    for numbers in ((1, 2), (40, 7), (99, -3)):
        lengths.copy_(torch.tensor(numbers))
        out = attention._cuda(q, k, v, None, lengths, using="fa4")
        torch.testing.assert_close(out, attention.reference(q, k, v, None, lengths, using="fa4"), rtol=0, atol=0)
    assert package.calls == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda q, k, v: (q.contiguous(), k, v),
        lambda q, k, v: (q, k, v.contiguous()),
        lambda q, k, v: (q[:, :, :39], k, v),
        lambda q, k, v: (q.half(), k.half(), v.half()),
        lambda q, k, v: (q[:, :2], k[:, :2], v[:, :2]),
    ],
)
def test_every_layout_is_a_key_of_its_own(package, other):
    q, k, v = tensors(4, 4, 4)
    attention._cuda(q, k, v, using="fa4")
    seen, package.calls = len(attention_fa4._direct), 0
    attention._cuda(*other(q, k, v), using="fa4")
    assert len(attention_fa4._direct) == seen + 1 and package.calls > 0


def test_options_are_part_of_the_key(package):
    q, k, v = tensors(4, 4, 4)
    for options in ({}, {"causal": True}, {"scale": 0.5}, {"key_lengths": torch.tensor([4, 5])}):
        for _ in range(2):
            out = attention._cuda(q, k, v, using="fa4", **options)
            expected = attention.reference(q, k, v, using="fa4", **options)
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert len(attention_fa4._direct) == 4


def _twice(kernel, args):
    kernel(*args)
    kernel(*args)


# what the function of another version might do
CHANGES = {
    "two launches": _twice,
    "fewer arguments": lambda kernel, args: kernel(*args[:6]),
    "a copy of q": lambda kernel, args: kernel(args[0].clone(), *args[1:]),
    "logsumexp": lambda kernel, args: kernel(*args[:4], torch.empty(1), *args[5:]),
    "a tensor of its own": lambda kernel, args: kernel(*args[:-1], (torch.zeros(1), None)),
    "no launch": lambda kernel, args: args[3].zero_(),
    "out elsewhere": lambda kernel, args: (
        kernel(*args[:3], made := torch.empty_like(args[3]), *args[4:]),
        args[3].copy_(made),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_expected_is_never_called_directly(package, change):
    package.change = CHANGES[change]
    q, k, v = tensors(4, 4, 4)
    for calls in (1, 2, 3):
        attention._cuda(q, k, v, using="fa4")
        assert package.calls == calls
    assert list(attention_fa4._direct.values()) == [None]


def test_a_kernel_that_gives_another_result_is_never_called_directly(package, caplog):
    """For instance one that their function prepares for in ways that its arguments do not show."""

    def prepared(kernel, args):
        kernel(*args)
        args[3].add_(1)

    package.change = prepared
    q, k, v = tensors(4, 4, 4)
    first = attention._cuda(q, k, v, using="fa4")
    assert "gave another result" in caplog.text
    package.calls = 0
    torch.testing.assert_close(attention._cuda(q, k, v, using="fa4"), first, rtol=0, atol=0)
    assert package.calls == 1


def test_other_versions_are_called_by_their_function(package, monkeypatch):
    monkeypatch.setattr(attention_kernels, "version_of", lambda name: "4.0.0b21")
    for calls in (1, 2):
        attention._cuda(*tensors(4, 4, 4), using="fa4")
        assert package.calls == calls
    assert not attention_fa4._direct


def test_a_package_of_another_structure_is_called_by_its_function(package):
    del package.forward.compile_cache
    package.interface._flash_attn_fwd = None
    package.cute.flash_attn_func = lambda q, k, v, **_: (q, None)
    q, k, v = tensors(4, 4, 4)
    assert attention._cuda(q, k, v, using="fa4").data_ptr() == q.data_ptr()
    assert not attention_fa4._direct


def test_gradients_addresses_and_captures_are_left_to_their_function(package, monkeypatch):
    q, k, v = tensors(4, 4, 4)
    attention._cuda(q, k, v, using="fa4")
    package.calls = 0
    odd = torch.empty(q.untyped_storage().nbytes() // 2 + 1, dtype=BF16)[1:].as_strided(q.shape, q.stride())
    assert odd.data_ptr() % 16
    odd.copy_(q)
    torch.testing.assert_close(
        attention._cuda(odd, k, v, using="fa4"), attention.reference(q, k, v, using="fa4"), rtol=0, atol=0
    )
    with torch.no_grad():
        attention._cuda(q.clone(memory_format=torch.preserve_format).requires_grad_(), k, v, using="fa4")
    assert package.calls == 2
    seen = dict(attention_fa4._direct)
    monkeypatch.setattr(attention_fa4, "_capturing", lambda: True)
    attention._cuda(*tensors(4, 4, 4, tokens=72), using="fa4")  # nothing is learned in a capture
    assert attention_fa4._direct == seen and package.calls == 3
    attention._cuda(q, k, v, using="fa4")  # but what is known is used
    assert package.calls == 3


def test_their_cache_is_theirs_again_also_after_an_error(package):
    cache = package.forward.compile_cache
    attention._cuda(*tensors(4, 4, 4), using="fa4")
    assert package.forward.compile_cache is cache

    def fails(kernel, args):
        raise RuntimeError("no compiler")

    package.change = fails
    with pytest.raises(RuntimeError, match="no compiler"):
        attention._cuda(*tensors(4, 4, 4, tokens=24), using="fa4")
    assert package.forward.compile_cache is cache and len(attention_fa4._direct) == 1


def test_calls_of_other_threads_are_not_noted(package):
    q, k, v = tensors(4, 4, 4)

    def beside(kernel, args):
        package.change = lambda kernel, args: kernel(*args)
        other = threading.Thread(target=attention_run.fa4, args=(q, k, v, False, None))
        other.start()
        other.join()
        kernel(*args)

    package.change = beside
    attention._cuda(q, k, v, using="fa4")
    assert [direct is not None for direct in attention_fa4._direct.values()] == [True]


def test_no_more_keys_are_kept_than_are_worth_it(package, monkeypatch):
    monkeypatch.setattr(attention_fa4, "MOST", 3)
    for tokens in range(16, 24):
        attention._cuda(*tensors(4, 4, 4, tokens=tokens), using="fa4")
        assert 1 <= len(attention_fa4._direct) <= 3


# -- into memory that is there ----------------------------------------------------------------------------------------


def written(case: str, key: str | None, seed: int, shift: int = 0) -> torch.Tensor:
    """The result of `into`, which is compared with the definition."""
    heads, sizes, options = CASES[case]
    q, k, v = tensors(*heads, **sizes, seed=seed)
    if shift:
        q = torch.empty(q.numel() + shift, dtype=q.dtype)[shift:].view(q.shape).copy_(q)
    expected = attention.reference(q, k, v, using="fa4", **options).transpose(1, 2)
    out = torch.full(expected.shape, float("nan"), dtype=q.dtype)
    given = dict.fromkeys(("causal", "scale", "bounded")) | options
    lengths, bounded = given.get("key_lengths"), bool(given["bounded"])
    views = [t.transpose(1, 2) for t in (q, k, v)]
    attention_fa4.into(*views, lengths, bool(given["causal"]), given["scale"], bounded, key, out)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key", [None, "a call of some graph"])
def test_into_learns_and_goes_to_the_compiled_kernel(package, monkeypatch, case, key):
    written(case, key, 0)
    package.calls = 0
    written(case, key, 1)
    assert package.calls == 0
    if key is not None:
        monkeypatch.setattr(attention_fa4, "_key", lambda *_: pytest.fail("sizes and strides were asked for"))
    package.launches = []
    out = written(case, key, 2)
    *given, made, _, _ = package.launches[-1]
    assert made.data_ptr() == out.data_ptr(), "written in place"
    assert all(t.shape[1] in (40, 50, 300) for t in given), "views [B, S, H, d]"


def test_into_with_an_address_that_is_no_vector(package):
    written("plain", "k", 0)
    written("plain", "k", 1)
    package.launches = []
    written("plain", "k", 2, shift=1)
    assert all(t.data_ptr() % 16 == 0 for t in package.launches[-1][:3])


def test_into_of_another_version(package, monkeypatch):
    monkeypatch.setattr(attention_kernels, "version_of", lambda name: "4.0.0b99")
    for seed in range(3):
        written("plain", "k", seed)
    assert package.calls == 3 and not cute_ahead.fa4_is_known()


# -- from one process to the next --------------------------------------------------------------------------------------


@pytest.fixture
def disk(package, monkeypatch):
    """What is kept of direct calls, on a GPU that has such kernels; `later()` is another process."""
    entries = {}
    monkeypatch.setattr(attention_fa4_kept, "_known", {})
    monkeypatch.setattr(attention_fa4_kept, "_serves", lambda q: True)
    monkeypatch.setattr(attention_kept, "on_disk", entries.__contains__)
    monkeypatch.setattr(attention_kept, "call", entries.get)

    def keep(kind, kernel, form):
        entries[kind] = kernel, json.loads(json.dumps(form))

    def later():
        for known in (attention_fa4_kept._known, attention_fa4._direct, attention_fa4._named, attention_fa4._compared):
            known.clear()
        package.calls, package.launches = 0, []

    monkeypatch.setattr(attention_kept, "keep_call", keep)
    return types.SimpleNamespace(entries=entries, later=later)


@pytest.mark.parametrize("case", CASES)
def test_a_later_process_calls_the_kernel_itself(package, disk, case):
    heads, sizes, options = CASES[case]
    attention._cuda(*tensors(*heads, **sizes), using="fa4", **options)
    (kind,) = disk.entries
    lengths, causal = "key_lengths" in options, options.get("causal", False)
    assert kind == attention_kept.Kind("bfloat16", 64, heads[0] // heads[1], causal, lengths)
    disk.later()
    for tokens in (sizes.get("tokens", 40), 72):  # and other sizes
        q, k, v = tensors(*heads, **{**sizes, "tokens": tokens}, seed=3)
        out = attention._cuda(q, k, v, using="fa4", **options)
        torch.testing.assert_close(out, attention.reference(q, k, v, using="fa4", **options), rtol=0, atol=0)
        assert package.launches[-1][-1] == options.get("scale", 1 / 8)
    assert package.calls == 0 and len(package.launches) == 2
    if "scale" in options:
        out = attention._cuda(q, k, v, using="fa4", scale=0.7)
        torch.testing.assert_close(out, attention.reference(q, k, v, using="fa4", scale=0.7), rtol=0, atol=0)
        assert package.calls == 0


def test_calls_of_more_than_tensors_and_the_scale_are_not_kept(package, disk):
    kernel = package.kernel

    def takes_two_more(causal):
        compiled = kernel(causal)
        return lambda *args: compiled(*args[:10])

    package.kernel = takes_two_more
    package.change = lambda kernel, args: kernel(*args[:-1], 7)
    attention._cuda(*tensors(4, 4, 4), using="fa4")
    assert len(attention_fa4._direct) == 1 and None not in attention_fa4._direct.values() and not disk.entries


def test_operands_that_a_kept_call_does_not_take(package, disk, monkeypatch):
    attention._cuda(*tensors(4, 4, 4), using="fa4")
    assert len(disk.entries) == 1
    disk.later()
    q, k, v = tensors(4, 4, 4)
    assert attention_fa4_kept.find(q, k, v, None, False, None) is not None
    for other in (
        (q, k, v[..., :32]),  # a kernel of another kind
        (q[:, :, :0], k, v),
        (q.half(), k, v),
        (q.transpose(2, 3).contiguous().transpose(2, 3), k, v),  # it has to be copied
        tensors(4, 2, 2),
    ):
        assert attention_fa4_kept.find(*other, None, False, None) is None
    assert attention_fa4_kept.find(q, k, v, None, True, None) is None
    assert attention_fa4_kept.find(q, k, v, torch.ones(2, dtype=torch.int32), False, None) is None
    monkeypatch.setattr(attention_kernels, "version_of", lambda name: "4.0.0b21")
    assert attention_fa4_kept.find(q, k, v, None, False, None) is None
    monkeypatch.undo()
    assert attention_fa4_kept.find(q, k, v, None, False, None) is None, "no such GPU"
