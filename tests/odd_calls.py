"""Calls at which a kernel that reads or writes too much leaves an allocation: odd sizes, views that end with a buffer.

A tensor is dense, or a view whose last element is its buffer's last (`at_end`). Row counts are 1, 3 and 257, most
widths no powers of two. Everything is made on the CPU; `moved` takes a call to a device, buffers and layouts included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dkfuse.kernels.failures import defaults
from dkfuse.kernels.support import OPERANDS

from .rope_calls import call_of, random, tables

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
IN_PLACE = ("triton", "cuda", "native")  # providers whose norm_rope may write where it reads


@dataclass(frozen=True)
class OddCall:
    """One call of `op`. make: its arguments and, where they are not plain new tensors, its outputs."""

    op: str
    name: str
    make: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]
    providers: tuple[str, ...] | None = None  # None: all that take it

    def build(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Arguments with their defaults, and an output for every result, full of NaN."""
        given, outputs = self.make()
        arguments = {**defaults(self.op), **given}
        for name in OPERANDS[self.op][2]:
            dtype = arguments["sum_dtype"] if name == "sum" else arguments["out_dtype"]
            if name not in outputs and dtype is not None:
                outputs[name] = torch.full(arguments["x"].shape, float("nan"), dtype=dtype)
        return arguments, outputs


def calls(provider: str) -> Iterator[OddCall]:
    """The calls that a provider's kernels take."""
    from dkfuse.kernels.registry import find

    for call in CALLS:
        implementation = find(provider, call.op)
        allowed = call.providers is None or provider in call.providers
        if implementation is not None and allowed and implementation.problem(call.build()[0]) is None:
            yield call


def moved(values: dict[str, Any], device: str, buffers: dict[int, Tensor]) -> dict[str, Any]:
    """`values` on `device`; each buffer is copied once, so that what shares memory still does."""

    def move(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in buffers:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
            buffers[storage.data_ptr()] = whole.to(device, copy=True)
        whole = buffers[storage.data_ptr()]
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return {name: move(value) if isinstance(value, Tensor) else value for name, value in values.items()}


def at_end(*size: int, pad: int = 8, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """Rows that lie `pad` elements apart, the last one at the buffer's end."""
    return random(*size[:-1], pad + size[-1], dtype=dtype, seed=seed)[..., pad:]


def shifted(*size: int, by: int = 1, dtype: torch.dtype = BF16) -> Tensor:
    """Dense, from `by` elements behind the buffer's start to its end: at no address that vectors need."""
    return random(*size, dtype=dtype).new_zeros(by + torch.Size(size).numel())[by:].view(size).copy_(random(*size))


def joint(batch: int, start: int, tokens: int, *row: int, dtype: torch.dtype = BF16) -> Tensor:
    """The last `tokens` of a joint tensor, full of NaN."""
    return torch.full((batch, start + tokens, *row), float("nan"), dtype=dtype)[:, start:]


def vectors(count: int, batch: int, width: int, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    """`count` modulation vectors [batch, 1, width], pieces of one; the last one ends with it."""
    return random(batch, 1, count * width, dtype=dtype, seed=3).chunk(count, dim=-1)


def norm(x: Tensor, kind: str = "layer", **more: Any) -> dict[str, Any]:
    return {"x": x, "norm": kind, "eps": 1e-6, "out_dtype": x.dtype, **more}


def added(x: Tensor, kind: str = "layer", **more: Any) -> dict[str, Any]:
    residual = random(*x.shape, dtype=x.dtype, seed=7)
    return norm(x, kind, **{"residual": residual, "sum_dtype": x.dtype, **more})


def rms_rows() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return norm(random(257, 72), "rms", weight=random(72)), {}


def rms_shifted() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return norm(shifted(1, 3, 1160), "rms", weight=shifted(1160)), {"out": joint(1, 4, 3, 1160)}


def modulated() -> tuple[dict[str, Any], dict[str, Tensor]]:
    scale, _, shift = vectors(3, 2, 1160)
    affine = {"weight": random(1160, dtype=FP32), "bias": random(1160, dtype=FP32, seed=1)}
    return norm(at_end(2, 3, 1160), scale=scale, shift=shift, **affine), {}


def odd_width() -> tuple[dict[str, Any], dict[str, Tensor]]:
    scale = random(1, 1, 1003, 6, dtype=FP32)[..., 5]
    return norm(at_end(1, 257, 1003, pad=1), scale=scale, shift=random(), bias=random(1003)), {}


def longest_rows() -> tuple[dict[str, Any], dict[str, Tensor]]:
    x = random(1, 3, 16384, dtype=FP32)
    return norm(x, scale=random(16384), shift=random(1, 3, 16384, dtype=FP16)), {}


def narrowest_rows() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return norm(random(257, 1, dtype=FP16), "rms", weight=random(1)), {}


def _two_rows(names: str, width: int) -> dict[str, Any]:
    """Pairs of vectors of 2 samples, and the mask of the 3 tokens that take the first."""
    pairs = random(4, 1, len(names.split()) * width).reshape(2, 2, 1, -1).chunk(len(names.split()), -1)
    return {**dict(zip(names.split(), pairs, strict=True)), "pick": random(2, 3, 1, seed=8) > 0}


def picked_rows() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return norm(at_end(2, 3, 72), **_two_rows("scale shift", 72)), {}


def rows_by_number() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of three rows the last ends where the memory does, and so do the numbers."""
    scale, shift = at_end(3, 1, 2 * 72).chunk(2, -1)
    numbers = torch.tensor([[2], [0], [2], [1], [2]]).to(scale.device)
    return norm(at_end(5, 72), scale=scale, shift=shift, pick=numbers), {}


def added_rms() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return added(random(1, 257, 1160), "rms", weight=random(1160)), {"sum": joint(1, 5, 257, 1160)}


def added_shifted() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return added(shifted(1, 3, 1160), "rms", weight=shifted(1160), residual=shifted(1, 3, 1160, by=3)), {}


def added_modulated() -> tuple[dict[str, Any], dict[str, Tensor]]:
    gate, scale, shift = vectors(3, 2, 1160)
    x, residual = at_end(2, 3, 1160), random(3, 2, 1160).transpose(0, 1)
    outputs = {"out": joint(2, 3, 3, 1160), "sum": joint(2, 1, 3, 1160)}
    return added(x, residual=residual, gate=gate, scale=scale, shift=shift), outputs


def added_branches() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The second branch in the place of a bias: rows with gaps, in another order than the first's."""
    gate, scale, shift = (row.expand(2, 3, 1003) for row in vectors(3, 2, 1003))
    second = random(3, 2, 1010).transpose(0, 1)[..., :1003]
    return added(at_end(2, 3, 1003, pad=3), gate=gate, scale=scale, shift=shift, branch_bias=second), {}


def sandwich() -> tuple[dict[str, Any], dict[str, Tensor]]:
    branch = {"branch_norm": "rms", "branch_eps": 1e-5, "branch_weight": random(1003), "branch_bias": random(1003)}
    (gate,) = vectors(1, 2, 1003, FP32)
    return added(at_end(2, 3, 1003, pad=3), "rms", gate=gate, sum_dtype=None, **branch), {}


def dual() -> tuple[dict[str, Any], dict[str, Tensor]]:
    names = ("scale", "shift", "scale2", "shift2")
    return norm(at_end(1, 257, 1160), **dict(zip(names, vectors(4, 1, 1160), strict=True))), {}


def added_dual() -> tuple[dict[str, Any], dict[str, Tensor]]:
    pairs = _two_rows("gate scale shift scale2 shift2", 1003)
    return added(at_end(2, 3, 1003, pad=5), branch_bias=random(1003), **pairs), {"out2": joint(2, 2, 3, 1003)}


def gated() -> tuple[dict[str, Any], dict[str, Tensor]]:
    x, residual = random(5, 3, 2, 1003).permute(2, 1, 0, 3), at_end(2, 3, 5, 1003)
    more = {"gate": random(2, 1, 5, 1003), "branch_bias": random(1003, dtype=FP32)}
    return {"x": x, "residual": residual, "out_dtype": FP32, **more}, {}


def gated_picked() -> tuple[dict[str, Any], dict[str, Tensor]]:
    pairs = _two_rows("gate", 72)
    return {"x": at_end(2, 3, 72, pad=3), "residual": at_end(2, 3, 72), "out_dtype": BF16, **pairs}, {}


def scaled() -> tuple[dict[str, Any], dict[str, Tensor]]:
    scale, shift = random(3, 2, 1003).transpose(0, 1), at_end(1, 3, 1003)
    return {"x": shifted(2, 3, 1003, by=3), "scale": scale, "shift": shift, "out_dtype": FP16}, {}


def rope(x: Tensor, kind: str = "rms", **more: Any) -> dict[str, Any]:
    return call_of(x, norm=kind, eps=1e-6 if kind != "none" else 0.0, **more)


def packed() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """v's place in a packed projection, for 3 heads of the smallest dim that every kernel has."""
    x = random(2, 257, 3, 3, 64)[:, :, 2]
    out = torch.full((2, 3, 257, 64), float("nan"), dtype=BF16).transpose(1, 2)
    return rope(x, weight=random(64), **tables("half", 64, 257, 1)), {"out": out}


def widest_heads() -> tuple[dict[str, Any], dict[str, Tensor]]:
    part = tables("full", 32, 3, 1, rotation="half")
    return rope(at_end(1, 3, 1, 1024), "layer", weight=random(1024), bias=random(1024, dtype=FP32), **part), {}


def smallest_heads() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return rope(random(1, 257, 3, 2), weight=random(2), **tables("half", 2, 257, 1, rotation="half")), {}


def matrices() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return rope(at_end(2, 3, 5, 40), norm_last=True, **tables("matrix", 24, 3, 1, dtype=FP64)), {}


def complex_tables() -> tuple[dict[str, Any], dict[str, Tensor]]:
    x = random(1, 5, 257, 128, dtype=FP16).transpose(1, 2)
    return rope(x, weight=random(128), **tables("complex", 128, 257, 1)), {}


def per_head_tables() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return rope(shifted(2, 3, 5, 256), "none", **tables("full", 96, 2, 3, 5, dtype=BF16, rotation="half")), {}


def across_heads() -> tuple[dict[str, Any], dict[str, Tensor]]:
    x, out = at_end(1, 257, 9 * 72).unflatten(-1, (9, 72)), joint(1, 3, 257, 9, 72)
    return rope(x, weight=random(9, 72), across=2, **tables("half", 72, 257, 1)), {"out": out}


def across_halves() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return rope(random(1, 1, 3, 88), "layer", across=2, **tables("full", 88, 1, 1, rotation="half")), {}


def rotation_alone() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return rope(random(2, 257, 3, 64), "none", **tables("half", 64, 257, 1)), {"out": joint(2, 7, 257, 3, 64)}


def part_of_wide_heads() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return rope(random(3, 5, 512), "none", **tables("half", 32, 3, 1, rotation="half")), {}


def one_row() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return rope(random(1, 1, 1, 2048), across=2, weight=shifted(2048, by=8), **tables("full", 2048, 1, 1)), {}


def in_place() -> tuple[dict[str, Any], dict[str, Tensor]]:
    x = random(1, 257, 2 * 3 * 64)[..., 192:].unflatten(-1, (3, 64))
    return rope(x, weight=random(64), **tables("half", 64, 257, 1)), {"out": x}


_MAKERS = {
    "norm_modulate": (
        rms_rows,
        rms_shifted,
        modulated,
        odd_width,
        longest_rows,
        narrowest_rows,
        picked_rows,
        rows_by_number,
    ),
    "residual_norm_modulate": (added_rms, added_shifted, added_modulated, added_branches, sandwich),
    "norm_modulate_dual": (dual,),
    "residual_norm_modulate_dual": (added_dual,),
    "gated_residual": (gated, gated_picked),
    "scale_shift": (scaled,),
    "norm_rope": (
        *(packed, widest_heads, smallest_heads, matrices, complex_tables, per_head_tables),
        *(across_heads, across_halves, rotation_alone, part_of_wide_heads, one_row, in_place),
    ),
}
CALLS: tuple[OddCall, ...] = tuple(
    OddCall(op, make.__name__, make, IN_PLACE if make is in_place else None)
    for op, makers in _MAKERS.items()
    for make in makers
)
