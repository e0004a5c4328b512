"""What a bench of models found. Plain data; as JSON under schema "dkfuse.bench.model/1":

    {schema, torch, device, date,
     models: [{model, batch, layers, mode, pack, attention, reference, note,
               coverage: {sites, fused, ..., kernels},
               sides: {NAME: {split: {gemm, attention, dkfuse, inductor, copy, other}, gpu, glue, wall, cpu, launches,
                              compile_cold, compile_warm, peak_gib, error, kernels: {NAME: ms}}},
               ratios: {RIVAL: {gemm, attention, glue, gpu, wall, cpu, compile_cold, compile_warm, peak_gib, error}},
               gains: {RIVAL: {glue, gemm, attention, total, speedup}},
               plain: {ratios: {...}, gain: {...}},
               sites: [{op, kernel, shapes, sites, microseconds, bytes, of_copy, shared}]}]}

Sides are "dkfuse" and its rivals. Times are medians: `split`, `gpu`, `glue`, `wall` and `cpu` in ms per forward,
`compile_*` in s. `cpu` is null where the launch queue may have been full. `error` is ||out - ref|| / ||ref|| against
`reference`, "fp32" or "eager". A ratio is dkfuse / rival, less is better; a gain is the share of the rival's GPU time
that dkfuse saves, by where it is saved; the three add up to `total`. `plain`, where that side ran, is the same of it
against the first rival. `of_copy` is the time of a copy of the same bytes
by the site's time.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .averages import ratio
from .classify import ATTENTION, GEMM, GLUE, KINDS

SCHEMA = "dkfuse.bench.model/1"
OURS = "dkfuse"
PLAIN = "plain"
INDUCTOR = ("inductor", "max-autotune")
COMPARED = ("gemm", "attention", "glue", "gpu", "wall", "cpu", "compile_cold", "compile_warm", "peak_gib", "error")


@dataclass
class Side:
    """One way of running one model; see the module's docstring for units."""

    split: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    wall: float = 0.0
    cpu: float | None = None
    launches: int = 0
    compile_cold: float | None = None
    compile_warm: float | None = None
    peak_gib: float = 0.0
    error: float | None = None
    kernels: dict[str, float] = field(default_factory=dict)

    @property
    def gemm(self) -> float:
        return self.split.get(GEMM, 0.0)

    @property
    def attention(self) -> float:
        return self.split.get(ATTENTION, 0.0)

    @property
    def glue(self) -> float:
        """GPU time that is neither GEMM nor attention."""
        return math.fsum(self.split.get(kind, 0.0) for kind in GLUE)

    @property
    def gpu(self) -> float:
        """GPU time: the sum of all kernels."""
        return math.fsum(self.split.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gpu": self.gpu, "glue": self.glue}


@dataclass
class SiteTime:
    """Fused sites of one op, kernel and shapes. Microseconds and bytes are of one site.

    shared: the launches of this op serve several sites each, so that its time was shared out by bytes.
    """

    op: str
    kernel: str
    shapes: dict[str, list[int | str]]
    sites: int
    microseconds: float
    bytes: int
    of_copy: float
    shared: bool = False


@dataclass
class ModelResult:
    """One model with all its sides, "dkfuse" first."""

    model: str
    sides: dict[str, Side]
    batch: int = 1
    layers: int | None = None
    mode: str | None = None
    pack: bool = False
    attention: str | None = None
    reference: str = "fp32"
    note: str | None = None  # why the reference is not fp32, what the model's function raised
    coverage: dict[str, Any] = field(default_factory=dict)
    sites: list[SiteTime] = field(default_factory=list)

    @property
    def rivals(self) -> list[str]:
        """The sides to compare with: the first that was asked for and, of Inductor's two, the faster if both ran."""
        others = [name for name in self.sides if name != OURS]
        shown = others[:1]
        both = [name for name in others if name in INDUCTOR]
        if len(both) == len(INDUCTOR):
            best = min(both, key=lambda name: self.sides[name].gpu)
            shown += [best] if best not in shown else []
        return shown

    def ratios(self, rival: str, side: str = OURS) -> dict[str, float | None]:
        """dkfuse / rival, less is better."""
        ours, theirs = self.sides[side], self.sides[rival]
        return {name: ratio(getattr(ours, name), getattr(theirs, name)) for name in COMPARED}

    def gain(self, rival: str, side: str = OURS) -> dict[str, float]:
        """The share of the rival's GPU time that dkfuse saves, by where, and rival / dkfuse as `speedup`."""
        ours, theirs = self.sides[side], self.sides[rival]
        parts = {part: (getattr(theirs, part) - getattr(ours, part)) for part in ("glue", "gemm", "attention")}
        gain = {part: saved / theirs.gpu if theirs.gpu else 0.0 for part, saved in parts.items()}
        return {**gain, "total": math.fsum(gain.values()), "speedup": ratio(theirs.gpu, ours.gpu) or 0.0}

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["sides"] = {name: side.to_dict() for name, side in self.sides.items()}
        others = [name for name in self.sides if name != OURS]
        data["ratios"] = {name: self.ratios(name) for name in others}
        data["gains"] = {name: self.gain(name) for name in others}
        if PLAIN in self.sides and self.rivals[0] != PLAIN:
            data["plain"] = {"ratios": self.ratios(self.rivals[0], PLAIN), "gain": self.gain(self.rivals[0], PLAIN)}
        return data


def report(results: Sequence[ModelResult], device: str) -> dict[str, Any]:
    """Everything, in the layout of the schema."""
    import torch

    head = {"schema": SCHEMA, "torch": torch.__version__, "device": device, "date": today()}
    return {**head, "models": [result.to_dict() for result in results]}


def today() -> str:
    return datetime.date.today().isoformat()
