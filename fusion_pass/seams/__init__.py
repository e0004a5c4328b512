"""Seams: what touches a GEMM or an attention, rewritten before the fused sites are looked for.

    attention     which kernel computes an attention
    repeated      linears of a row that was repeated for all tokens, of the row
    swiglu        silu(linear) * linear in one GEMM
    adapters      linears and what adapters of low rank add to them, as GEMMs that add up
    projections   linears of one input whose weights lie side by side, as one GEMM
    split         linear(cat([a, b])) as two GEMMs that add up
    epilogue      linear + tanh-GELU in one GEMM
    gemm          which kernel computes a linear
    joint         linears of several streams that write their rows of a joint tensor
    patches       a convolution of patches that do not overlap, as a GEMM

A seam that is taken changes the graph at once: the sites found later read the new layouts as facts. A seam that is not
taken is recorded with its reason, like any other site.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import fx

from .. import compat
from ..choosing.choose import resolve_target
from ..matching.rules import Code, Stage
from ..reporting.report import SEAMS, Reason, Site, Status
from ..settings import Settings
from . import adapters, attention, biases, epilogue, gemm, joint, patches, projections, repeated, split, swiglu, widened
from .seam import Seam

__all__ = ["FINDERS", "NAMES", "Seam", "run"]
# in this order; each yields what it finds in the graph as the finders before it left it
FINDERS: tuple[Callable[[fx.Graph, Settings], Iterator[Seam]], ...] = (
    attention.find,
    repeated.find,
    swiglu.find,
    adapters.find,
    projections.find,
    split.find,
    epilogue.find,
    gemm.find,
    joint.find,
    patches.find,
)

NAMES = SEAMS  # what `dkfuse.rules` calls them: the families of their sites


def run(graph: fx.Graph, settings: Settings) -> list[Site]:
    """Rewrite the seams of `graph` in place, `settings.fuel` of them at most; what became of each.

    Seams are a matter of GPUs: none is looked for where the graph neither is on one nor planned for one.
    """
    if not any(resolve_target(settings.target, device).startswith("sm") for device in _devices(graph)):
        return []
    widened.bring_into_form(graph, settings)
    biases.into_products(graph, settings)
    sites: list[Site] = []
    names: Counter[str] = Counter()
    taken = 0
    for find in FINDERS:
        before, finish = taken, []
        for seam in list(find(graph, settings)):
            if seam.apply is not None and settings.fuel is not None and taken >= settings.fuel:
                _refuse_for_fuel(seam, settings.fuel)
            if seam.apply is not None:
                seam.apply()
                taken += 1
                finish += [seam.finish] if seam.finish is not None else []
            place = f"{seam.site.module or 'graph'}:{seam.site.family}"
            seam.site.id = f"{place}#{names[place]}"
            names[place] += 1
            sites.append(seam.site)
        if finish:
            compat.stable_topological_sort(graph)
        if taken != before:
            graph.eliminate_dead_code()
            for done in finish:
                done()
            graph.lint()
    return sites


def _devices(graph: fx.Graph) -> set[torch.device]:
    values = (node.meta.get("val") for node in graph.nodes if node.op == "placeholder")
    return {value.device for value in values if isinstance(value, torch.Tensor)}


def _refuse_for_fuel(seam: Seam, fuel: int) -> None:
    site = seam.site
    seam.apply = None
    site.reason = Reason(Stage.KERNEL.value, Code.FUEL.value, f"dkfuse.fuel={fuel} sites are fused already", site.rule)
    site.status, site.kernel, site.bytes_before, site.bytes_after = Status.REJECTED, None, None, None
    site.attempts = [site.reason]
