"""CuTe DSL's package `cutlass` and what is written in it, imported without JAX and without collecting garbage.

`cutlass` imports `cutlass.jax`, and that JAX where it is installed: about a second, at every start of a process, for an
interface that no kernel here uses. In a process that has loaded neither, `import_cutlass` has it find no JAX, and then
forgets `cutlass.jax`: who asks for that gets it as if nothing had been, with JAX.

The packages make so many classes that Python looks for garbage again and again, among all objects of torch and of the
model: half of the time of their import.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PART = "cutlass.jax"


class _NoJax(MetaPathFinder):
    """No JAX for the thread that made this."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "jax" and threading.get_ident() == self.thread:
            raise ModuleNotFoundError("No module named 'jax'", name="jax")
        return None


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Inside, Python does not look for garbage, unless somebody asks it to."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def import_cutlass() -> None:
    """Import `cutlass` if it is not. Raises what its import raises."""
    if "cutlass" not in sys.modules and "jax" not in sys.modules:
        with without_collections():
            _without_jax()


def _without_jax() -> None:
    finder = _NoJax()
    sys.meta_path.insert(0, finder)
    try:
        package = importlib.import_module("cutlass")
    finally:
        sys.meta_path.remove(finder)
    parts = [name for name in list(sys.modules) if name == PART or name.startswith(f"{PART}.")]
    if not parts:
        return
    for name in parts:
        del sys.modules[name]
    vars(package).pop("jax", None)
    others = vars(package).get("__getattr__")

    def get(name: str) -> Any:
        if name == "jax":
            return importlib.import_module(PART)
        if others is not None:
            return others(name)
        raise AttributeError(f"module 'cutlass' has no attribute {name!r}")

    package.__getattr__ = get  # type: ignore[method-assign]
