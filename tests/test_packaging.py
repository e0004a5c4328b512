"""Installed as wheel, editable or not at all, in the repository root or elsewhere, beside Hugging Face's `kernels`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"fusion_pass": "dkfuse", "patterns": "dkfuse/patterns", "kernels": "dkfuse/kernels"}
FORBIDDEN = ("torch", "triton", "cutlass", "sgl_kernel", "flashinfer", "rich", "typer", "jinja2", "diffusers")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks of the project, so that builds leave nothing in the real checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "dkfuse.py"):
        shutil.copy(ROOT / name, copy / name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every installed package but dkfuse: links to the entries of site-packages."""
    import torch

    folder = tmp_path_factory.mktemp("others")
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if "dkfuse" not in entry.name and entry.name != "kernels" and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as an installer would."""
    return _built("build_wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def editable(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The editable wheel, unpacked."""
    return _built("build_editable", checkout, tmp_path_factory.mktemp("editable"))


def _built(hook: str, checkout: Path, folder: Path) -> Path:
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=checkout, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    zipfile.ZipFile(built).extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in for Hugging Face's distribution `kernels`."""
    folder = tmp_path_factory.mktemp("hugging_face")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("get_kernel = 'the one of Hugging Face'\n")
    return folder


Runner = Callable[..., dict]


@pytest.fixture
def run(others: Path, tmp_path: Path) -> Runner:
    def run(code: str, *sites: Path, cwd: Path | None = None, path: tuple[Path, ...] = ()) -> dict:
        """Run code that fills the dict `found`, with these site folders, in an interpreter without others."""
        prepare = "import json, site, sys\nfound = {}\n" + "".join(f"site.addsitedir({str(s)!r})\n" for s in sites)
        program = prepare + textwrap.dedent(code) + "\nprint(json.dumps(found))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, others])), "PYTHONSAFEPATH": ""}
        command = [sys.executable, "-S", "-c", program]
        done = subprocess.run(command, cwd=cwd or tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


IMPORTS = """
    import dkfuse, dkfuse.patterns, dkfuse.kernels, dkfuse.settings
    found["files"] = [dkfuse.settings.__file__, dkfuse.patterns.__file__, *dkfuse.kernels.__path__]
    from importlib.metadata import entry_points, version
    found["version"] = version("dkfuse") == dkfuse.__version__
    found["entry"] = [e.value for e in entry_points(group="torch_dynamo_backends") if e.name == "dkfuse"]
"""


@pytest.mark.parametrize("how", ["wheel", "editable", "bare, in the root", "bare, on PYTHONPATH"])
def test_every_package_is_importable(how: str, request: pytest.FixtureRequest, run: Runner, checkout: Path) -> None:
    if how in ("wheel", "editable"):
        found = run(IMPORTS, request.getfixturevalue(how))
    elif how == "bare, in the root":
        found = run(IMPORTS, cwd=checkout)
    else:
        found = run(IMPORTS, path=(checkout,))
    home = request.getfixturevalue("wheel") if how == "wheel" else checkout
    assert all(Path(file).is_relative_to(home) for file in found["files"]), found
    assert found["entry"] == ["dkfuse.backend:dkfuse"]
    assert found["version"]


@pytest.mark.parametrize("how", ["wheel", "editable", "bare"])
@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_hugging_face_kernels_is_found(
    how: str, where: str, request: pytest.FixtureRequest, run: Runner, checkout: Path, hugging_face: Path
) -> None:
    sites = [] if how == "bare" else [request.getfixturevalue(how)]
    code = """
        from kernels import get_kernel
        import dkfuse.kernels
        found["kernel"] = get_kernel
    """
    path = (checkout,) if how == "bare" else ()
    found = run(code, *sites, cwd=checkout if where == "root" else None, path=(*path, hugging_face))
    assert found["kernel"] == "the one of Hugging Face"


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_our_kernels_folder_is_not_importable_by_its_own_name(
    how: str, request: pytest.FixtureRequest, run: Runner
) -> None:
    code = """
        import importlib.util
        found["names"] = [n for n in ("kernels", "patterns", "fusion_pass") if importlib.util.find_spec(n)]
    """
    assert run(code, request.getfixturevalue(how))["names"] == []


def test_hugging_face_libraries_do_not_take_our_folder_for_their_kernels(run: Runner, checkout: Path) -> None:
    pytest.importorskip("diffusers")
    code = """
        import diffusers.utils.import_utils, transformers.utils.import_utils
        found["available"] = [
            bool(diffusers.utils.import_utils.is_kernels_available()),
            bool(transformers.utils.import_utils.is_kernels_available()),
        ]
        from diffusers import FluxTransformer2DModel
    """
    assert run(code, cwd=checkout)["available"] == [False, False]


def test_wheel_holds_every_module_and_nothing_else(wheel: Path, checkout: Path) -> None:
    packed = {str(f.relative_to(wheel)) for f in wheel.rglob("*") if f.is_file() and ".dist-info" not in str(f)}
    expected = {
        f"{FOLDERS[folder]}/{file.relative_to(checkout / folder).as_posix()}"
        for folder in FOLDERS
        for file in (checkout / folder).rglob("*")
        if file.is_file()
    }
    assert packed == expected


def test_console_script_and_metadata(wheel: Path) -> None:
    (info,) = wheel.glob("*.dist-info")
    installed = metadata.PathDistribution(info)
    scripts = {point.name: point.value for point in installed.entry_points.select(group="console_scripts")}
    assert scripts == {"dkfuse": "dkfuse.cli.main:main"}
    assert {"cute", "sgl", "flashinfer", "attention", "diffusers", "all", "test"} <= set(
        installed.metadata.get_all("Provides-Extra")
    )
    assert installed.metadata["License-Expression"] == "Apache-2.0"


def test_string_backend_needs_no_import(wheel: Path, run: Runner) -> None:
    code = """
        import torch
        def scale(x, s):
            return torch.nn.functional.layer_norm(x, (32,)) * (1 + s)
        options = {"dkfuse.remainder": "eager"}
        x, s = torch.randn(4, 32), torch.randn(32)
        with torch.no_grad():
            compiled = torch.compile(scale, backend="dkfuse", options=options)(x, s)
        found["close"] = torch.allclose(compiled, scale(x, s), atol=1e-5)
    """
    assert run(code, wheel)["close"]


def test_module_is_the_command(run: Runner, checkout: Path, others: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(others)}
    command = [sys.executable, "-S", "-m", "dkfuse", "--version"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout[:7]) == (0, "dkfuse "), done.stderr


def test_import_is_light(wheel: Path, run: Runner) -> None:
    code = f"""
        import dkfuse
        dkfuse.Coverage, dkfuse.Settings
        found["loaded"] = [name for name in {FORBIDDEN} if name in sys.modules]
    """
    assert run(code, wheel)["loaded"] == []


def test_import_takes_less_than_300_ms_beyond_torch(wheel: Path, run: Runner) -> None:
    code = """
        import time, torch
        start = time.perf_counter()
        import dkfuse
        found["seconds"] = time.perf_counter() - start
    """
    assert min(run(code, wheel)["seconds"] for _ in range(2)) < 0.3
