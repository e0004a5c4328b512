"""The kernel benchmark's QK norms and rotations: shapes, tables and spellings as the models have them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Launching

BF16 = torch.bfloat16
CHECKED_ROWS = 256  # of each stream


@dataclass(frozen=True)
class RopeCase:
    """Norm and rotation of `projections` (q, or q and k) of one or several streams, which are joined along the tokens.

    norm: "once" rounds once, behind the weight, "twice" before it too, "none". across: over all heads. flat: the
    rotation is over heads * d columns, before the split into heads. tables: of the op; fp32.
    """

    name: str
    lengths: tuple[int, ...]
    heads: int
    d: int
    norm: str = "once"
    across: bool = False
    flat: bool = False
    rotation: str = "interleaved"
    tables: str = "full"
    projections: int = 1
    batch: int = 1
    op: str = "norm_rope"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one result."""
        return (self.batch, sum(self.lengths), *self._row)

    @property
    def _row(self) -> tuple[int, ...]:
        return (self.heads * self.d,) if self.flat else (self.heads, self.d)

    def inputs(self, seed: int) -> dict[str, Tensor]:
        """Random projections "x{projection}{stream}" and weights "w..", tables "cos" and "sin" of angles."""
        generator = torch.Generator("cuda").manual_seed(seed)
        operands: dict[str, Tensor] = {}
        for key, length, _ in self._parts():
            size = (self.batch, length, self.heads * self.d)
            operands[f"x{key}"] = torch.randn(size, device="cuda", generator=generator).to(BF16)
            if self.norm != "none":
                width = self.heads * self.d if self.across or self.flat else self.d
                operands[f"w{key}"] = 1 + torch.randn(width, device="cuda", generator=generator).to(BF16) / 8
        if self.rotation == "none":
            return operands
        tokens, columns = self.shape[1], self._row[-1]
        angles = torch.outer(
            torch.arange(tokens, device="cuda").float(), 1e4 ** -torch.linspace(0, 1, columns // 2, device="cuda")
        )
        angles = angles[None] if self.flat else angles[None, :, None]
        cos, sin = angles.cos(), angles.sin()
        if self.tables == "complex":
            return {**operands, "cos": torch.stack((cos, sin), -1).flatten(-2)}
        if self.tables == "full":
            twice: Any = functools.partial(torch.repeat_interleave, repeats=2, dim=-1)
            cos, sin = (twice(t) if self.rotation == "interleaved" else torch.cat((t, t), -1) for t in (cos, sin))
        return {**operands, "cos": cos, "sin": sin}

    def _parts(self) -> list[tuple[str, int, int]]:
        """(projection and stream, tokens, first token), stream by stream."""
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        return [
            (f"{p}{s}", length, start)
            for s, (length, start) in enumerate(zip(self.lengths, starts, strict=True))
            for p in range(self.projections)
        ]

    def arguments(self, operands: dict[str, Tensor], key: str, start: int, length: int) -> dict[str, Any]:
        """One call of the op."""
        weight = operands.get(f"w{key}")
        arguments: dict[str, Any] = {
            "x": operands[f"x{key}"].unflatten(-1, self._row),
            "weight": weight.unflatten(0, self._row) if weight is not None and self.across else weight,
            "norm": "rms" if self.norm != "none" else "none",
            "eps": 1e-6,
            "across": 2 if self.across else None,
            "out_dtype": BF16,
        }
        if self.rotation != "none":
            arguments.update(rotation=self.rotation, tables=self.tables)
            arguments.update((n, operands[n][:, start : start + length]) for n in ("cos", "sin") if n in operands)
        return arguments

    def calls(
        self, operands: dict[str, Tensor]
    ) -> tuple[list[tuple[dict[str, Any], dict[str, Tensor]]], tuple[Tensor, ...]]:
        """(arguments, outputs) of every call of the op, one per projection and stream, and the joint results."""
        results = tuple(torch.empty(self.shape, device="cuda", dtype=BF16) for _ in range(self.projections))
        calls = [
            (self.arguments(operands, key, start, n), {"out": results[int(key[0])][:, start : start + n]})
            for key, n, start in self._parts()
        ]
        return calls, results

    @property
    def size(self) -> tuple[int, int]:
        """Rows that are normed, and their width."""
        whole = self.across or self.flat
        rows = self.projections * self.batch * sum(self.lengths)
        return (rows, self.heads * self.d) if whole else (rows * self.heads, self.d)

    def launch(self, operands: dict[str, Tensor]) -> Launching:
        """One launch for all projections and streams, each writing its part of the joint results."""
        from dkfuse.kernels.rope_launch import Call, candidates, plan_group

        results = tuple(torch.empty(self.shape, device="cuda", dtype=BF16) for _ in range(self.projections))
        calls, tensors, alias = [], {}, {}
        for i, (key, length, start) in enumerate(self._parts()):
            arguments, out = self.arguments(operands, key, start, length), results[int(key[0])]
            calls.append(Call(arguments, out[:, start : start + length], start * out.stride(1)))
            tensors.update({f"{i}.{name}": value for name, value in {**arguments, "out": out}.items()})
            first = i - i % self.projections
            if i != first:
                alias.update({f"{i}.{n}": f"{first}.{n}" for n in ("cos", "sin") if n in arguments})
            if i >= self.projections:
                alias[f"{i}.out"] = f"{i % self.projections}.out"
        return Launching(
            lambda config: plan_group(calls, alias=alias, config=config), lambda: candidates(calls), tensors, results
        )

    def launcher(self, operands: dict[str, Tensor], config: Any = None) -> Callable[[], tuple[Tensor, ...]]:
        """A call that launches it, planned once."""
        return self.launch(operands).caller(config)

    def checked(self, results: Sequence[Tensor]) -> list[Tensor]:
        """The rows whose error is measured, of every stream."""
        return [results[int(key[0])][:, start : start + CHECKED_ROWS] for key, _, start in self._parts()]

    def reference(self, operands: dict[str, Tensor]) -> list[Tensor]:
        """The op in fp64 on the checked rows."""
        from dkfuse.kernels.ops import reference_outputs
        from dkfuse.kernels.rope_support import with_defaults

        results = []
        for key, length, start in self._parts():
            cut = {**operands, f"x{key}": operands[f"x{key}"][:, :CHECKED_ROWS]}
            arguments = with_defaults(self.arguments(cut, key, start, min(length, CHECKED_ROWS)))
            results.append(reference_outputs("norm_rope", arguments, compute=torch.float64)["out"])
        return results

    def eager(self) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
        """The same as the model's own code spells it: norm, cat, rotation."""
        return functools.partial(_eager, self)

    def traffic(self, operands: dict[str, Tensor]) -> int:
        """Bytes that any implementation must move: inputs, results and tables once, weights not counted."""
        rows = sum(2 * t.numel() * t.element_size() for n, t in operands.items() if n.startswith("x"))
        return rows + sum(operands[n].numel() * 4 for n in ("cos", "sin") if n in operands)


def _eager(case: RopeCase, operands: dict[str, Tensor]) -> tuple[Tensor, ...]:
    results = []
    for p in range(case.projections):
        parts = []
        for s in range(len(case.lengths)):
            x, weight = operands[f"x{p}{s}"], operands.get(f"w{p}{s}")
            if not case.across and not case.flat:
                x = x.unflatten(-1, (case.heads, case.d))
            if case.norm == "once":
                x = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
            elif case.norm == "twice":
                x = F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(BF16) * weight
            parts.append(x.unflatten(-1, (case.heads, case.d)) if case.across else x)
        x = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        results.append(_rotate(case, x, operands) if case.rotation != "none" else x)
    return tuple(results)


def _rotate(case: RopeCase, x: Tensor, operands: dict[str, Tensor]) -> Tensor:
    cos = operands["cos"]
    if case.tables == "complex":
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.view_as_complex(cos.unflatten(-1, (-1, 2)))).flatten(-2).type_as(x)
    sin = operands["sin"]
    if case.tables == "half":
        first, second, out = x[..., ::2], x[..., 1::2], torch.empty_like(x)
        out[..., ::2] = first * cos - second * sin
        out[..., 1::2] = first * sin + second * cos
        return out
    if case.rotation == "half":
        first, second = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
        turned = torch.cat((-second, first), -1)
    else:
        first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack((-second, first), -1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


@functools.cache
def has_flashinfer() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def flashinfer_calls(case: RopeCase, sets: list[dict[str, Tensor]]) -> list[Callable[[], Any]] | None:
    """FlashInfer's in-place RoPE on q and k of this shape, where it applies; without norm and cat, which it lacks."""
    applies = case.projections == 2 and case.rotation != "none" and case.tables != "complex" and not case.flat
    if not applies or not has_flashinfer():
        return None
    rope = importlib.import_module("flashinfer.rope").apply_rope_with_cos_sin_cache_inplace
    tokens, pairs = case.shape[1], case.d // 2
    positions = torch.arange(tokens, device="cuda").repeat(case.batch)
    step = 2 if case.tables == "full" and case.rotation == "interleaved" else 1
    table = torch.cat([sets[0][n].reshape(tokens, -1)[:, ::step][:, :pairs] for n in ("cos", "sin")], -1).contiguous()

    def joint(operands: dict[str, Tensor], p: int) -> Tensor:
        parts = [operands[f"x{p}{s}"] for s in range(len(case.lengths))]
        return torch.cat(parts, 1).flatten(0, 1)

    pairs_of = [(joint(operands, 0), joint(operands, 1)) for operands in sets]
    return [functools.partial(rope, positions, q, k, case.d, table, case.rotation == "half") for q, k in pairs_of]


ROPE_CASES: tuple[RopeCase, ...] = (
    RopeCase("Flux image", (4096,), 24, 128),
    RopeCase("40 heads, video", (32760,), 40, 128),
    RopeCase("q and k", (4096,), 24, 128, projections=2),
    RopeCase("Flux joint q and k", (512, 4096), 24, 128, projections=2),
    RopeCase("RoPE alone, q and k", (4096,), 24, 128, norm="none", projections=2),
    RopeCase("RoPE alone, q and k, video", (32760,), 40, 128, norm="none", tables="half", projections=2),
    RopeCase("Wan-14B across heads", (32760,), 40, 128, across=True, tables="half"),
    RopeCase("Wan-1.3B across heads", (32760,), 12, 128, across=True, tables="half"),
    RopeCase("LTX flat", (8064,), 16, 128, flat=True),
    RopeCase("Qwen-Image complex", (4096,), 24, 128, norm="twice", tables="complex"),
    RopeCase("NeoX halves", (4096,), 24, 128, rotation="half"),
    RopeCase("SD3.5-L norm alone", (4096,), 38, 64, norm="twice", rotation="none", batch=2),
)
