"""`cutlass` comes without JAX, and whoever wants `cutlass.jax` gets it with JAX. The packages are stand-ins."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dkfuse.kernels import cute_ahead, cutlass_import

NAMES = ("cutlass", "jax")


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A `cutlass` that loads its `jax` as 4.6.0 does, and a `jax`."""
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in NAMES}
    for name in kept:
        del sys.modules[name]
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("")
    (tmp_path / "cutlass" / "jax").mkdir(parents=True)
    (tmp_path / "cutlass" / "__init__.py").write_text("from . import jax as jax\nloaded = True\n")
    (tmp_path / "cutlass" / "jax" / "__init__.py").write_text(
        "try:\n    import jax\nexcept ImportError:\n    found = False\nelse:\n    from .primitive import found\n"
    )
    (tmp_path / "cutlass" / "jax" / "primitive.py").write_text("found = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in NAMES]:
        del sys.modules[name]
    sys.modules.update(kept)


def test_jax_is_not_loaded() -> None:
    path = list(sys.meta_path)
    cutlass_import.import_cutlass()
    assert sys.modules["cutlass"].loaded and "jax" not in sys.modules
    assert sys.meta_path == path


@pytest.mark.parametrize("how", ["import cutlass.jax", "from cutlass import jax", "import cutlass; cutlass.jax"])
def test_who_asks_gets_it_with_jax(how: str) -> None:
    cutlass_import.import_cutlass()
    exec(how, {})
    import cutlass  # type: ignore[import-not-found]

    assert cutlass.jax.found and "jax" in sys.modules
    with pytest.raises(AttributeError, match="module 'cutlass' has no attribute 'missing'"):
        cutlass.missing  # noqa: B018


@pytest.mark.parametrize("first", NAMES)
def test_a_process_that_has_one_of_them_is_left_alone(first: str) -> None:
    importlib.import_module(first)
    cutlass_import.import_cutlass()
    assert "cutlass.jax" in sys.modules or first == "jax"
    import cutlass

    assert cutlass.jax.found, "JAX was there, or was loaded"


def test_other_threads_find_jax(packages: Path) -> None:
    (packages / "cutlass" / "__init__.py").write_text(
        "import threading\ndef other():\n    import jax\n"
        "thread = threading.Thread(target=other)\nthread.start()\nthread.join()\nfrom . import jax as jax\n"
    )
    cutlass_import.import_cutlass()
    assert "jax" in sys.modules, "the thread found it"


def test_a_getattr_of_theirs_is_kept(packages: Path) -> None:
    with (packages / "cutlass" / "__init__.py").open("a") as file:
        file.write("def __getattr__(name):\n    return name.upper()\n")
    cutlass_import.import_cutlass()
    import cutlass

    assert cutlass.other == "OTHER" and cutlass.jax.found


def test_what_fails_leaves_nothing_behind(packages: Path) -> None:
    (packages / "cutlass" / "__init__.py").write_text("raise OSError('no libcuda')")
    path = list(sys.meta_path)
    with pytest.raises(OSError, match="no libcuda"):
        cutlass_import.import_cutlass()
    assert sys.meta_path == path
    cute_ahead.imported()  # it is raised again where the package is needed


def test_packages_of_kernels_find_it(monkeypatch: pytest.MonkeyPatch, packages: Path) -> None:
    (packages / "kernels_of_theirs.py").write_text("import cutlass")
    monkeypatch.delitem(sys.modules, "kernels_of_theirs", raising=False)
    thread = threading.Thread(target=cute_ahead._import, args=(("kernels_of_theirs",),))
    thread.start()
    thread.join()
    assert "kernels_of_theirs" in sys.modules and "jax" not in sys.modules
    monkeypatch.delitem(sys.modules, "kernels_of_theirs")


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_looked_for_meanwhile(packages: Path, enabled: bool) -> None:
    (packages / "cutlass" / "__init__.py").write_text("import gc\ncollects = gc.isenabled()\n")
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        cutlass_import.import_cutlass()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert not sys.modules["cutlass"].collects
