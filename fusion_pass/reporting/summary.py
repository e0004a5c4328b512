"""Groups of sites that the text, markdown and HTML reports show: by family and rule, and by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .report import FAMILIES, SEAMS, Coverage, Site, Status


@dataclass
class Group:
    """Sites that share a name: a family, or within a family a rule (fused) or a status (not fused)."""

    name: str
    sites: list[Site] = field(default_factory=list)
    rows: list[Group] = field(default_factory=list)

    @property
    def counts(self) -> Counter[Status]:
        return Counter(site.status for site in self.sites)

    @property
    def fused(self) -> int:
        return self.counts[Status.FUSED]

    @property
    def share(self) -> float:
        """Fused sites of all sites, 0 to 1."""
        return self.fused / len(self.sites) if self.sites else 0.0

    @property
    def kernels(self) -> str:
        """The providers of the fused sites: "triton", or "triton, native"."""
        return ", ".join(name for name, _ in Counter(s.kernel for s in self.sites if s.kernel).most_common())

    @property
    def absorbed(self) -> int:
        """How many fused sites are done by the kernel of a wider site."""
        return sum(site.with_site is not None for site in self.sites)

    @property
    def status(self) -> Status | None:
        """The status that all sites share."""
        statuses = {site.status for site in self.sites}
        return statuses.pop() if len(statuses) == 1 else None

    def sources(self, limit: int = 3) -> str:
        """Where the sites stand in the model's source: "transformer_flux.py:169 ×19, :201 ×38, +2 more"."""
        return _sources((site.source for site in self.sites), limit)


NO_RULE = "no rule explains this site"


@dataclass
class ReasonGroup:
    """Sites that were not fused for the same reason."""

    status: Status
    stage: str
    code: str
    sites: list[Site] = field(default_factory=list)

    @property
    def message(self) -> str:
        """The one that most sites have, of several the first."""
        messages = Counter(site.reason.message if site.reason else NO_RULE for site in self.sites)
        return messages.most_common(1)[0][0]

    @property
    def families(self) -> str:
        return ", ".join(name for name, _ in Counter(site.family for site in self.sites).most_common())

    def sources(self, limit: int = 3) -> str:
        return _sources((site.source for site in self.sites), limit)

    @property
    def variants(self) -> int:
        """How many different messages the group has."""
        return len({site.reason.message for site in self.sites if site.reason})


@dataclass
class Traffic:
    """Bytes that the fused sites with known sizes move op by op, as eager does, and fused."""

    before: int = 0
    after: int = 0

    @property
    def saved(self) -> float:
        """The saved part, 0 to 1."""
        return 1 - self.after / self.before if self.before else 0.0


def by_family(coverage: Coverage) -> list[Group]:
    """One group per family in the fixed order, seams last, each with a row per rule and one per other status."""
    groups: dict[str, Group] = {}
    for site in (*coverage.sites, *coverage.seams):
        group = groups.setdefault(site.family, Group(site.family))
        group.sites.append(site)
        name = (site.rule or "fused") if site.status is Status.FUSED else label(site.status)
        row = next((row for row in group.rows if row.name == name), None)
        if row is None:
            group.rows.append(row := Group(name))
        row.sites.append(site)
    order = {name: position for position, name in enumerate((*FAMILIES, *SEAMS))}
    statuses = list(Status)
    for group in groups.values():
        group.rows.sort(key=lambda row: (statuses.index(row.sites[0].status), -len(row.sites), row.name))
    return sorted(groups.values(), key=lambda group: (order.get(group.name, len(order)), group.name))


def by_reason(coverage: Coverage) -> list[ReasonGroup]:
    """The sites and seams that were not fused, by status, stage and code, the most frequent first."""
    groups: dict[tuple[Status, str, str], ReasonGroup] = {}
    for site in (*coverage.sites, *coverage.seams):
        if site.status is Status.FUSED:
            continue
        reason = site.reason
        stage, code = (reason.stage, reason.code) if reason else ("structure", "no_rule")
        key = (site.status, stage, code)
        groups.setdefault(key, ReasonGroup(site.status, stage, code)).sites.append(site)
    return sorted(groups.values(), key=lambda group: (-len(group.sites), group.stage, group.code))


def traffic(sites: Iterable[Site]) -> Traffic:
    """The memory traffic of the fused sites; a site without sizes counts nothing."""
    total = Traffic()
    for site in sites:
        if site.status is Status.FUSED and site.bytes_before is not None and site.bytes_after is not None:
            total.before += site.bytes_before
            total.after += site.bytes_after
    return total


def headline(coverage: Coverage) -> str:
    """The result in one sentence."""
    totals = coverage.totals
    passed = sum(graph.note is not None for graph in coverage.graphs)
    through = f"{passed} of {count(len(coverage.graphs), 'graph')} passed through unchanged"
    if not totals["sites"]:
        text = "no norm or gated residual was found in " + count(len(coverage.graphs), "graph")
        return f"nothing was fused: {through}" if passed else text
    text = f"{totals['fused']} of {count(totals['sites'], 'site')} fused ({percent(totals['coverage'])})"
    if totals["fused"]:
        text += f" by {count(totals['kernels'], 'kernel call')}"
    moved = traffic(coverage.sites)
    if moved.before:
        text += f"; their memory traffic: {bytes_text(moved.before)} op by op, {bytes_text(moved.after)} fused"
    if totals["seams_taken"]:
        text += f"; {totals['seams_taken']} of {count(totals['seams'], 'seam')} to GEMMs and attention taken"
    return f"{text}; {through}" if passed else text


def about(coverage: Coverage) -> str:
    """torch, target and size of what was traced, in one line."""
    nodes = sum(graph.nodes for graph in coverage.graphs)
    seconds = sum(graph.seconds for graph in coverage.graphs)
    cached = sum(graph.from_cache for graph in coverage.graphs)
    parts = [
        f"torch {coverage.torch}" if coverage.torch else "",
        f"target {coverage.target}",
        f"{count(len(coverage.graphs), 'graph')}, {nodes:,} nodes",
        f"pass {seconds:.2f} s" if seconds else "",
        f"{cached} from cache" if cached else "",
    ]
    return " · ".join(part for part in parts if part)


def notes(coverage: Coverage) -> list[str]:
    """What is to be said about graphs, for instance that one was passed through unchanged, or that there are more."""
    by_note: dict[str, list[int]] = {}
    for graph in coverage.graphs:
        if graph.note:
            by_note.setdefault(graph.note, []).append(graph.index)
    lines = []
    for note, found in by_note.items():
        indices = ", ".join(map(str, found[:8])) + (", …" if len(found) > 8 else "")
        lines.append(f"graph{'s' if len(found) > 1 else ''} {indices}: {note}")
    if (text := timed(coverage)) is not None:
        lines.append(text)
    if len(coverage.graphs) > 1:
        text = "what a model runs between them (graph breaks, hooks that cast or move weights) is not in this report"
        lines.append(f"{len(coverage.graphs)} graphs: {text}; TORCH_LOGS=graph_breaks names the places")
    failed = Counter(r.message for site in coverage.sites for r in site.passed_over if r.code == "kernel_failed")
    return lines + [f"{count(times, 'site')}: {message}" for message, times in failed.items()]


def timed(coverage: Coverage) -> str | None:
    """What timing launch configurations brought; None where none were timed."""
    gains = [site.config_gain for site in coverage.sites if site.config_gain is not None]
    if not gains:
        return None
    faster = [gain for gain in gains if gain > 1]
    text = f"{count(len(gains), 'site')} with a timed launch configuration: "
    if not faster:
        return text + "the table's was the fastest for each"
    return text + f"{len(faster)} faster than with the table's, by up to {max(faster) - 1:.0%}"


def label(status: Status) -> str:
    """A status as words."""
    return status.value.replace("_", " ").replace("inductor", "Inductor")


def percent(share: float) -> str:
    """0.9951 -> "99.5 %"; never rounded up to 100 %."""
    return "100 %" if share == 1 else f"{min(share * 100, 99.9):.1f} %"


def count(number: int, noun: str) -> str:
    """1 -> "1 site", 2 -> "2 sites"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def bytes_text(number: int) -> str:
    """A byte count with a decimal unit and three digits."""
    value, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def shape_text(shape: Sequence[int | str]) -> str:
    """[1, 4096, 3072] -> "1×4096×3072"."""
    return "×".join(map(str, shape)) or "scalar"


def _sources(found: Iterable[str | None], limit: int) -> str:
    ranked = Counter(source for source in found if source).most_common()
    parts, file = [], None
    for source, times in ranked[:limit]:
        name, _, line = source.rpartition(":")
        short = name.replace("\\", "/").rpartition("/")[2]
        parts.append((f":{line}" if short == file else f"{short}:{line}") + (f" ×{times}" if times > 1 else ""))
        file = short
    if len(ranked) > limit:
        parts.append(f"+{len(ranked) - limit} more")
    return ", ".join(parts)
