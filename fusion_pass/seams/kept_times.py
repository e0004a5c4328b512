"""Times of kernels by name, taken once per call and machine: kept in the process and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch

from dkfuse.kernels import disk_cache

from .. import compat

Key = tuple[str, ...]
Known = dict[Key, dict[str, float]]


def times(
    known: Known,
    kind: str,
    key: Key,
    names: Sequence[str],
    folder: str | None,
    measure: Callable[[list[str]], dict[str, float]],
) -> dict[str, float]:
    """Microseconds of the kernels `names` for the call `key`; inf where one failed, which is not kept on disk.

    known: what this process knows, updated; kind: of `disk_cache`, folder: the cache folder of the settings.
    measure: takes the names that are not known yet and gives their times, of others too if it likes. It runs on real
    tensors, without gradients.
    """
    if without := missing(known, kind, key, names, folder):
        with compat.real_tensors(), torch.no_grad():
            known[key].update(measure(without))
        kept = {name: time for name, time in known[key].items() if time != float("inf")}
        disk_cache.put(key, json.dumps(kept).encode(), kind, folder)
    return {name: known[key][name] for name in names}


def missing(known: Known, kind: str, key: Key, names: Sequence[str], folder: str | None) -> list[str]:
    """The kernels that `times` would measure."""
    if key not in known:
        stored = disk_cache.get(key, kind, folder)
        known[key] = json.loads(stored) if stored is not None else {}
    return [name for name in names if name not in known[key]]
