"""Kernels that helpers compile while Inductor works, tried when it is done.

A seam chooses a kernel of another library's before it is known whether that can be built here. Inside of `deferred` it
leaves that to a helper and `add`s what is to be tried; `failed` tries it. A kernel that failed is known by then to the
seam that chose it, and the graph is compiled again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar

Attempts = dict[Hashable, Callable[[], "str | None"]]  # what goes wrong when a kernel is tried

_attempts: ContextVar[Attempts | None] = ContextVar("dkfuse_attempts", default=None)


@contextlib.contextmanager
def deferred() -> Iterator[Attempts]:
    """What is left to helpers inside the block, for `failed`."""
    found: Attempts = {}
    token = _attempts.set(found)
    try:
        yield found
    finally:
        _attempts.reset(token)


def add(key: Hashable, submit: Callable[[], bool], attempt: Callable[[], str | None]) -> bool:
    """Whether a helper builds a kernel, which is then to be tried by `attempt`; False: it is to be tried now."""
    found = _attempts.get()
    if found is None or not submit():
        return False
    found[key] = attempt
    return True


def failed(attempts: Attempts) -> bool:
    """Try the kernels of a `deferred` block, which waits for them; True where one failed.

    The last first: what no helper has begun is built here meanwhile.
    """
    results = [attempts[key]() for key in reversed(attempts)]
    return any(result is not None for result in results)
