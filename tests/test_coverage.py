"""Coverage data: totals, JSON, regressions, assert_fused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dkfuse.errors import ReportError
from dkfuse.reporting.report import FAMILIES, SCHEMA, STAGES, Coverage, Graph, Reason, Site, Status

TEXT = st.text(max_size=12)
REASON = st.builds(Reason, st.sampled_from(STAGES), TEXT, TEXT, st.none() | TEXT)
SITE = st.builds(
    Site,
    id=TEXT,
    family=st.sampled_from(FAMILIES),
    status=st.sampled_from(list(Status)),
    rule=st.none() | TEXT,
    op=st.none() | TEXT,
    kernel=st.sampled_from([None, "triton", "native"]),
    reason=st.none() | REASON,
    attempts=st.lists(REASON, max_size=2),
    source=st.none() | TEXT,
    module=st.none() | TEXT,
    shapes=st.dictionaries(TEXT, st.lists(st.integers(0) | TEXT, max_size=3), max_size=2),
    dtype=TEXT,
    bytes_before=st.none() | st.integers(0),
    bytes_after=st.none() | st.integers(0),
    with_site=st.none() | TEXT,
    term=st.none() | TEXT,
)
GRAPHS = st.lists(
    st.builds(
        Graph,
        index=st.just(0),
        nodes=st.integers(0),
        seconds=st.floats(0, 1e6),
        from_cache=st.booleans(),
        note=st.none() | TEXT,
        sites=st.lists(SITE, max_size=4),
    ),
    max_size=3,
)


@st.composite
def coverages(draw: st.DrawFn) -> Coverage:
    graphs = draw(GRAPHS)
    for index, graph in enumerate(graphs):
        graph.index = index
    return Coverage(draw(st.none() | TEXT), draw(TEXT), draw(TEXT), graphs)


def site(name: str, status: Status = Status.FUSED, family: str = "norm_modulate", **more: object) -> Site:
    rule = family if status is Status.FUSED else None
    return Site(name, family, status, **{"rule": rule, **more})  # type: ignore[arg-type]


def report(*sites: Site) -> Coverage:
    return Coverage("m", "2.13.0", "cpu", [Graph(0, 10, 0.1, sites=list(sites))])


@given(coverages())
def test_json_round_trip(coverage: Coverage) -> None:
    assert Coverage.from_json(coverage.to_json()) == coverage


@given(coverages())
def test_totals_add_up(coverage: Coverage) -> None:
    totals = coverage.totals
    assert totals["sites"] == len(coverage.sites) == sum(totals[status.value] for status in Status)
    assert 0 <= totals["coverage"] <= 1
    assert totals["kernels"] <= totals["fused"]


@given(coverages())
def test_no_regression_against_itself(coverage: Coverage) -> None:
    ids = [s.id for s in coverage.sites]
    if len(ids) == len(set(ids)):
        assert coverage.regressions(coverage) == []


def test_seams_are_counted_apart() -> None:
    seams = [site("s", family="attention"), site("t", Status.LEFT_TO_INDUCTOR, family="gelu_epilogue")]
    coverage = Coverage("m", "2.13.0", "sm90", [Graph(0, 10, 0.1, sites=[site("a")], seams=seams)])
    totals = coverage.totals
    assert (totals["sites"], totals["coverage"], totals["seams"], totals["seams_taken"]) == (1, 1.0, 2, 1)
    assert Coverage.from_json(coverage.to_json()) == coverage
    coverage.assert_fused("attention", exactly=1)
    assert [s.id for s in Coverage.from_json(coverage.to_json()).regressions(coverage)] == []
    lost = Coverage("m", "2.13.0", "sm90", [Graph(0, 10, 0.1, sites=[site("a")], seams=seams[1:])])
    assert [s.id for s in lost.regressions(coverage)] == ["s"]
    assert "1 of 2 seams to GEMMs and attention taken" in str(coverage)


def test_layout_of_the_schema() -> None:
    reason = Reason("kernel", "dtype", "float64 is not supported", "norm")
    coverage = report(site("a", with_site="b"), site("b"), site("c", Status.REJECTED, reason=reason))
    data = json.loads(coverage.to_json())
    assert list(data) == ["schema", "model", "torch", "target", "graphs", "sites", "seams", "totals"]
    assert data["schema"] == SCHEMA == "dkfuse.coverage/1"
    assert data["graphs"] == [{"index": 0, "nodes": 10, "seconds": 0.1, "from_cache": False, "note": None}]
    assert data["totals"] == {
        "sites": 3,
        "fused": 2,
        "left_to_inductor": 0,
        "rejected": 1,
        "unmatched": 0,
        "coverage": 2 / 3,
        "kernels": 1,
        "seams": 0,
        "seams_taken": 0,
    }
    assert data["sites"][2]["graph"] == 0
    assert data["sites"][2]["status"] == "rejected"
    assert data["sites"][2]["reason"] == {
        "stage": "kernel",
        "code": "dtype",
        "message": "float64 is not supported",
        "rule": "norm",
    }


def test_unknown_fields_of_a_later_writer_are_ignored() -> None:
    data = report(site("a")).to_dict()
    data["later"] = data["sites"][0]["later"] = data["graphs"][0]["later"] = 1
    assert Coverage.from_dict(data) == report(site("a"))


def test_no_sites_is_no_coverage() -> None:
    assert Coverage().totals["coverage"] == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid JSON"),
        ("[]", "schema is None"),
        ('{"schema": "dkfuse.coverage/2"}', "'dkfuse.coverage/2'"),
        ('{"schema": "dkfuse.coverage/1"}', "KeyError: 'graphs'"),
        ('{"schema": "dkfuse.coverage/1", "graphs": [], "sites": [{"graph": 0}]}', "KeyError"),
        ('{"schema": "dkfuse.coverage/1", "graphs": [3], "sites": []}', "TypeError"),
    ],
)
def test_what_is_no_report(text: str, message: str) -> None:
    with pytest.raises(ReportError, match=r"not a (valid )?coverage report") as caught:
        Coverage.from_json(text)
    assert message in str(caught.value)


def test_a_wrong_status_is_no_report() -> None:
    data = report(site("a")).to_dict()
    data["sites"][0]["status"] = "melted"
    with pytest.raises(ReportError, match="melted"):
        Coverage.from_dict(data)


def test_regressions() -> None:
    before = report(site("kept"), site("lost"), site("gone"), site("never", Status.UNMATCHED))
    after = report(site("kept"), site("lost", Status.REJECTED), site("never", Status.UNMATCHED), site("new"))
    found = after.regressions(before)
    assert [(s.id, s.status) for s in found] == [("lost", Status.REJECTED), ("gone", Status.FUSED)]


def test_assert_fused_by_family_rule_and_word() -> None:
    coverage = report(
        site("a"),
        site("b", family="residual_norm_modulate", rule="residual_gate_norm_modulate"),
        site("c", family="norm"),
        site("d", Status.UNMATCHED),
    )
    coverage.assert_fused("norm_modulate", exactly=1)  # a family is that family only
    coverage.assert_fused("residual_gate_norm_modulate")  # a rule
    coverage.assert_fused("modulate", at_least=2, exactly=2)  # a word of families and rules
    coverage.assert_fused("norm", exactly=1)
    coverage.assert_fused("qk_norm", exactly=0)
    assert [s.id for s in coverage.fused()] == ["a", "b", "c"]


def test_assert_fused_explains_itself() -> None:
    reason = Reason("kernel", "inner_stride", "the last stride is 2, 1 is needed", "norm_modulate")
    where = {"source": "model.py:7", "module": "blocks.0.norm1"}
    coverage = report(site("a"), site("b", Status.REJECTED, reason=reason, **where))
    with pytest.raises(AssertionError) as caught:
        coverage.assert_fused("modulate", at_least=2)
    message = str(caught.value)
    assert "at least 2" in message
    assert "1 of 2 are fused" in message
    assert "model.py:7 (blocks.0.norm1): kernel/inner_stride: the last stride is 2, 1 is needed" in message
    with pytest.raises(AssertionError, match="exactly 0"):
        coverage.assert_fused("modulate", exactly=0)
    with pytest.raises(AssertionError, match="did you mean 'norm_modulate'"):
        coverage.assert_fused("norm_modulates")
