"""Launch configurations of our Triton kernels, timed while a program is compiled, under Inductor's max-autotune modes.

The table (`dkfuse.kernels.configs`, `rope_configs`) decides unless Inductor is to time kernels (`max_autotune` or
`max_autotune_pointwise`), on a GPU that is there, for known sizes. Then the few candidates of a launch run on random
tensors with the shapes, strides and dtypes of the call; another than the table's is taken if it was faster by MARGIN in
both of two series, so that noise does not decide.

What was found is kept in the process and on disk (`disk_cache`, kind "launches"), under all that the kernel is
specialised to, the candidates, the GPU, torch and Triton: every launch of a model that is the same one is timed once,
and a warm start times nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dkfuse.kernels import disk_cache, providers
from dkfuse.kernels.launch import Launch

from .. import compat
from . import tuning_clock

log = logging.getLogger("dkfuse")
MARGIN = 1.02
KIND = "launches"
Plan = Callable[[Any], Launch]  # of a configuration; None: the table's
_known: dict[tuple[str, ...], Found] = {}


@dataclass(frozen=True)
class Found:
    """The number of the candidate that is taken, and the table's time by its time: 1.0 for the table's own.

    A gain of None: none of the candidates ran.
    """

    candidate: int
    gain: float | None


@dataclass(frozen=True)
class Tuned:
    """A launch; gain: how much faster than the table's it was when they were timed, None where nothing was timed."""

    launch: Launch
    gain: float | None = None


def tuned(plan: Plan, configs: Callable[[], Sequence[Any]], tensors: Mapping[str, Any]) -> Tuned:
    """The launch of `plan` with the best of `configs`, the table's first, for `tensors` (fake, by the launch's names).

    The table's launch where nothing can be timed: no max-autotune, no GPU, sizes that are symbols, too little memory.
    """
    table = plan(None)
    operands = {name: tensors[name] for name in table.tensors.values()}
    if not (compat.autotunes_pointwise() and on_gpu(operands) and static(table, operands)):
        return Tuned(table)
    choices = list(configs())
    if len(choices) < 2:
        return Tuned(table)
    key = _key(table, choices, operands)
    found = _known.get(key) or _read(key, choices)
    if found is None:
        found = _timed([table, *map(plan, choices[1:])], operands)
        if found is None:
            return Tuned(table)
        if found.gain is not None:
            _write(key, choices, found)
    _known[key] = found
    return Tuned(table if found.candidate == 0 else plan(choices[found.candidate]), found.gain)


def on_gpu(tensors: Mapping[str, Any]) -> bool:
    """Whether kernels can run on the devices of `tensors`, now and as they will."""
    return (
        all(tensor.device.type == "cuda" for tensor in tensors.values())
        and torch.cuda.is_available()
        and not torch.cuda.is_current_stream_capturing()
        and os.environ.get("TRITON_INTERPRET") != "1"
    )


def static(launch: Launch, tensors: Mapping[str, Any]) -> bool:
    """Whether every size, stride and offset is a number."""
    numbers = [n for t in tensors.values() for n in (*t.shape, *t.stride(), t.storage_offset())]
    return all(isinstance(n, int) for n in (*numbers, *launch.grid, *launch.scalars.values()))


def _timed(launches: Sequence[Launch], tensors: Mapping[str, Any]) -> Found | None:
    """Time `launches`, the table's first; None where there is no memory for it."""
    times = tuning_clock.times(launches, tensors)
    if times is None:
        return None
    found = best_of(times)
    if log.isEnabledFor(logging.DEBUG):
        texts = ", ".join(f"{x.config_text}: {min(t):.1f} us" for x, t in zip(launches, times, strict=True))
        log.debug("dkfuse: %s timed, %s; taken: %s", _name(launches[0]), texts, launches[found.candidate].config_text)
    return found


def best_of(times: Sequence[tuple[float, float]]) -> Found:
    """Which candidate is taken that took these times, in two series each; the first one is the table's."""
    if not any(map(_ran, times)):
        return Found(0, None)
    gains = [_gain(times[0], own) for own in times]
    best = max(range(len(gains)), key=gains.__getitem__)
    taken = best if gains[best] >= MARGIN else 0
    return Found(taken, round(gains[taken], 3) if taken and _ran(times[0]) else 1.0)


def _ran(times: tuple[float, float]) -> bool:
    return all(map(math.isfinite, times))


def _gain(table: tuple[float, float], own: tuple[float, float]) -> float:
    """The table's time by the candidate's, in the series where it is less; 0 for a candidate that failed.

    Where the table's choice failed, the fastest of the others has the most.
    """
    if not _ran(own):
        return 0.0
    return min(t / o for t, o in zip(table, own, strict=True)) if _ran(table) else MARGIN + 1 / max(own)


def _name(launch: Launch) -> str:
    return getattr(getattr(launch.kernel, "fn", launch.kernel), "__name__", "kernel")


def _key(table: Launch, choices: Sequence[Any], tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """All that decides how fast the candidates are. dkfuse's sources and torch's version are in the cache's own key."""
    device = next(iter(tensors.values())).device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else ""
    operands = [
        (parameter, name, tuple(t.shape), t.stride(), str(t.dtype), tuning_clock.misalignment(t))
        for parameter, name in table.tensors.items()
        for t in (tensors[name],)
    ]
    call = (table.kernel.src, table.grid, table.scalars, table.constants, table.num_stages, operands)
    triton = providers.BUILT_IN["triton"].version or ""
    return repr(call), repr(choices), gpu, compat.environment_fingerprint(), triton


def _read(key: tuple[str, ...], choices: Sequence[Any]) -> Found | None:
    """What an earlier process found; None where it is not one of `choices` or cannot be understood."""
    stored = disk_cache.get(key, KIND)
    if stored is None:
        return None
    try:
        data = json.loads(stored)
        return Found([repr(choice) for choice in choices].index(data["config"]), float(data["gain"]))
    except (ValueError, KeyError, TypeError) as error:
        log.debug("dkfuse: a stored launch configuration cannot be understood and is timed again: %s", error)
        return None


def _write(key: tuple[str, ...], choices: Sequence[Any], found: Found) -> None:
    disk_cache.put(key, json.dumps({"config": repr(choices[found.candidate]), "gain": found.gain}).encode(), KIND)


__all__ = ["Found", "Tuned", "best_of", "tuned"]
