"""What `torch.compiler.save_cache_artifacts` carries from one machine to another.

Inductor's graphs are found by keys that name dkfuse's records of them, so that these have to travel with the graphs. An
artifact of a kind of our own would make all others of the same bytes unreadable to a process that has not imported
dkfuse yet. torch's own kind "autotune" is a JSON file in Inductor's cache folder, which is what a record is too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import compat

KIND = "autotune"


def carry(path: Path, content: dict[str, Any]) -> None:
    """Have a JSON file saved with the artifacts of this process. One outside of Inductor's folder is not: it has a
    place of its user's choice, which he ships himself.
    """
    import torch._inductor.runtime.autotune_cache  # noqa: F401  # makes the kind known
    from torch.compiler._cache import CacheArtifactManager

    folder = Path(compat.cache_folder())
    if path.is_relative_to(folder):
        CacheArtifactManager.record_artifact(KIND, str(path.relative_to(folder)), content)


__all__ = ["carry"]
