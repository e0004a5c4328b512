"""Launches timed without a GPU: a clock that tests set, and the launches that graphs were lowered to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dkfuse import compat
from dkfuse.choosing import tuning, tuning_clock
from dkfuse.kernels.launch import Launch

INF = float("inf")
SLOW = 100.0


class Clock:
    """What is timed takes `SLOW` us, candidate i the times that `of[i]` says. `series`: what was timed, in order."""

    def __init__(self) -> None:
        self.of: dict[int, tuple[float, float]] = {}
        self.memory = True
        self.series: list[list[Launch]] = []
        self.tensors: list[dict[str, Any]] = []

    def __call__(self, launches: Sequence[Launch], tensors: Mapping[str, Any]) -> list[tuple[float, float]] | None:
        self.series.append(list(launches))
        self.tensors.append(dict(tensors))
        return [self.of.get(i, (SLOW, SLOW)) for i in range(len(launches))] if self.memory else None


def on_a_gpu(monkeypatch: Any, folder: Any) -> Clock:
    """Under max-autotune on a machine whose GPU is this clock; nothing is known beforehand."""
    clock = Clock()
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "on_gpu", lambda tensors: True)
    monkeypatch.setattr(compat, "autotunes_pointwise", lambda: True)
    monkeypatch.setattr(tuning_clock, "times", clock)
    monkeypatch.setenv("DKFUSE_CACHE_DIR", str(folder))
    return clock


def configured(node: fx.Node) -> tuple[int, dict[str, Any], str]:
    """Of a kernel node: the warps, constants and source that Inductor generates code from."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
    (config,) = kernel.configs
    return config.num_warps, constants, kernel.fn.src


def run_by_filling(value: float) -> Callable[[Launch, Mapping[str, torch.Tensor]], None]:
    """In the place of a launch: every tensor that it is given is overwritten."""

    def run(launch: Launch, tensors: Mapping[str, torch.Tensor]) -> None:
        for name in launch.tensors.values():
            tensors[name].fill_(value)

    return run
