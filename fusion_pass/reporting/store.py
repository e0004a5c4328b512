"""Coverage records on disk, one per compiled graph, so that a warm start reports what the cold one did.

Inductor's FX graph cache skips the pass when it is warm. Each graph therefore has a record file with a random token,
and the token is part of the pass's identity in Inductor's cache key: a cached graph without its record cannot be found,
and a record whose code changed (sources, options, torch, GPU) has another name. A record that was begun and not saved,
because its process was stopped, is begun anew with another token: what Inductor may have cached is not found without
what the pass found. Files are written beside and renamed, so that processes may share the folder; on a read-only or
full disk the graph is compiled anew each time. `torch.compiler.save_cache_artifacts` carries records with the graphs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import pathlib
import secrets
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dkfuse.kernels import attention_kernels, disk_cache, failures, gemm_kernels, registry

from .. import compat, compat_artifacts
from ..settings import Settings
from ..version import __version__
from .report import Coverage, Graph

log = logging.getLogger("dkfuse")

_HERE = pathlib.Path(__file__).resolve().parents[1]


@functools.cache
def source_hash() -> str:
    """Hash of every source file of dkfuse: another version of a rule or kernel is another key."""
    import dkfuse.kernels.ops as ops
    import dkfuse.patterns as patterns

    digest = hashlib.sha256(__version__.encode())
    for folder in (_HERE, pathlib.Path(str(patterns.__file__)).parent, pathlib.Path(str(ops.__file__)).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def graph_key(gm: fx.GraphModule, inputs: Iterable[Any], settings: Settings, runs: object = ()) -> str:
    """The name of a graph's record: the traced code, what it is called with, the options, and who runs it.

    `runs` says which inputs lie side by side, as the code may read them as one tensor, and what else it depends on.
    """
    digest = hashlib.sha256()
    from ..rewriting import known_ops

    chosen = replace(settings, report=None, log=None, cache_dir=None)  # these change no graph
    kernels = (registry.fingerprint(), failures.fingerprint(), attention_kernels.versions(), gemm_kernels.fingerprint())
    others = (known_ops.fingerprint(), repr(chosen), repr(runs), _autocast())
    chosen_by = (compat.environment_fingerprint(), *kernels, *others)
    graphs = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]  # torch.cond's branches too
    for part in (source_hash(), *chosen_by, *(graph.code for graph in graphs)):
        digest.update(part.encode())
    for value in inputs:
        digest.update(_describe(value).encode())
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        digest.update(f"{name}:{_describe(tensor)}".encode())
    return digest.hexdigest()


def _autocast() -> str:
    """What changes the dtypes of a graph and is not in its code."""
    kinds = ("cuda", "cpu")
    return str([(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)])


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)}{value.stride()}{value.dtype}{value.device}{value.requires_grad};"
    return f"{type(value).__name__}:{value};"


class Record:
    """The stored record of one graph: `token` for the cache key, `graphs` once a pass has run."""

    def __init__(self, key: str, folder: str | None):
        self.path = (pathlib.Path(folder) if folder else disk_cache.root()) / "records" / f"{key}.json"
        self.token: str = secrets.token_hex(8)
        self.stored: list[Graph] | None = None
        self.once: str | None = None  # why a call of the graph must not be repeated
        self.writable = True
        try:
            data = json.loads(self.path.read_text())
            if data["coverage"] is None:  # begun, by a process that was stopped or has not finished
                self._write(None)
                return
            self.stored = Coverage.from_dict(data["coverage"]).graphs
            self.token, self.once = data["token"], data.get("once")
        except FileNotFoundError:
            self._write(None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning(
                "dkfuse: the stored record %s cannot be read (%s); the graph is compiled anew", self.path, error
            )
            self._write(None)
        else:
            compat_artifacts.carry(self.path, data)

    @property
    def uuid(self) -> str | None:
        """Identity of the pass in Inductor's cache; None (not cached) when no record can be kept."""
        return f"dkfuse-{self.path.stem}-{self.token}" if self.writable else None

    def save(self, graphs: list[Graph], once: str | None = None) -> None:
        """Keep what the pass found, for a warm start."""
        self.once = once
        self._write(Coverage(torch=torch.__version__, graphs=graphs).to_dict())

    def forget(self) -> None:
        """Have the graph compiled anew the next time: its code does not run."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self, coverage: dict | None) -> None:
        content = {"token": self.token, "coverage": coverage, "once": self.once}
        try:
            disk_cache.write(self.path, json.dumps(content).encode())
            if coverage is not None:
                compat_artifacts.carry(self.path, content)
        except OSError as error:
            self.writable = False
            log.info("dkfuse: no coverage record at %s (%s); this graph bypasses Inductor's cache", self.path, error)


__all__ = ["Record", "graph_key", "source_hash"]
