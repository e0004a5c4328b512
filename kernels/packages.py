"""Installed packages, and whether a version lies between two others."""

from __future__ import annotations

import functools
import re
from importlib import metadata


@functools.cache
def installed(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed, as it was when first asked; None: none is."""
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def between(version: str, tested: tuple[str, str]) -> bool:
    """Whether `version` is one from the first to the last, pre-releases told apart and local parts ignored.

    >>> between("4.0.0b20", ("4.0.0b20", "4.0.0b20")), between("4.0.0b21+cu13", ("4.0.0b20", "4.0.0b20"))
    (True, False)
    """
    return _numbers(tested[0]) <= _numbers(version) <= _numbers(tested[1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])))
