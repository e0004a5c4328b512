"""Masks for the tests of numbers of keys: traced alone, and what is proved of them compared with what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from dkfuse import compat
from dkfuse.seams.key_lengths import KeyLengths, prove

INF = float("-inf")
KEYS = 12


def traced(build: Callable[..., torch.Tensor], *inputs: torch.Tensor, mode: str = "fake") -> fx.GraphModule:
    """The functional ATen graph of ``build(*inputs)``, decomposed as Inductor does."""
    table = compat.decompositions()
    return make_fx(torch.func.functionalize(build), decomposition_table=table, tracing_mode=mode)(*inputs)


def mask_of(module: fx.GraphModule) -> fx.Node:
    (output,) = [n for n in module.graph.nodes if n.op == "output"]
    return output.args[0]


def proved(build: Callable[..., torch.Tensor], *inputs: torch.Tensor, batch: int, keys: int = KEYS) -> KeyLengths:
    return prove(mask_of(traced(build, *inputs)), batch, keys)


def numbers(module: fx.GraphModule, lengths: KeyLengths, *inputs: torch.Tensor) -> torch.Tensor:
    """The numbers of keys that were proved, for these inputs."""
    found: dict[str, Any] = {}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    Run(module).run(*inputs)
    return found[lengths.node.name].reshape(-1).to(torch.int64).clamp(min=lengths.low) + lengths.add


def same_mask(build: Callable[..., torch.Tensor], *calls: tuple[torch.Tensor, ...], keys: int = KEYS) -> None:
    """Assert that what is proved of a mask is what the mask is, for inputs of equal shapes, n first."""
    module, batch = traced(build, *calls[0]), calls[0][0].shape[0]
    lengths = prove(mask_of(module), batch, keys)
    for inputs in calls:
        taken = torch.arange(keys) < numbers(module, lengths, *inputs)[:, None]
        mask = build(*inputs)
        wanted = taken if mask.dtype == torch.bool else torch.where(taken, 0.0, INF).to(mask.dtype)
        whole = (batch, 2, 3, keys)
        torch.testing.assert_close(mask.expand(whole), wanted[:, None, None].expand(whole), rtol=0, atol=0)


# -- spellings: functions of n [B] and a padding mask p [B, KEYS] -----------------------------------


def arange(*how: Any, **options: Any) -> torch.Tensor:
    return torch.arange(*(how or (KEYS,)), **options)


def hunyuan(n, p):
    """HunyuanVideo: ones, filled with False behind the text that is there."""
    taken = torch.ones(n.shape[0], KEYS, dtype=torch.bool)
    behind = arange().unsqueeze(0) >= (4 + p[:, 4:].sum(dim=1, dtype=torch.int)).unsqueeze(1)
    return taken.masked_fill(behind, False).unsqueeze(1).unsqueeze(1)


def ernie(n, p):
    """ERNIE-Image: the image's keys, then those of the text that are there."""
    text = arange(8).view(1, 8) < n.view(-1, 1)
    return torch.cat([torch.ones((n.shape[0], 4), dtype=torch.bool), text], dim=1)[:, None, None, :]


def bias(mask: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.where(mask, 0.0, INF).to(dtype)


SPELLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "hunyuan": hunyuan,
    "ernie": ernie,
    "hunyuan's bias": lambda n, p: bias(hunyuan(n, p)),
    "lt": lambda n, p: (arange() < n[:, None])[:, None, None],
    "n > j": lambda n, p: (n[:, None] > arange())[:, None, None],
    "le": lambda n, p: (arange() <= n[:, None])[:, None, None],
    "n >= j": lambda n, p: (n[:, None] >= arange())[:, None, None],
    "not ge": lambda n, p: (~(arange() >= n[:, None]))[:, None, None],
    "not gt": lambda n, p: torch.logical_not(arange() > n[:, None])[:, None, None],
    "not n <= j": lambda n, p: torch.logical_not(n[:, None] <= arange())[:, None, None],
    "bitwise not": lambda n, p: torch.bitwise_not(n[:, None] < arange())[:, None, None],
    "int32 arange": lambda n, p: (arange(dtype=torch.int32) < n[:, None]).view(-1, 1, 1, KEYS),
    "cast n": lambda n, p: (arange() < n.to(torch.int32)[:, None])[:, None, None],
    "cast arange": lambda n, p: (arange().to(torch.int32) < n[:, None].int())[:, None, None],
    "n expanded": lambda n, p: (arange()[None] < n[:, None].expand(-1, KEYS))[:, None, None],
    "n of a sum": lambda n, p: (arange() < p.sum(1, keepdim=True))[:, None, None],
    "n of a float sum": lambda n, p: (arange() < p.float().sum(1).long()[:, None])[:, None, None],
    "four dims at once": lambda n, p: arange().view(1, 1, 1, -1) < n.view(-1, 1, 1, 1),
    "where": lambda n, p: torch.where((arange() < n[:, None])[:, None, None], 0.0, INF),
    "where swapped": lambda n, p: torch.where((arange() >= n[:, None])[:, None, None], INF, 0.0),
    "masked_fill of zeros": lambda n, p: torch.zeros(n.shape[0], 1, 1, KEYS).masked_fill(
        (arange() >= n[:, None])[:, None, None], INF
    ),
    "masked_fill in place": lambda n, p: torch.zeros(n.shape[0], KEYS).masked_fill_(~(arange() < n[:, None]), INF)[
        :, None, None
    ],
    "masked_fill of -inf": lambda n, p: torch.full((n.shape[0], 1, 1, KEYS), INF).masked_fill(
        (arange() < n[:, None])[:, None, None], 0.0
    ),
    "fp16": lambda n, p: bias((arange() < n[:, None])[:, None, None], torch.float16),
    "least fp32 in bf16": lambda n, p: torch.where(
        (arange() < n[:, None])[:, None, None], 0.0, torch.finfo(torch.float32).min
    ).to(torch.bfloat16),
    "expanded": lambda n, p: (arange() < n[:, None])[:, None, None].expand(-1, 2, 3, -1),
    "repeated": lambda n, p: (arange() < n[:, None])[:, None, None].repeat(1, 2, 3, 1),
    "transposed twice": lambda n, p: (arange()[:, None] < n[None]).t()[:, None, None],
    "a longer one cut": lambda n, p: (arange(20) < n[:, None])[:, :KEYS][:, None, None],
    "arange cut": lambda n, p: (arange(20)[:KEYS] < n[:, None])[:, None, None],
    "padded in front": lambda n, p: torch.nn.functional.pad(arange(8) < n[:, None], (4, 0), value=True)[:, None, None],
    "and with all": lambda n, p: (arange() < n[:, None])[:, None, None] & torch.ones(1, 1, 1, KEYS, dtype=torch.bool),
    "and with itself": lambda n, p: ((arange() < n[:, None]) & ~(arange() >= n[:, None]))[:, None, None],
    "or nothing": lambda n, p: (arange() < n[:, None])[:, None, None] | torch.zeros((), dtype=torch.bool),
    "aligned": lambda n, p: torch.nn.functional.pad(bias(arange() < n[:, None]), (0, 4))[..., :KEYS][:, None, None],
    "one n for all": lambda n, p: (arange() < n[0])[None, None, None],
}

NEAR_MISSES: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str]] = {
    "an input": (lambda n, p: p[:, None, None].bool(), "an input"),
    "an input as bias": (lambda n, p: bias(p[:, None, None].bool()), "an input"),
    "padded input": (lambda n, p: torch.nn.functional.pad(p[:, :8].bool(), (4, 0), value=True)[:, None, None], "input"),
    "causal": (lambda n, p: arange()[None, None, None] <= arange()[None, None, :, None], "query"),
    "per query": (lambda n, p: arange() < n[:1].view(1, 1, 1, 1) + arange(3).view(1, 1, 3, 1), "query"),
    "per head": (lambda n, p: arange() < (n[:1] + arange(2))[None, :, None, None], "head"),
    "both of query and key": (
        lambda n, p: (lambda m: m & m.transpose(2, 3))(
            (arange() < n[:, None])[:, None, None].expand(-1, 1, KEYS, KEYS)
        ),
        "more than one dim",
    ),
    "suffix": (lambda n, p: (arange() >= n[:, None])[:, None, None], "choice of keys"),
    "suffix as bias": (lambda n, p: bias((arange() > n[:, None])[:, None, None]), "choice of keys"),
    "float n": (lambda n, p: (arange() < n.float()[:, None])[:, None, None], "float32"),
    "float arange": (lambda n, p: (arange(dtype=torch.float32) < n[:, None])[:, None, None], "neither"),
    "narrow arange": (lambda n, p: (arange().to(torch.int8) < n[:, None])[:, None, None], "int8"),
    "start": (lambda n, p: (arange(1, KEYS + 1) <= n[:, None])[:, None, None], "counts from 1"),
    "step": (lambda n, p: (arange(0, 2 * KEYS, 2) < n[:, None])[:, None, None], "steps of 2"),
    "backwards": (lambda n, p: (arange(KEYS - 1, -1, -1) < n[:, None])[:, None, None], "counts from 11"),
    "arange cut in front": (lambda n, p: (arange(KEYS + 2)[2:] < n[:, None])[:, None, None], "neither is an arange"),
    "mask cut in front": (lambda n, p: (arange(KEYS + 2) < n[:, None])[:, 2:][:, None, None], "first key"),
    "every other key": (lambda n, p: (arange(2 * KEYS) < n[:, None])[:, ::2][:, None, None], "first key"),
    "another arange": (lambda n, p: (arange() + 1 < n[:, None])[:, None, None], "neither is an arange"),
    "flipped": (lambda n, p: (arange() < n[:, None]).flip(1)[:, None, None], "flip|neither|rev"),
    "wrong dim": (lambda n, p: (arange()[:, None] < n[:1])[None, None].expand(-1, -1, -1, KEYS), "query"),
    "number known": (lambda n, p: (arange() < 7)[None, None, None], "the same for every sample"),
    "two numbers": (
        lambda n, p: ((arange() < n[:, None]) & (arange() < p.sum(1)[:, None]))[:, None, None],
        "different",
    ),
    "scaled": (lambda n, p: bias((arange() < n[:, None])[:, None, None]) * 2, "mul"),
    "minus 10000": (lambda n, p: (1 - (arange() < n[:, None]).float())[:, None, None] * -10000.0, "mul"),
    "finite": (
        lambda n, p: torch.where((arange() < n[:, None])[:, None, None], 0.0, torch.finfo(torch.float32).min),
        "choice of keys",
    ),
    "biased keys": (lambda n, p: torch.where((arange() < n[:, None])[:, None, None], 1.0, INF), "choice of keys"),
    "as numbers": (lambda n, p: (arange() < n[:, None])[:, None, None].float(), "choice of keys"),
    "all keys": (lambda n, p: torch.ones(1, 1, 1, KEYS, dtype=torch.bool), "every key"),
    "no key in front": (
        lambda n, p: torch.nn.functional.pad(arange(8) < n[:, None], (4, 0), value=False)[:, None, None],
        "do not take part",
    ),
    "keys behind": (
        lambda n, p: torch.cat([arange(8) < n[:, None], torch.ones(n.shape[0], 4, dtype=torch.bool)], 1)[:, None, None],
        "no join",
    ),
    "twice": (lambda n, p: (arange(6) < n[:, None]).repeat(1, 2)[:, None, None], "repeat"),
    "twice, by reshape": (
        lambda n, p: (arange(6) < n[:, None])[:, None].expand(-1, 2, -1).reshape(-1, KEYS)[:, None, None],
        "says nothing",
    ),
    "one key's": (lambda n, p: (arange(1) < n[:, None])[:, None, None].expand(-1, 1, 1, KEYS), "."),
    "first sample's": (
        lambda n, p: (arange() < n[:, None])[:1][:, None, None].expand(2, 1, 1, KEYS),
        "one sample|part",
    ),
    "samples and keys at once": (lambda n, p: (arange() < n.repeat(6))[None, None, None], "at once"),
    "of a row": (lambda n, p: (arange() < n[:, None]).select(0, 1)[None, None, None], "says nothing"),
    "changed in part": (lambda n, p: hunyuan(n, p).slice_scatter(torch.ones(2, 1, 1, 2).bool(), 3, 0, 2), "scatter"),
    "more keys": (lambda n, p: (arange(KEYS + 1) < n[:, None])[:, None, None], "does not count"),
}
