"""`dkfuse cache`: what is kept on disk."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .exits import ENVIRONMENT, Failure

cache_app = typer.Typer(help="What dkfuse keeps on disk: kernels, coverage records and times.", no_args_is_help=True)
TEXTS = {
    "kernels": "compiled kernel",
    "records": "coverage record",
    "attention": "timed attention",
    "launches": "timed launch configuration",
    "gemm": "timed GEMM",
}


@cache_app.command()
def info(json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Say where the files are, how many, and how large."""
    from ..reporting.summary import bytes_text, count

    found = _contents()
    if json_:
        print(json.dumps(found, indent=1))
        return
    print(found["path"])
    for kind, text in TEXTS.items():
        print(f"{count(found[kind]['files'], text)}, {bytes_text(found[kind]['bytes'])}")


@cache_app.command()
def clear() -> None:
    """Delete compiled kernels, coverage records and measured times; nothing else in the folder is touched."""
    from dkfuse.kernels import disk_cache

    from ..reporting.summary import bytes_text, count

    before = _contents()
    failed = None
    for file in (file for files in disk_cache.contents().values() for file in files):
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            failed = error
    after = _contents()
    files, size = (
        {kind: before[kind][what] - after[kind][what] for kind in disk_cache.KINDS} for what in ("files", "bytes")
    )
    left = sum(after[kind]["files"] for kind in disk_cache.KINDS)
    print(f"{count(sum(files.values()), 'file')}, {bytes_text(sum(size.values()))}, deleted in {before['path']}")
    if failed is not None:
        raise Failure(ENVIRONMENT, f"{count(left, 'file')} could not be deleted: {failed.strerror or failed}")


def _contents() -> dict[str, Any]:
    from dkfuse.kernels import disk_cache

    from ..settings import Settings

    disk_cache.use(Settings.read().cache_dir)
    sizes = {
        kind: {"files": len(files), "bytes": sum(_size(file) for file in files)}
        for kind, files in disk_cache.contents().items()
    }
    return {"path": str(disk_cache.root()), **sizes}


def _size(file: Any) -> int:
    try:
        return file.stat().st_size
    except OSError:  # another process has just deleted it
        return 0
