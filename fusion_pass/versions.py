"""Which torch releases dkfuse supports, and which of them its tests ran on."""

from __future__ import annotations

import re
import warnings

from .errors import UnsupportedTorchError, UntestedTorchWarning

OLDEST_TORCH = (2, 11)
TESTED_TORCH = ((2, 11), (2, 14))  # first and last release that the tests pass on


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version string: "2.13.0+cpu" -> (2, 13). ValueError for anything else."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"{version!r} is not a version number")
    return int(match[1]), int(match[2])


def check_torch(version: str) -> bool:
    """Whether this torch is in the tested range. Raises UnsupportedTorchError below the oldest supported release.

    A newer release is allowed and warned about once per process.
    """
    found = release(version)
    if found < OLDEST_TORCH:
        raise UnsupportedTorchError(
            f"dkfuse needs torch >= {_dotted(OLDEST_TORCH)}, found {version}: "
            f"pip install 'torch>={_dotted(OLDEST_TORCH)}', or compile with backend=\"inductor\""
        )
    if found <= TESTED_TORCH[1]:
        return True
    if found not in _warned:
        _warned.add(found)
        warnings.warn(
            f"dkfuse was tested up to torch {_dotted(TESTED_TORCH[1])}, found {version}: sites that it no longer "
            "recognises are left to Inductor; see `dkfuse coverage`",
            UntestedTorchWarning,
            stacklevel=2,
        )
    return False


_warned: set[tuple[int, int]] = set()


def _dotted(found: tuple[int, int]) -> str:
    return f"{found[0]}.{found[1]}"
