"""Compiled kernels and measured times on disk.

    cubin = cached_bytes(("nvrtc", "sm_90", options, source), build)

An entry's name is the hash of the given parts, dkfuse's sources and torch's version, so that another version of any of
them is another entry. Its file is a digest and the bytes it is of: what was cut short or changed is built again. Files
are written beside and renamed, so that processes may share the folder; on a read-only or full disk nothing is kept.

The folder is that of the kind (`kernels`, `attention`, `gemm`, `launches`) in DKFUSE_CACHE_DIR, in `dkfuse.cache_dir`
of the last compilation, or beside Inductor's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

log = logging.getLogger("dkfuse")
DIGEST = 32
MAGIC = b"dkfuse1\n"
KINDS = {"kernels": ".bin", "records": ".json", **dict.fromkeys(("attention", "gemm", "launches"), ".bin")}

_chosen: list[str] = []  # `dkfuse.cache_dir`, while a compilation that sets it was the last one
_unwritable: set[Path] = set()


def use(folder: str | None) -> None:
    """Keep files in `folder` from now on; None: where the environment or the default says."""
    _chosen[:] = [folder] if folder is not None else []


def root() -> Path:
    """The folder of everything that dkfuse keeps on disk."""
    if _chosen:
        return Path(_chosen[0])
    if variable := os.environ.get("DKFUSE_CACHE_DIR", "").strip():
        return Path(variable)
    from dkfuse.compat import cache_folder

    return Path(cache_folder()) / "dkfuse"


def cached_bytes(parts: tuple[str, ...], build: Callable[[], bytes]) -> bytes:
    """What `build` returns, from disk where an earlier call with the same parts left it.

    parts: everything that the result depends on beside dkfuse's own sources and torch: architecture, options, source.
    What `build` raises is passed on, and nothing is kept.
    """
    found = get(parts)
    if found is None:
        found = build()
        put(parts, found)
    return found


def get(parts: tuple[str, ...], kind: str = "kernels", folder: str | None = None) -> bytes | None:
    """The bytes that were put under `parts`; None where there are none, or not the same ones any more.

    kind: the folder in `root()`, or in `folder` where one is given.
    """
    path = _path(parts, kind, folder)
    try:
        content = path.read_bytes()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            log.debug("dkfuse: the cache %s cannot be read: %s", path, error)
        return None
    digest, data = content[len(MAGIC) : len(MAGIC) + DIGEST], content[len(MAGIC) + DIGEST :]
    if content.startswith(MAGIC) and hashlib.sha256(data).digest() == digest:
        return data
    log.debug("dkfuse: the cached file %s is damaged and is made again", path)
    return None


def put(parts: tuple[str, ...], data: bytes, kind: str = "kernels", folder: str | None = None) -> None:
    """Keep `data` under `parts`. Where that is not possible it is logged once a folder, at level debug."""
    path = _path(parts, kind, folder)
    try:
        write(path, MAGIC + hashlib.sha256(data).digest() + data)
    except OSError as error:
        if path.parent not in _unwritable:
            _unwritable.add(path.parent)
            log.debug("dkfuse: nothing is kept, %s cannot be written: %s", path.parent, error)


def write(path: Path, content: bytes) -> None:
    """A file in the cache, whole or not at all, its folder made where it is missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        if temporary:
            with contextlib.suppress(OSError):  # already gone, or nothing more can be done on this disk
                os.unlink(temporary)
        raise


def writable() -> bool:
    """Whether something can be kept: the folder of everything is there, or can be made, and may be written to."""
    try:
        root().mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(root(), os.W_OK)


def _path(parts: tuple[str, ...], kind: str, folder: str | None) -> Path:
    from dkfuse.reporting.store import source_hash

    digest = hashlib.sha256()
    for part in (source_hash(), torch.__version__, *parts):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return (Path(folder) if folder else root()) / kind / f"{digest.hexdigest()}.bin"


def contents() -> dict[str, list[Path]]:
    """The files of the cache by kind: kernels, records and what was timed, with what interrupted writers left."""
    return {
        kind: sorted(file for end in (ending, ".tmp") for file in root().glob(f"{kind}/*{end}"))
        for kind, ending in KINDS.items()
    }


__all__ = ["cached_bytes", "contents", "get", "put", "root", "use", "writable", "write"]
