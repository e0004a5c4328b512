"""The error, and the answer of `supports`, for a call that the Triton kernels do not take."""

from __future__ import annotations


class Unsupported(Exception):
    """The Triton kernels do not take this call: `code` aggregates, `message` names the value and the limit."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __repr__(self) -> str:
        return f"Unsupported({self.code!r}, {self.message!r})"
