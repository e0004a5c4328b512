"""Attention kernels timed on the GPU that will run them, once per call and machine.

Times are kept in the process and in ``<cache folder>/attention/<key>.json``; the key covers the call, the GPU, torch
and the kernels' versions. Files are written beside and renamed, so that processes may share the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import statistics
import tempfile
from typing import Any

import torch

from dkfuse.errors import first_line
from dkfuse.kernels import attention_kernels, disk_cache

from .. import compat

log = logging.getLogger("dkfuse")
REPEATS = 15
FEW = 128  # tokens to try a kernel with
_known: dict[str, dict[str, float]] = {}
_failures: dict[tuple[Any, ...], str | None] = {}


def times(tensors: list[torch.Tensor], causal: bool, kernels: list[str], folder: str | None) -> dict[str, float]:
    """Microseconds of each kernel for a call with q, k, v like `tensors` (fake, of known sizes); inf where it failed.

    folder: the cache folder of the settings. The tensors that it is timed on are random, on the same device.
    """
    key = _key(tensors, causal)
    if key not in _known:
        _known[key] = _read(_path(key, folder))
    if missing := [name for name in kernels if name not in _known[key]]:
        with compat.real_tensors(), torch.no_grad():
            real = [_random(t) for t in tensors]
            _known[key].update({name: _time(real, causal, name) for name in missing})
        _write(_path(key, folder), _known[key])
    return {name: _known[key][name] for name in kernels}


def failure(kernel: str, q: torch.Tensor, k: torch.Tensor, causal: bool) -> str | None:
    """What goes wrong when `kernel` is built and run once, for few tokens of this kind; None where nothing does.

    It is built here, rather than when the compiled code first runs. Without a GPU nothing is tried.
    """
    if q.device.type != "cuda" or not torch.cuda.is_available():
        return None
    head_dim = compat.hint(q.shape[3]) or 0
    groups = (compat.hint(q.shape[1]) or 1) // (compat.hint(k.shape[1]) or 1)
    key = (kernel, q.device, q.dtype, head_dim, groups, causal)
    if key not in _failures:
        with compat.real_tensors(), torch.no_grad():
            sizes = [(1, FEW, heads, head_dim) for heads in (groups, 1, 1)]
            few = [torch.zeros(s, dtype=q.dtype, device=q.device).transpose(1, 2) for s in sizes]
            _failures[key] = _tried(few, causal, kernel)
    return _failures[key]


def _tried(tensors: list[torch.Tensor], causal: bool, kernel: str) -> str | None:
    try:
        _call(tensors, causal, kernel)
        torch.cuda.synchronize(tensors[0].device)
    except Exception as error:
        log.warning("dkfuse: attention kernel %s cannot be used: %s", kernel, first_line(error))
        return first_line(error)
    return None


def _call(tensors: list[torch.Tensor], causal: bool, kernel: str) -> torch.Tensor:
    import dkfuse.kernels.attention  # noqa: F401  (registers the op)

    q, k, v = tensors
    return torch.ops.dkfuse.attention(q, k, v, None, causal=causal, gqa=q.shape[1] != k.shape[1], using=kernel)


def _key(tensors: list[torch.Tensor], causal: bool) -> str:
    calls = [(tuple(t.shape), t.stride(), str(t.dtype), str(t.device)) for t in tensors]
    text = f"{calls}{causal}{compat.environment_fingerprint()}{attention_kernels.versions()}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _random(like: torch.Tensor) -> torch.Tensor:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    return torch.randn(extent, dtype=like.dtype, device=like.device).as_strided(tuple(like.shape), like.stride())


def _time(tensors: list[torch.Tensor], causal: bool, kernel: str) -> float:
    """Median of single calls, in microseconds, after two that compile and warm up."""
    device = tensors[0].device
    try:
        for _ in range(2):
            _call(tensors, causal, kernel)
        torch.cuda.synchronize(device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
        for start, end in events:  # without waiting, so that the GPU is busy while the next call is prepared
            start.record()
            _call(tensors, causal, kernel)
            end.record()
        torch.cuda.synchronize(device)
        found = [start.elapsed_time(end) * 1e3 for start, end in events]
    except Exception as error:
        log.warning("dkfuse: attention kernel %s failed at %s: %s", kernel, list(tensors[0].shape), first_line(error))
        return float("inf")
    return statistics.median(found)


def _path(key: str, folder: str | None) -> pathlib.Path:
    return (pathlib.Path(folder) if folder else disk_cache.root()) / "attention" / f"{key}.json"


def _read(path: pathlib.Path) -> dict[str, float]:
    try:
        data = json.loads(path.read_text())
        return {str(name): float(time) for name, time in data.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("dkfuse: the measured times %s cannot be read (%s); they are taken anew", path, first_line(error))
        return {}


def _write(path: pathlib.Path, data: dict[str, float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({name: time for name, time in data.items() if time != float("inf")}, file)
        os.replace(file.name, path)
    except OSError as error:
        log.info("dkfuse: measured times are not kept at %s: %s", path, first_line(error))
