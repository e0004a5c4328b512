"""The sides of a comparison: how each is compiled, and their caches.

dkfuse        backend "dkfuse", with --mode and --attention
inductor      backend "inductor" with --mode, and its own choice of attention
max-autotune  mode "max-autotune-no-cudagraphs"
plain         dkfuse as installed alone: weights read as not packed, torch's own kernels of attention and GEMMs
eager         not compiled
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .results import OURS, PLAIN

RIVALS = ("inductor", "max-autotune", PLAIN, "eager")
PLAIN_OPTIONS = {"dkfuse.attention": "torch", "dkfuse.gemm": "cublas", "dkfuse.rules": "-packed_projection"}
PROFILES = 5
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
WITH_GRAPHS = ("reduce-overhead", "max-autotune")
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "DKFUSE_CACHE_DIR": "dkfuse"}

Run = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """What to measure. `rounds`: timed calls of each side; `profiles`: profiled ones."""

    against: tuple[str, ...] = ("inductor",)
    layers: int | None = None
    rounds: int = 15
    profiles: int = PROFILES
    mode: str | None = None
    pack: bool = False
    attention: str | None = None
    size: str = "full"
    dtype: str = "bf16"
    fp32: bool = True
    warm: bool = True  # measure the warm compile too

    @property
    def sides(self) -> tuple[str, ...]:
        return (OURS, *self.against)

    def graphs(self, side: str) -> bool:
        """Whether a side runs as a CUDA graph."""
        return side in (OURS, "inductor", PLAIN) and self.mode in WITH_GRAPHS


def arguments(side: str, options: Options) -> dict[str, Any]:
    """The arguments of torch.compile for a side that is compiled."""
    mode = None if options.mode == "default" else options.mode
    if side == "max-autotune":
        return {"backend": "inductor", "mode": "max-autotune-no-cudagraphs", "dynamic": False}
    if side == "inductor":
        return {"backend": "inductor", "dynamic": False, **({"mode": mode} if mode else {})}
    own = dict(PLAIN_OPTIONS) if side == PLAIN else {}
    if side == OURS and options.attention is not None:
        own = {"dkfuse.attention": options.attention}
    extra = {"options": {**own, **({"mode": mode} if mode else {})}} if own or mode else {}
    return {"backend": OURS, "dynamic": False, **extra}


def runner(side: str, module: Any, kwargs: dict[str, Any], options: Options, compile: Callable[..., Any]) -> Run:
    """A call of `module` as this side runs it; compiled at the first call."""
    function = module if side == "eager" else compile(module, **arguments(side, options))
    graphs = options.graphs(side)

    def run() -> Any:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return function(**kwargs)

    return run


@contextlib.contextmanager
def caches_in(folder: Path) -> Iterator[None]:
    """Compile caches of Inductor, Triton and dkfuse in `folder`."""
    before = {name: os.environ.get(name) for name in CACHES}
    os.environ.update({name: str(folder / part) for name, part in CACHES.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
