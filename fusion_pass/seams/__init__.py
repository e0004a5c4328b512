"""Seams: what touches a GEMM or an attention, rewritten before the fused sites are looked for.

    attention     which kernel computes an attention
    projections   linears of one input whose weights lie side by side, as one GEMM
    split         linear(cat([a, b])) as two GEMMs that add up
    epilogue      linear + tanh-GELU in one GEMM

A seam that is taken changes the graph at once: the sites found later read the new layouts as facts. A seam that is not
taken is recorded with its reason, like any other site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from ..report import Site
from ..settings import Settings
from . import attention


@dataclass
class Seam:
    """One seam. `apply` rewrites the graph and is None where the seam is left as it is; `site` says why."""

    site: Site
    apply: Callable[[], None] | None = None


# in this order; each yields what it finds in the graph as the finders before it left it
FINDERS: tuple[Callable[[fx.Graph, Settings], Iterator[Seam]], ...] = (attention.find,)


def run(graph: fx.Graph, settings: Settings) -> list[Site]:
    """Rewrite the seams of `graph` in place; what became of each."""
    sites: list[Site] = []
    for find in FINDERS:
        for seam in list(find(graph, settings)):
            if seam.apply is not None:
                seam.apply()
            sites.append(seam.site)
    return sites
