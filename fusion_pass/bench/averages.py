"""Medians, ratios and geometric means of measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

__all__ = ["geometric_mean", "median", "medians", "ratio"]


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """ours / theirs; None where one of them is missing or theirs is 0."""
    return ours / theirs if ours is not None and theirs else None


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean of positive values; None of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median over the rounds, key by key, largest first; a round without a key counts as 0 for it."""
    names = sorted({name for row in rounds for name in row})
    found = {name: median(row.get(name, 0.0) for row in rounds) for name in names}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
