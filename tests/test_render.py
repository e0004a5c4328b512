"""Coverage as text, markdown, HTML and JSON, and the files it is written to."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dkfuse.reporting import summary
from dkfuse.reporting.render import FORMATS, format_of, render, to_markdown, to_text, write
from dkfuse.reporting.render_html import to_html
from dkfuse.reporting.report import Coverage, Graph, Reason, Site, Status


def test_groups(sample: Coverage) -> None:
    families = summary.by_family(sample)
    assert [(f.name, len(f.sites), f.fused) for f in families] == [
        ("norm_modulate", 3, 3),
        ("residual_norm", 1, 0),
        ("gated_residual", 1, 1),
        ("scale_shift", 1, 0),
        ("other_norm", 1, 0),
    ]
    assert families[0].sources() == "model.py:10 ×2, :11"
    assert families[2].absorbed == 1
    reasons = summary.by_reason(sample)
    assert [(r.stage, r.code, len(r.sites)) for r in reasons] == [
        ("kernel", "pointwise", 1),
        ("semantics", "escapes", 1),
        ("structure", "no_rule", 1),
    ]
    assert summary.traffic(sample.sites) == summary.Traffic(300_000_000, 150_000_000)


def test_a_group_shows_the_message_that_most_of_its_sites_have() -> None:
    reasons = [Reason("kernel", "not_faster", f"{rows} rows", "gemm") for rows in (128, 4096, 4096, 512)]
    sites = [Site(str(i), "gemm_kernel", Status.LEFT_TO_INDUCTOR, reason=r) for i, r in enumerate(reasons)]
    (group,) = summary.by_reason(Coverage(graphs=[Graph(0, 1, 0.1, sites=sites)]))
    assert (group.message, group.variants) == ("4096 rows", 3)


def test_headline(sample: Coverage) -> None:
    expected = "4 of 7 sites fused (57.1 %) by 3 kernel calls; their memory traffic: 300 MB op by op, 150 MB fused"
    expected += "; 1 of 3 graphs passed through unchanged"
    assert summary.headline(sample) == expected
    assert "no norm or gated residual" in summary.headline(Coverage())


@pytest.mark.parametrize(("share", "text"), [(1, "100 %"), (0.99999, "99.9 %"), (0.5, "50.0 %"), (0, "0.0 %")])
def test_percent_is_never_rounded_up_to_all(share: float, text: str) -> None:
    assert summary.percent(share) == text


@given(st.integers(0, 10**14))
def test_byte_text_is_short(number: int) -> None:
    text = summary.bytes_text(number)
    value, unit = text.split()
    assert unit in ("B", "kB", "MB", "GB", "TB")
    assert len(text) <= 8
    assert "e" not in value
    assert abs(float(value) * 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit) - number) <= number * 0.006


@pytest.mark.parametrize("width", [60, 80, 120])
def test_text(sample: Coverage, width: int) -> None:
    text = to_text(sample, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    for part in ("toy <model>", "norm_modulate", "semantics/escapes", "'add<1>' |", "training", "in a wider one"):
        assert part in text or width == 60
    assert str(sample).startswith("dkfuse coverage: toy <model>")


def test_markdown_tables_are_well_formed(sample: Coverage) -> None:
    lines = to_markdown(sample).splitlines()
    tables = [[line for line in lines if line.startswith("|")]]
    for line in tables[0]:
        assert line.replace("\\|", "").count("|") in (6, 7), line
    assert "'add&lt;1>' \\| reads" in "\n".join(lines)
    assert "- graph 2: training" in lines


class _Page(HTMLParser):
    VOID = frozenset({"meta", "input", "br", "wbr"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.rows: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "tr" and "data-status" in dict(attrs):
            self.rows.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_one_well_formed_file(sample: Coverage) -> None:
    text = to_html(sample)
    page = _Page(text)
    assert page.open == []
    assert page.links == []
    assert "http" not in text
    assert [row["data-status"] for row in page.rows] == [site.status.value for site in sample.sites]
    assert "toy &lt;model&gt;" in text
    assert "<model>" not in text
    assert "add&lt;1&gt;" in text


@pytest.mark.parametrize("coverage", [Coverage(), Coverage("x", graphs=[Graph(0, 3, 0.0, note="disabled")])])
@pytest.mark.parametrize("format", FORMATS)
def test_reports_without_sites(coverage: Coverage, format: str) -> None:
    text = render(coverage, format)
    assert text.endswith("\n") or format == "html"
    if coverage.graphs:
        assert "disabled" in text
    if format == "html":
        assert _Page(text).open == []


@pytest.mark.parametrize("format", ["text", "html", "markdown"])
def test_regressions_are_shown(sample: Coverage, format: str) -> None:
    gone, lost = sample.sites[0], sample.sites[4]
    text = render(sample, format, [gone, lost])
    assert "egression" in text
    assert "was fused by norm_modulate" in text


def test_unknown_format(sample: Coverage) -> None:
    with pytest.raises(ValueError, match="unknown report format 'pdf': give one of text, json, html, markdown"):
        render(sample, "pdf")


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.html", "html"), ("a.HTM", "html"), ("a.md", "markdown"), ("a.txt", "text"), ("a.json", "json"), ("a", "json")],
)
def test_format_by_extension(name: str, format: str) -> None:
    assert format_of(name) == format


def test_write_is_atomic_and_leaves_nothing_behind(
    sample: Coverage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.json"
    write(sample, target)
    write(sample, target)
    assert Coverage.from_json(target.read_text()) == sample
    assert os.listdir(tmp_path) == ["report.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    sample.model = "changed"
    with pytest.raises(OSError, match="No space left"):
        write(sample, target)
    assert "changed" not in target.read_text()
    assert os.listdir(tmp_path) == ["report.json"]


def test_write_to_what_is_no_file(sample: Coverage, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write(sample, tmp_path)
    with pytest.raises(FileNotFoundError):
        write(sample, tmp_path / "missing" / "report.json")


def test_every_status_has_a_colour() -> None:
    from dkfuse.reporting.render import COLOURS

    page = to_html(Coverage())
    for status in Status:
        assert status in COLOURS
        assert f".{status.value} {{ --c:" in page


def test_several_graphs_are_told() -> None:
    """Layerwise casting leaves all linears to eager mode, and a report of what is left of the model looks healthy."""
    graphs = [Graph(i, 10, 0.1) for i in range(28)]
    assert summary.notes(Coverage(graphs=graphs[:1])) == []
    (note,) = summary.notes(Coverage(graphs=graphs))
    assert note.startswith("28 graphs: what a model runs between them") and "TORCH_LOGS=graph_breaks" in note
