"""Other libraries' kernels for what they can do of a case, timed beside ours: `dkfuse bench kernels --peers`.

None of them has the modulation, and few the layouts, of a diffusion transformer. Each row says which part it is:

    quack, Liger, FlashInfer, sgl-kernel   RMSNorm with a weight of the same rows
    quack, Liger                           residual + x and its RMSNorm, without gate and modulation
    FlashInfer, sgl-kernel                 the same in place
    FlashInfer                             the rotation of q and k, in place, without norm and joint tensor

The cases named RMSNorm are that and no more. A peer that is not installed is left out. Their calls are made as their
documentation says, on dense rows.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .rope_cases import RopeCase, flashinfer_calls

NORM = "RMSNorm alone"
ADD_NORM = "add and RMSNorm alone"
ADD_NORM_IN_PLACE = "add and RMSNorm alone, in place"
ROTATION = "rotation alone, in place"
EPS = 1e-6

Function = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    """One function of one library. load: the function, taking (x, weight) or (x, residual, weight)."""

    name: str
    module: str
    part: str
    load: Callable[[], Function]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module.partition(".")[0]) is not None


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _quack() -> Function:
    function = _attribute("quack.rmsnorm", "rmsnorm_fwd")
    return lambda x, weight: function(x, weight, eps=EPS)


def _liger() -> Function:
    forward = _attribute("liger_kernel.ops.rms_norm", "rms_norm_forward")
    return lambda x, weight: forward(x, weight, EPS, 0.0, "llama", None)


def _quack_add() -> Function:
    function = _attribute("quack.rmsnorm", "rmsnorm_fwd")
    return lambda x, residual, weight: function(x, weight, residual=residual, eps=EPS)


def _liger_add() -> Function:
    forward = _attribute("liger_kernel.ops.fused_add_rms_norm", "fused_add_rms_norm_forward")
    return lambda x, residual, weight: forward(x, residual, weight, EPS, 0.0, "llama")


def _rmsnorm(module: str) -> Function:
    function = _attribute(module, "rmsnorm")
    return lambda x, weight: function(x, weight, eps=EPS)


def _add_rmsnorm(module: str) -> Function:
    function = _attribute(module, "fused_add_rmsnorm")
    return lambda x, residual, weight: function(x, residual, weight, eps=EPS)


PEERS = (
    Peer("quack", "quack", NORM, _quack),
    Peer("Liger", "liger_kernel", NORM, _liger),
    Peer("FlashInfer", "flashinfer", NORM, functools.partial(_rmsnorm, "flashinfer.norm")),
    Peer("sgl-kernel", "sgl_kernel", NORM, functools.partial(_rmsnorm, "sgl_kernel")),
    Peer("quack", "quack", ADD_NORM, _quack_add),
    Peer("Liger", "liger_kernel", ADD_NORM, _liger_add),
    Peer("FlashInfer", "flashinfer", ADD_NORM_IN_PLACE, functools.partial(_add_rmsnorm, "flashinfer.norm")),
    Peer("sgl-kernel", "sgl_kernel", ADD_NORM_IN_PLACE, functools.partial(_add_rmsnorm, "sgl_kernel")),
)


def peers_of(case: Any, sets: Sequence[Any]) -> list[tuple[str, str, Callable[[], list[Callable[[], Any]]]]]:
    """(library, part, calls on the sets), for the peers that are installed and can do a part of `case`."""
    if isinstance(case, RopeCase):
        made = flashinfer_calls(case, list(sets))
        return [] if made is None else [("FlashInfer", ROTATION, lambda: made)]
    wanted = {"norm_modulate": (NORM,), "residual_norm_modulate": (ADD_NORM, ADD_NORM_IN_PLACE)}.get(case.op, ())
    return [(p.name, p.part, functools.partial(_calls, p, sets)) for p in PEERS if p.part in wanted and p.installed]


def _calls(peer: Peer, sets: Sequence[Any]) -> list[Callable[[], Any]]:
    function = peer.load()
    calls: list[Callable[[], Any]] = []
    for operands in sets:
        x = operands["x"].flatten(0, -2)
        weight = operands.get("weight")
        weight = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype) if weight is None else weight
        if peer.part == NORM:
            calls.append(functools.partial(function, x, weight))
        else:
            residual = operands["residual"].flatten(0, -2).to(x.dtype)
            if peer.part == ADD_NORM_IN_PLACE:
                x, residual = x.clone(), residual.clone()
            calls.append(functools.partial(function, x, residual, weight))
    return calls
