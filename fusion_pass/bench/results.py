"""What a bench of models found. Plain data; as JSON under schema "dkfuse.bench.model/1":

    {schema, torch, device, date, versions: {PACKAGE: version},
     models: [{model, batch, layers, depth, size, dtype, mode, pack, attention, reference, note,
               coverage: {sites, fused, ..., kernels},
               sides: {NAME: {split: {gemm, attention, dkfuse, inductor, copy, other}, gpu, glue, wall, loop, cpu,
                              launches, compile_cold, compile_warm, peak_gib, error, kernels: {NAME: ms}}},
               ratios: {RIVAL: {gemm, attention, glue, gpu, wall, loop, cpu, compile_cold, compile_warm, peak_gib,
                               error}},
               gains: {RIVAL: {glue, gemm, attention, total, speedup}},
               plain: {ratios: {...}, gain: {...}},
               better: {side, gain: {...}, plain: {...}},
               sites: [{op, kernel, shapes, sites, microseconds, bytes, of_copy, shared}]}]}

`layers` is --layers, `depth` the blocks of each stack that this made. Sides are "dkfuse" and its rivals. Times are
medians: `split`, `gpu`, `glue`, `wall`, `loop` and `cpu` in ms per forward, `compile_*` in s. `wall` is of a forward on
an idle GPU, `loop` of one among others without a pause. `cpu` is null where the launch queue may have been full.
`error` is ||out - ref|| / ||ref|| against `reference`, "fp32" or "eager". A ratio is dkfuse / rival, less is better; a
gain is the share of the rival's GPU time that dkfuse saves, by where it is saved; the three add up to `total`. `plain`,
where that side ran, is the same of it against the first rival. `better`, where Inductor's default mode and max-autotune
both ran, is the gain over the one of them that took less GPU time, and that of `plain`, if it ran. `of_copy` is the
time of a copy of the same bytes by the site's time.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dkfuse.kernels.packages import installed

from .averages import ratio
from .classify import ATTENTION, GEMM, GLUE, KINDS

SCHEMA = "dkfuse.bench.model/1"
OURS = "dkfuse"
PLAIN = "plain"
INDUCTOR = ("inductor", "max-autotune")
COMPARED = (
    *("gemm", "attention", "glue", "gpu", "wall", "loop", "cpu"),
    *("compile_cold", "compile_warm", "peak_gib", "error"),
)


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
    loop: float | None = None

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
    """Fused sites of one op, kernel and shapes. Microseconds of a forward and bytes of a launch are of one site.

    shared: this op has not one launch a site, so that its time was shared out by bytes.
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
    depth: tuple[int, ...] = ()
    size: str = "full"
    dtype: str = "bf16"
    reference: str = "fp32"
    note: str | None = None  # why the reference is not fp32, what the model's function raised
    coverage: dict[str, Any] = field(default_factory=dict)
    sites: list[SiteTime] = field(default_factory=list)

    @property
    def rivals(self) -> list[str]:
        """The sides to compare with: the first that was asked for and, of Inductor's two, the faster if both ran."""
        shown = [name for name in self.sides if name != OURS][:1]
        return shown + [name for name in (self.better,) if name is not None and name not in shown]

    @property
    def better(self) -> str | None:
        """Of Inductor's two modes the one that took less GPU time; None where not both ran."""
        both = [name for name in self.sides if name in INDUCTOR]
        return min(both, key=lambda name: self.sides[name].gpu) if len(both) == len(INDUCTOR) else None

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
        if self.better is not None:
            data["better"] = {"side": self.better, "gain": self.gain(self.better)}
            data["better"]["plain"] = self.gain(self.better, PLAIN) if PLAIN in self.sides else None
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelResult:
        """What `to_dict` gave; fields that an older version did not write keep their defaults. KeyError, TypeError."""

        def known(kind: Any, row: dict[str, Any]) -> dict[str, Any]:
            return {f.name: row[f.name] for f in fields(kind) if f.name in row}

        made = known(cls, data)
        made["sides"] = {name: Side(**known(Side, side)) for name, side in data["sides"].items()}
        made["sites"] = [SiteTime(**known(SiteTime, site)) for site in data.get("sites", ())]
        made["depth"] = tuple(made.get("depth", ()))
        return cls(**made)


def report(results: Sequence[ModelResult], device: str) -> dict[str, Any]:
    """Everything, in the layout of the schema."""
    import torch

    head = {"schema": SCHEMA, "torch": torch.__version__, "device": device, "date": today(), "versions": versions()}
    return {**head, "models": [result.to_dict() for result in results]}


PACKAGES = {  # what a measurement depends on: the name in reports and its distributions
    "triton": ("triton", "pytorch-triton"),
    "flash-attn-4": ("flash-attn-4",),
    "nvidia-cutlass-dsl": ("nvidia-cutlass-dsl",),
    "flashinfer": ("flashinfer-python",),
    "sgl-kernel": ("sglang-kernel", "sgl-kernel"),
    "quack": ("quack-kernels",),
    "liger": ("liger-kernel",),
    "diffusers": ("diffusers",),
}


def versions() -> dict[str, str]:
    """Versions of dkfuse, of what torch brings, and of those PACKAGES that are installed."""
    import torch

    from ..version import __version__

    found = {"dkfuse": __version__}
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    found.update({"cuda": torch.version.cuda} if torch.version.cuda else {})
    found.update({"cudnn": str(cudnn)} if cudnn else {})
    for name, distributions in PACKAGES.items():
        if (version := installed(*distributions)) is not None:
            found[name] = version
    return found


def today() -> str:
    return datetime.date.today().isoformat()
