"""Coverage: what was fused, what was not, and why. Plain data, readable as JSON under schema "dkfuse.coverage/1".

    {schema, model, torch, target,
     graphs: [{index, nodes, seconds, from_cache, note}],
     sites:  [{graph, id, family, status, rule, op, kernel, reason, attempts, passed_over, source, module, shapes,
               dtype, bytes_before, bytes_after, with_site, config, config_by, config_gain, term}],
     seams:  as sites,
     totals: {sites, fused, left_to_inductor, rejected, unmatched, coverage, kernels, seams, seams_taken}}

A site is a place that could be fused (a norm, a gated residual), found without asking the rules. A seam is a place
where a GEMM or an attention could take over its neighbour's work or run as another kernel; seams have the fields of
sites and are counted apart, so that `coverage` stays the share of what fused kernels could do. Fields that a reader
does not know are ignored, so that a later "/1" writer may add some.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from ..errors import ReportError, did_you_mean

SCHEMA = "dkfuse.coverage/1"
FAMILIES = (
    "norm_modulate",
    "residual_norm_modulate",
    "norm",
    "residual_norm",
    "gated_residual",
    "scale_shift",
    "qk_norm",
    "rotation",
    "sandwich",
    "other_norm",
)
SEAMS = (
    "attention", "swiglu_epilogue", "packed_projection", "split_projection", "gelu_epilogue", "gemm_kernel",
    "joint_projection", "patch_embedding", "repeated_rows", "adapted_linear",
)  # fmt: skip
STAGES = ("structure", "semantics", "kernel")


class Status(str, enum.Enum):
    """What became of a site."""

    FUSED = "fused"
    LEFT_TO_INDUCTOR = "left_to_inductor"  # a rule explains it, but Inductor is expected to do at least as well
    REJECTED = "rejected"  # a rule recognised it, and a constraint forbids the fusion
    UNMATCHED = "unmatched"  # no rule explains it

    def __str__(self) -> str:
        return self.value


@dataclass
class Reason:
    """Why a rule did not take a site. `code` is from a fixed list and aggregates; `message` names the value."""

    stage: str  # "structure", "semantics" or "kernel"
    code: str
    message: str
    rule: str | None = None


@dataclass
class Site:
    """One place that could be fused. Bytes are its memory traffic op by op, as in eager mode, and fused."""

    id: str  # the same for the same place in the same model, from run to run
    family: str
    status: Status
    rule: str | None = None
    op: str | None = None
    kernel: str | None = None  # "triton", "native", ...
    reason: Reason | None = None
    attempts: list[Reason] = field(default_factory=list)
    passed_over: list[Reason] = field(default_factory=list)  # fused: why other providers' kernels were not chosen
    source: str | None = None  # "transformer_flux.py:123"
    module: str | None = None  # "transformer_blocks.0.norm1"
    shapes: dict[str, list[int | str]] = field(default_factory=dict)
    dtype: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None
    with_site: str | None = None  # the wider site whose kernel does this site's work too
    config: str | None = None  # how its Triton kernel is launched: "4 warps, 3 x 1024 columns"
    config_by: str | None = None  # who chose that: "table", or "timing" under max-autotune
    config_gain: float | None = None  # timed: the table's time by its time; 1.0 where the table's was taken
    term: str | None = None  # for an unmatched site: its canonical form


@dataclass
class Graph:
    """One compiled graph. `note` says why a graph was passed through unchanged, if it was."""

    index: int
    nodes: int
    seconds: float
    from_cache: bool = False
    note: str | None = None
    sites: list[Site] = field(default_factory=list)
    seams: list[Site] = field(default_factory=list)


@dataclass
class Coverage:
    """Everything that was seen while a model was compiled."""

    model: str | None = None
    torch: str = ""
    target: str = "current"
    graphs: list[Graph] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """The sites of all graphs, in order."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def seams(self) -> list[Site]:
        """The seams to GEMMs and attention of all graphs, in order."""
        return [seam for graph in self.graphs for seam in graph.seams]

    @property
    def totals(self) -> dict[str, Any]:
        """Counts by status; `coverage` = fused / sites (0.0 without sites); `kernels` = fused kernels launched."""
        sites = self.sites
        counts = Counter(site.status for site in sites)
        return {
            "sites": len(sites),
            **{status.value: counts[status] for status in Status},
            "coverage": counts[Status.FUSED] / len(sites) if sites else 0.0,
            "kernels": sum(site.status is Status.FUSED and site.with_site is None for site in sites),
            "seams": len(self.seams),
            "seams_taken": sum(seam.status is Status.FUSED for seam in self.seams),
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts and lists, in the layout of the schema."""
        graphs = [{f.name: getattr(g, f.name) for f in fields(g) if f.name not in LISTS} for g in self.graphs]
        lists = {name: [_entry(g, site) for g in self.graphs for site in getattr(g, name)] for name in LISTS}
        head = {"schema": SCHEMA, "model": self.model, "torch": self.torch, "target": self.target}
        return {**head, "graphs": graphs, **lists, "totals": self.totals}

    def to_json(self, indent: int | None = 1) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Coverage:
        """Read a report back. Raises ReportError when the text is not a report of this schema."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ReportError(f"not a coverage report: invalid JSON ({error})") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> Coverage:
        """Read a report from what `to_dict` gives. Raises ReportError."""
        schema = data.get("schema") if isinstance(data, Mapping) else None
        if schema != SCHEMA:
            raise ReportError(f"not a coverage report: schema is {schema!r}, {SCHEMA!r} is needed")
        try:
            graphs = {g["index"]: _make(Graph, g) for g in data["graphs"]}
            for entry in data["sites"]:
                graphs[entry["graph"]].sites.append(_site(entry))
            for entry in data.get("seams", ()):
                graphs[entry["graph"]].seams.append(_site(entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(f"not a valid coverage report: {type(error).__name__}: {error}") from None
        return cls(data.get("model"), data.get("torch", ""), data.get("target", "current"), list(graphs.values()))

    def regressions(self, baseline: Coverage) -> list[Site]:
        """Sites and seams that `baseline` fused and this report does not.

        A site that is still there is returned as it is now; one that is gone is returned as the baseline had it.
        """
        now = {site.id: site for site in (*self.sites, *self.seams)}
        return [
            now.get(before.id, before)
            for before in (*baseline.sites, *baseline.seams)
            if before.status is Status.FUSED and (before.id not in now or now[before.id].status is not Status.FUSED)
        ]

    def fused(self, family_or_rule: str | None = None) -> list[Site]:
        """The fused sites, or sites and seams of one family or rule if a name is given (see `assert_fused`)."""
        if family_or_rule is None:
            return [site for site in self.sites if site.status is Status.FUSED]
        chosen = _chooser(family_or_rule)
        return [site for site in (*self.sites, *self.seams) if site.status is Status.FUSED and chosen(site)]

    def assert_fused(self, family_or_rule: str, at_least: int = 1, exactly: int | None = None) -> None:
        """For tests: raise AssertionError unless enough sites were fused.

        The name is a family (`"norm_modulate"`), a rule, or words of one: `"modulate"` stands for every family and
        rule whose name contains that word. The error lists the sites of that name with their reasons.
        """
        count = len(self.fused(family_or_rule))
        if count == exactly or (exactly is None and count >= at_least):
            return
        wanted = f"exactly {exactly}" if exactly is not None else f"at least {at_least}"
        chosen = _chooser(family_or_rule)
        every = (*self.sites, *self.seams)
        related = [site for site in every if chosen(site)]
        lines = [f"{wanted} fused {family_or_rule!r} sites were expected, {count} of {len(related)} are fused"]
        lines += ["  " + describe(site) for site in related]
        if not related:
            known = {site.family for site in every} | {s.rule for s in every if s.rule}
            lines.append("  no site has this family or rule" + (did_you_mean(family_or_rule, known) if known else ""))
        raise AssertionError("\n".join(lines))

    def __str__(self) -> str:
        from .render import to_text

        return to_text(self)

    def _repr_html_(self) -> str:
        from .render_html import to_html

        return to_html(self)


def describe(site: Site) -> str:
    """One line about a site: status, family, place, and the reason if it was not fused."""
    place = " ".join(part for part in (site.source, f"({site.module})" if site.module else None) if part)
    text = f"{site.status.value:16} {site.family:22} {place or site.id}"
    if site.status is Status.FUSED:
        return text + f": {site.rule}"
    return text + (f": {site.reason.stage}/{site.reason.code}: {site.reason.message}" if site.reason else "")


def _chooser(name: str) -> Callable[[Site], bool]:
    words = set(name.split("_"))

    def chosen(site: Site) -> bool:
        names = [site.family, site.rule or ""]
        return name in names or (name not in (*FAMILIES, *SEAMS) and any(words <= set(n.split("_")) for n in names))

    return chosen


T = TypeVar("T")
LISTS = ("sites", "seams")  # of a graph, kept apart from it in JSON


def _entry(graph: Graph, site: Site) -> dict[str, Any]:
    return {"graph": graph.index, **asdict(site), "status": site.status.value}


def _make(cls: type[T], data: Mapping[str, Any]) -> T:
    known = {f.name for f in fields(cls)} - set(LISTS)  # type: ignore[arg-type]
    return cls(**{key: value for key, value in data.items() if key in known})


def _site(data: Mapping[str, Any]) -> Site:
    site = _make(Site, data)
    site.status = Status(data["status"])
    site.reason = _make(Reason, data["reason"]) if data.get("reason") else None
    site.attempts = [_make(Reason, reason) for reason in data.get("attempts", ())]
    site.passed_over = [_make(Reason, reason) for reason in data.get("passed_over", ())]
    return site
