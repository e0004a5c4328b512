"""Errors and warnings of dkfuse. Every message is one sentence that names the value, the limit and a way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DkfuseError(Exception):
    """Base of every error that dkfuse raises on purpose."""


class SettingsError(DkfuseError, ValueError):
    """An option or environment variable is unknown or has a value that is not allowed."""


class ReportError(DkfuseError, ValueError):
    """A coverage report cannot be read: not JSON, another schema, or a field is missing."""


class ModelError(DkfuseError):
    """The model that was asked for does not exist or could not be built."""


class UnsupportedTorchError(DkfuseError, RuntimeError):
    """The installed torch is older than the oldest supported one."""


class TraceError(DkfuseError):
    """The model could not be traced; `original` is the exception that the model or Dynamo raised."""

    def __init__(self, original: BaseException) -> None:
        self.original = original
        super().__init__(f"the model could not be traced: {type(original).__name__}: {first_line(original)}")


class KernelLaunchError(DkfuseError, RuntimeError):
    """A kernel failed when it was launched, in a graph that must not be run twice on the same inputs."""


class DkfuseWarning(UserWarning):
    """Base of every warning that dkfuse emits."""


class PassedThroughWarning(DkfuseWarning):
    """A graph was left to Inductor unchanged, though the call could be made so that it is not."""


class UntestedTorchWarning(DkfuseWarning):
    """The installed torch is newer than the newest tested one."""


class KernelFailedWarning(DkfuseWarning):
    """A kernel could not be built or launched; another one, or the code it stood for, runs in its place."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's message, or its type when it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` known names closest to `name`, best first; empty when none is close."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=count, cutoff=0.5)
    by_lower = {k.lower(): k for k in known}
    return [by_lower[c] for c in close]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'?"`, or the whole list when nothing is close."""
    known = sorted(known)
    close = nearest(name, known)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(known)
