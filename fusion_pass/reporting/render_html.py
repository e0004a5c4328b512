"""Coverage as one self-contained HTML page: no script, style, font or image from anywhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from ..version import __version__
from . import summary
from .report import Coverage, Site, Status


def to_html(coverage: Coverage, regressions: Sequence[Site] = ()) -> str:
    """The report as an HTML page, light or dark as the reader's system is, with a table that sorts and filters."""
    totals = coverage.totals
    moved = summary.traffic(coverage.sites)
    sites = len(coverage.sites)
    return _template().render(
        coverage=coverage,
        title=f"dkfuse coverage{f': {coverage.model}' if coverage.model else ''}",
        about=summary.about(coverage),
        headline=summary.headline(coverage),
        totals=totals,
        moved=moved,
        bar=[(status, totals[status.value], totals[status.value] / sites) for status in Status if totals[status.value]],
        families=summary.by_family(coverage),
        reasons=summary.by_reason(coverage),
        notes=summary.notes(coverage),
        regressions=[(site, site.status is Status.FUSED) for site in regressions],
        rows=[(graph.index, site) for graph in coverage.graphs for site in (*graph.sites, *graph.seams)],
        several_graphs=len(coverage.graphs) > 1,
        ranks={status: rank for rank, status in enumerate(Status)},
        version=__version__,
    )


@cache
def _template() -> Any:
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        label=summary.label,
        percent=summary.percent,
        size=summary.bytes_text,
        shape=summary.shape_text,
        breakable=lambda path: markupsafe.Markup("<wbr>").join(re.split(r"(?<=\.)", path)),
    )
    environment.globals["traffic"] = summary.traffic
    return environment.get_template("coverage.html")
