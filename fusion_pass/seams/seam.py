"""What a finder of seams yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..reporting.report import Site


@dataclass
class Seam:
    """One seam. `apply` rewrites the graph and is None where the seam is left as it is; `site` says why.

    finish: what is done once all seams of a finder are applied, the graph is in order again and has no dead code: for
    rewrites that put nodes behind some of their readers, and strides that are carried on from there.
    """

    site: Site
    apply: Callable[[], None] | None = None
    finish: Callable[[], None] | None = None
