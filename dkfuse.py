"""`import dkfuse` in a bare checkout: nothing is installed, and this folder is the current one or on PYTHONPATH.

The packages live in `fusion_pass/`, `patterns/` and `kernels/`; this file puts the first in its own place under the
name `dkfuse`, and tells importlib.metadata about the entry point, so that `backend="dkfuse"` works after the import.
Wheels do not contain it, and an editable install finds the folders by itself.
"""

import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ENTRY_POINTS = "[torch_dynamo_backends]\ndkfuse = dkfuse.backend:dkfuse\n"


class _Checkout(Distribution):
    def read_text(self, filename: str) -> str | None:
        if filename == "entry_points.txt":
            return ENTRY_POINTS
        if filename in ("METADATA", "PKG-INFO"):
            version = sys.modules["dkfuse"].__version__
            return f"Metadata-Version: 2.1\nName: dkfuse\nVersion: {version}\n"
        return None

    def locate_file(self, path: str) -> Path:  # type: ignore[override]
        return FOLDER / path


class _Finder(DistributionFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        return None  # modules are found in the usual way

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        if context is None or context.name in (None, "dkfuse"):
            yield _Checkout()


if __name__ == "__main__":  # python -m dkfuse
    from dkfuse.cli.main import main

    main()
else:
    package = FOLDER / "fusion_pass"
    spec = importlib.util.spec_from_file_location(
        __name__, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[__name__] = module
    spec.loader.exec_module(module)
    sys.meta_path.append(_Finder())
