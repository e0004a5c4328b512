"""Results that are remembered by keys which callers make, in a dict that does not grow without end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

V = TypeVar("V")
MOST = 4096
_MISSING: Any = object()


def kept(results: dict[Any, V], key: Any, make: Callable[[], V]) -> V:
    """``results[key]``, made where it is missing; a dict with `MOST` entries is emptied for it.

    The dict is read once: between two looks another thread may have emptied it. What `make` raises is passed on, and
    nothing is kept.
    """
    found = results.get(key, _MISSING)
    if found is _MISSING:
        found = make()
        if len(results) >= MOST:
            results.clear()
        results[key] = found
    return found


__all__ = ["kept"]
