"""Which fused site took how long: the launches of dkfuse's kernels in a profile, shared out to the sites of the report.

A kernel's name says its op. Where an op has as many launches as sites, the longest launch belongs to the site that
moves the most bytes, and so on down: all of them are bound by memory. Where launches serve several sites each (queries
and keys of both streams in one), the time of the op is shared out by bytes; so it is where there are more launches than
sites, as of a graph that a forward runs several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dkfuse.kernels.ops import OPS

from ..reporting.report import Site, Status
from .averages import median
from .classify import DKFUSE, kind, op_of
from .device import Launched
from .results import SiteTime

ALL_OPS = (*OPS, "norm_rope")


def launched_sites(sites: Sequence[Site]) -> list[Site]:
    """The fused sites with a kernel and known sizes of their own."""
    return [s for s in sites if s.status is Status.FUSED and s.with_site is None and s.op and s.bytes_after]


def site_times(
    sites: Sequence[Site], profiles: Sequence[Sequence[Launched]], copy: Callable[[int], float]
) -> list[SiteTime]:
    """The table, the most time first. `copy`: microseconds of a copy that moves so many bytes."""
    chosen = launched_sites(sites)
    found: list[SiteTime] = []
    for op in dict.fromkeys(map(_name, chosen)):
        of_op = sorted((s for s in chosen if _name(s) == op), key=lambda s: -(s.bytes_after or 0))
        durations = _durations(op, profiles)
        if not durations:
            continue
        shared, runs = len(durations) != len(of_op), max(1.0, len(durations) / len(of_op))
        if shared:
            total = sum(s.bytes_after or 0 for s in of_op)
            spent = [sum(durations) * (s.bytes_after or 0) / total for s in of_op]
        else:
            spent = sorted(durations, reverse=True)
        groups: dict[Any, list[tuple[Site, float]]] = {}
        for site, time in zip(of_op, spent, strict=True):
            key = tuple((name, tuple(shape)) for name, shape in site.shapes.items())
            groups.setdefault((site.kernel, site.bytes_after, key), []).append((site, time))
        for (kernel, traffic, _), members in groups.items():
            each = median(time for _, time in members)
            of_copy = runs * copy(traffic) / each if each else 0.0
            shapes = members[0][0].shapes
            found.append(SiteTime(op, str(kernel), shapes, len(members), each, traffic, of_copy, shared))
    return sorted(found, key=lambda row: -row.microseconds * row.sites)


def _name(site: Site) -> str:
    """The site's op without its namespace: "norm_modulate" of "dkfuse::norm_modulate"."""
    return str(site.op).rpartition("::")[2]


def _durations(op: str, profiles: Sequence[Sequence[Launched]]) -> list[float]:
    """Microseconds of each launch of `op`, medians over the profiles that launched as often as most did."""
    rounds = [
        [k.microseconds for k in profile if kind(k.name) == DKFUSE and op_of(k.name, ALL_OPS) == op]
        for profile in profiles
    ]
    counts = [len(row) for row in rounds]
    usual = max(set(counts), key=counts.count, default=0)
    rows = [row for row in rounds if len(row) == usual]
    return [median(column) for column in zip(*rows, strict=True)]
