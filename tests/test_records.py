"""Records of compiled graphs on disk: one for what is one graph, none that was only begun, and nothing left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dkfuse import compat
from dkfuse.reporting.report import Graph
from dkfuse.reporting.store import Record, graph_key
from dkfuse.settings import Settings

X = torch.ones(4)
GRAPH = Graph(index=0, nodes=3, seconds=0.1)


def key(function: Any, *inputs: Any) -> str:
    """The key of the graph that Dynamo makes of a function."""
    found: list[str] = []

    def backend(gm: torch.fx.GraphModule, values: Any) -> Any:
        found.append(graph_key(gm, values, Settings()))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*inputs)
    torch.compiler.reset()
    return found[-1]


def test_a_record_that_was_only_begun_is_begun_anew(tmp_path: Path) -> None:
    """Its process was stopped: Inductor may have the graph, under a token that nobody has a record of."""
    first, second = Record("key", str(tmp_path)), Record("key", str(tmp_path))
    assert second.stored is None and second.uuid not in (None, first.uuid)
    second.save([GRAPH], "writes into its inputs")
    third = Record("key", str(tmp_path))
    assert (third.uuid, third.once) == (second.uuid, "writes into its inputs") and third.stored == [GRAPH]


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert Record("key", str(tmp_path)).uuid is None
    assert list((tmp_path / "records").iterdir()) == []


def test_what_only_a_branch_computes_is_another_graph() -> None:
    def once(x: torch.Tensor, p: torch.Tensor) -> Any:
        return torch.cond(p, lambda x: x.sin(), lambda x: x.cos(), (x,))

    def twice(x: torch.Tensor, p: torch.Tensor) -> Any:
        return torch.cond(p, lambda x: x.sin().sin(), lambda x: x.cos(), (x,))

    given = X, torch.tensor(True)
    assert key(once, *given) == key(once, *given) != key(twice, *given)


def test_another_autocast_is_another_graph() -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    keys = {key(product, X)}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.add(key(product, X))
    assert len(keys) == 3


def test_another_cudnn_is_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 9.15 it computes some lengths wrong, and is not chosen: what a newer one was chosen for is not found."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    found = set()
    for version in (91400, 91900, 91400):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        found.add(compat.environment_fingerprint())
    assert len(found) == 2
