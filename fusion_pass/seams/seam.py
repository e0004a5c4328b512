"""What a finder of seams yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..reporting.report import Site


@dataclass
class Seam:
    """One seam. `apply` rewrites the graph and is None where the seam is left as it is; `site` says why."""

    site: Site
    apply: Callable[[], None] | None = None
