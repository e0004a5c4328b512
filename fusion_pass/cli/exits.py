"""How the command line ends: exit codes, and one sentence on stderr for each error."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import typer

from ..errors import DkfuseError, ModelError, ReportError, SettingsError, UnsupportedTorchError, first_line

OK, REGRESSION, BELOW, NOT_TRACED, ENVIRONMENT, USAGE, INTERNAL = 0, 1, 2, 3, 4, 64, 70

# typer carries click inside itself or depends on it, as its version goes; either way these are its base classes.
_UsageError: Any = typer.BadParameter.__base__
_ClickError: Any = _UsageError.__base__


class Failure(Exception):
    """An error that is reported in one sentence, with its exit code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def say(message: str) -> None:
    """One line on stderr."""
    print(f"dkfuse: {message}", file=sys.stderr)


def check_writable(path: Path) -> None:
    """Fail before long work rather than after it."""
    folder = path.parent
    if path.is_dir():
        problem = "it is a folder"
    elif not folder.is_dir():
        problem = f"there is no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        problem = "permission denied"
    else:
        return
    raise Failure(ENVIRONMENT, f"cannot write {path}: {problem}")


def explain(error: Exception) -> tuple[int, str]:
    """The exit code and the sentence for an error."""
    if isinstance(error, Failure):
        return error.code, str(error)
    if isinstance(error, _ClickError):
        message = error.format_message().strip().rstrip(".")
        return USAGE, f"{message[:1].lower()}{message[1:]}; see dkfuse --help"
    if isinstance(error, (ModelError, SettingsError, ReportError)):
        return USAGE, str(error)
    if isinstance(error, UnsupportedTorchError):
        return ENVIRONMENT, str(error)
    if isinstance(error, DkfuseError):
        return INTERNAL, str(error)
    text = f"{type(error).__name__}: {first_line(error)}"
    return INTERNAL, f"internal error, please report it: {text} (DKFUSE_DEBUG=1 shows the traceback)"
