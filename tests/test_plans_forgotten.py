"""Plans and calls that are remembered in bounded dicts: another thread may clear one at any moment of a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dkfuse.kernels import cuda_rope, ops, provider_ops
from dkfuse.kernels.registry import Implementation, register
from dkfuse.kernels.rope_support import with_defaults

X = torch.ones(2, 8)


class Cleared(dict[Any, Any]):
    """A dict that somebody clears as soon as something is in it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.clear()


def test_a_call_of_a_provider(fresh_providers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: Any, outputs: Any) -> None:
        outputs["out"].fill_(2.0)

    register(Implementation("scale_shift", "mine", (), run, devices=("cpu",)))
    monkeypatch.setattr(provider_ops, "_calls", Cleared())
    assert torch.ops.dkfuse_mine.scale_shift(X, None, None, out_dtype=torch.float32)[0, 0] == 2.0


def test_a_launch_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = object()
    monkeypatch.setattr(ops, "_plans", Cleared())
    monkeypatch.setattr(ops, "_has_triton", lambda: True)
    monkeypatch.setattr(ops, "_sm_count", lambda index: 132)
    monkeypatch.setattr(ops, "plan", lambda *args, **more: planned)
    arguments = {"x": X, "scale": None, "shift": None, "scale_offset": 1.0, "out_dtype": X.dtype, "roundings": 0}
    assert ops._planned("scale_shift", arguments, {"out": X}) is planned


def test_a_launch_of_the_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(cuda_rope, "_plans", Cleared())
    monkeypatch.setattr(cuda_rope, "_plan", lambda *args: ran.append)
    cuda_rope.launch(with_defaults({"x": X, "norm": "rms", "out_dtype": X.dtype}), X)
    assert len(ran) == 1
