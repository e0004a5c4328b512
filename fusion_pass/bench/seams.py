"""`python -m dkfuse.bench.seams [--case TEXT]`: what a seam brings by itself: joint tensors, patch embeddings, LoRAs.

And what the rules of two branches before a norm bring. Each case is a module with the part of a model that the seam
rewrites, at the model's size, bf16, compiled three times: by Inductor, by dkfuse without the seam, and by dkfuse. Times
are medians of a call in a CUDA graph, cold inputs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..seams import adapters, joint, patches
from . import timing
from .kernels import NO_GPU

BF16 = torch.bfloat16
TWO = "residual_two_norm_modulate"
PAIRS = (TWO, "residual_pair_norm_modulate")  # what the first does not take, the second would


class Values(nn.Module):
    """The projections of image and text, packed as q, k, v, whose values are joined."""

    def __init__(self, width: int, columns: int):
        super().__init__()
        self.image, self.text, self.width = nn.Linear(width, columns), nn.Linear(width, columns), width

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self.image(image), self.text(text)
        rest = a.shape[-1] - self.width
        return torch.cat([a[..., rest:], b[..., rest:]], 1), a[..., :rest], b[..., :rest]


class Tokens(nn.Module):
    """A patch embedding and a bias of each token, as position embeddings are added."""

    def __init__(self, channels: int, features: int, patch: tuple[int, ...]):
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch)]
        self.proj = conv(channels, features, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2) + 1


class Adapted(nn.Linear):
    """A linear with a LoRA that is not merged."""

    def __init__(self, width: int, columns: int, rank: int):
        super().__init__(width, columns)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, columns, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x)) * 0.5


class Queries(nn.Module):
    """A projection with a LoRA, and the norm and the rotation of each head behind it."""

    def __init__(self, width: int, rank: int, head: int = 128):
        super().__init__()
        self.proj, self.norm, self.head = Adapted(width, width, rank), nn.RMSNorm(head, eps=1e-6), head

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.norm(self.proj(x).unflatten(-1, (-1, self.head)))
        a, b = q.unflatten(-1, (-1, 2)).unbind(-1)
        q = (q.float() * cos + torch.stack([-b, a], -1).flatten(-2).float() * sin).to(x.dtype)
        return q.transpose(1, 2)


class Output(nn.Module):
    """A projection with a LoRA at the end of a branch, its gate, and the norm of the next one."""

    def __init__(self, width: int, columns: int, rank: int):
        super().__init__()
        self.proj = Adapted(width, columns, rank)

    def forward(self, x: Tensor, stream: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        stream = stream + gate * self.proj(x)
        return stream, nn.functional.layer_norm(stream, stream.shape[-1:], eps=1e-6) * (1 + scale)


class Branches(nn.Module):
    """Two branches that are added to the stream before a norm, the second with a gate of its own or without."""

    def __init__(self, gated: bool):
        super().__init__()
        self.gated = gated

    def forward(self, h: Tensor, y: Tensor, c: Tensor, g: Tensor, k: Tensor, s: Tensor, t: Tensor) -> Any:
        h = h + g * y
        h = h + (k * c if self.gated else c)
        return h, nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + s) + t


@dataclass(frozen=True)
class Case:
    """`seam`, or the rule of this name, in the module that `make` builds, on inputs of `shapes`."""

    name: str
    seam: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]


def _joint(name: str, batch: int, image: int, text: int, width: int, packed: int = 3) -> Case:
    shapes = (batch, image, width), (batch, text, width)
    return Case(name, joint.FAMILY, lambda: Values(width, packed * width), shapes)


def _patch(name: str, shape: tuple[int, ...], features: int, patch: tuple[int, ...]) -> Case:
    return Case(name, patches.FAMILY, lambda: Tokens(shape[1], features, patch), (shape,))


def _queries(name: str, tokens: int, width: int, rank: int) -> Case:
    tables = ((1, tokens, 1, 128),) * 2
    return Case(name, adapters.FAMILY, lambda: Queries(width, rank), ((1, tokens, width), *tables))


def _output(name: str, tokens: int, width: int, columns: int, rank: int) -> Case:
    rows = ((1, 1, columns),) * 2
    shapes = (1, tokens, width), (1, tokens, columns), *rows
    return Case(name, adapters.FAMILY, lambda: Output(width, columns, rank), shapes)


def _branches(name: str, tokens: int, width: int, gated: bool = False) -> Case:
    shapes = *((1, tokens, width),) * 3, *((1, 1, width),) * 4
    return Case(name, TWO, lambda: Branches(gated), shapes)


CASES = (
    _joint("FLUX.1, packed", 1, 4096, 512, 3072),
    _joint("FLUX.1", 1, 4096, 512, 3072, packed=1),
    _joint("SD3.5-Large, batch 2, packed", 2, 4096, 333, 2432),
    _joint("SD3.5-Large, batch 2", 2, 4096, 333, 2432, packed=1),
    _joint("HunyuanVideo, 480p, packed", 1, 25440, 256, 3072),
    _joint("1024 + 333 tokens, batch 4", 4, 1024, 333, 1536),
    _patch("Wan2.1-14B, 480p", (1, 16, 21, 60, 104), 5120, (1, 2, 2)),
    _patch("HunyuanVideo, 480p", (1, 16, 16, 60, 106), 3072, (1, 2, 2)),
    _patch("CogVideoX-5B", (13, 16, 60, 90), 3072, (2, 2)),
    _patch("SD3.5-Large, batch 2", (2, 16, 128, 128), 2432, (2, 2)),
    _patch("PixArt-Sigma", (1, 4, 128, 128), 1152, (2, 2)),
    _patch("ViT-B/16, batch 8", (8, 3, 224, 224), 768, (16, 16)),
    _queries("FLUX.1's queries, rank 16", 4096, 3072, 16),
    _queries("FLUX.1's queries of text, rank 16", 512, 3072, 16),
    _queries("Wan2.1-14B's queries, rank 64", 32760, 5120, 64),
    _output("FLUX.1's MLP, rank 16", 4096, 12288, 3072, 16),
    _branches("SD3.5-medium's two attentions", 4096, 1536, gated=True),
    _branches("a ControlNet's residual, FLUX.1", 4096, 3072),
    _branches("a hint of VACE, Wan2.1-14B", 32760, 5120),
)


def measured(case: Case) -> dict[str, float]:
    """Microseconds of the three programs."""
    module = case.make().to("cuda", BF16).requires_grad_(False)
    moved = 2 * sum(torch.Size(shape).numel() for shape in case.shapes)
    inputs = [[torch.randn(*s, device="cuda").to(BF16) for s in case.shapes] for _ in range(timing.sets_needed(moved))]
    left_out = ",".join(f"-{name}" for name in (PAIRS if case.seam == TWO else (case.seam,)))
    plain = {"dkfuse.attention": "torch", "dkfuse.gemm": "cublas"}
    programs: dict[str, dict[str, Any]] = {
        "Inductor": {"backend": "inductor"},
        "without": {"backend": "dkfuse", "options": {**plain, "dkfuse.rules": left_out}},
        "with": {"backend": "dkfuse", "options": plain},
    }
    found = {}
    for name, how in programs.items():
        torch.compiler.reset()
        compiled = torch.compile(module, dynamic=False, **how)
        found[name] = timing.microseconds([lambda args=args, run=compiled: run(*args) for args in inputs])  # type: ignore[misc]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dkfuse.bench.seams", description=__doc__.split("\n\n")[0])
    parser.add_argument("--case", default="", help="only cases whose seam or name contains this")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: there is nothing to measure", file=sys.stderr)
        return NO_GPU
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; us a call: Inductor, dkfuse without, dkfuse with"
    )
    with torch.no_grad():
        for case in CASES:
            if options.case not in f"{case.seam} {case.name}":
                continue
            found = measured(case)
            times = "  ".join(f"{found[name]:8.1f}" for name in ("Inductor", "without", "with"))
            print(f"{case.seam:18} {case.name:34} {times}   {found['Inductor'] / found['with']:.2f}x", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
