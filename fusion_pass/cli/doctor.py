"""What `dkfuse doctor` finds out: versions, devices, folders, settings, and what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from dkfuse.kernels.packages import installed

from ..settings import OTHER_VARIABLES, Settings, unknown_variables
from ..version import __version__
from ..versions import OLDEST_TORCH, TESTED_TORCH, release


@dataclass
class Check:
    """One line: what, its version or state, and if something is wrong or absent, how to change that.

    `state` is "ok", "optional" (absent, and nothing needs it here), "warning" or "error".
    """

    name: str
    value: str
    state: str = "ok"
    hint: str = ""


@dataclass
class Diagnosis:
    """Everything `dkfuse doctor` prints."""

    software: list[Check] = field(default_factory=list)
    devices: list[Check] = field(default_factory=list)
    folders: list[Check] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def checks(self) -> list[Check]:
        return [*self.software, *self.devices, *self.folders]

    @property
    def usable(self) -> bool:
        """Whether dkfuse can compile anything here."""
        return not self.problems and all(check.state != "error" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "usable": self.usable}


def diagnose(environ: Mapping[str, str] = os.environ) -> Diagnosis:
    """Look at this machine. Raises nothing: what cannot be found out is a line that says so."""
    driver = _driver()
    found = Diagnosis(_software(has_gpu=driver is not None), _devices(driver), _folders(environ))
    try:
        settings = Settings.read(environ=environ)
    except ValueError as error:
        settings = Settings()
        found.problems.append(str(error))
    found.settings = [row._asdict() for row in settings.table()]
    for name in unknown_variables(environ):
        found.folders.append(Check(name, "set, but means nothing", "warning", "see the table of settings"))
    for name, text in OTHER_VARIABLES.items():
        origin = "environment" if name in environ else "default"
        row = {"option": "", "variable": name, "default": None, "value": environ.get(name), "origin": origin}
        found.settings.append({**row, "help": text})
    return found


def _software(has_gpu: bool) -> list[Check]:
    home = Path(__file__).parents[1]
    checks = [Check("dkfuse", f"{__version__} in {home}"), Check("python", platform.python_version())]
    checks += [_torch(), _registered(), _triton(has_gpu), _compiler(has_gpu)]
    from dkfuse.kernels.providers import BUILT_IN, in_range

    tested = {p.title: p.tested for p in BUILT_IN.values() if p.tested is not None}
    for name, distributions, extra in (
        *((p.title, p.distributions, p.name) for p in BUILT_IN.values() if p.tested is not None),
        ("diffusers", ("diffusers",), "diffusers"),
        ("transformers", ("transformers",), "diffusers"),
        ("accelerate", ("accelerate",), "diffusers"),
    ):
        version = installed(*distributions)
        limits = tested.get(name)
        if version and limits and not in_range(version, limits):
            hint = f"{limits[0]} to {limits[1]} are tested, its kernels are not used: pip install 'dkfuse[{extra}]'"
            checks.append(Check(name, version, "warning", hint))
        elif version:
            checks.append(Check(name, version))
        else:
            needed = "optional; the zoo needs it" if extra == "diffusers" else "optional"
            checks.append(Check(name, "not installed", "optional", f"pip install 'dkfuse[{extra}]' ({needed})"))
    return [*checks, _attention(), _gemm()]


def _gemm() -> Check:
    from dkfuse.kernels.gemm_kernels import INSTALL, untested, version

    name, found = "quack (GEMMs on sm90)", version()
    if found is None:
        return Check(name, "not installed", "optional", f"{INSTALL} (optional; comes with FlashAttention 4)")
    if (problem := untested()) is not None:
        return Check(name, found, "warning", problem)
    return Check(name, found)


def _attention() -> Check:
    from dkfuse.kernels.attention_kernels import untested, version_of

    name, version = "FlashAttention 4", version_of("fa4")
    if version is None:
        return Check(name, "not installed", "optional", "pip install 'dkfuse[attention]' (optional)")
    if (problem := untested("fa4")) is not None:
        return Check(name, version, "warning", problem)
    return Check(name, version)


def _torch() -> Check:
    version = installed("torch")
    oldest, tested = (".".join(map(str, v)) for v in (OLDEST_TORCH, TESTED_TORCH[1]))
    if version is None:
        return Check("torch", "not installed", "error", f"pip install 'torch>={oldest}'")
    try:
        found = release(version)
    except ValueError:
        return Check("torch", version, "warning", f"not a version number; tested are {oldest} to {tested}")
    if found < OLDEST_TORCH:
        return Check("torch", version, "error", f"too old: pip install 'torch>={oldest}'")
    if found > TESTED_TORCH[1]:
        hint = f"newer than the tested {tested}: compare `dkfuse coverage` with a baseline"
        return Check("torch", version, "warning", hint)
    return Check("torch", f"{version} (tested: {oldest} to {tested})")


def _registered() -> Check:
    names = [point.value for point in metadata.entry_points(group="torch_dynamo_backends") if point.name == "dkfuse"]
    if names:
        return Check('backend="dkfuse"', "registered")
    hint = "pip install -e . in the checkout, or pass backend=dkfuse.dkfuse"
    return Check('backend="dkfuse"', "not registered with torch", "warning", hint)


def _triton(has_gpu: bool) -> Check:
    from dkfuse.kernels.providers import BUILT_IN

    version = BUILT_IN["triton"].version
    if version and importlib.util.find_spec("triton") is not None:
        return Check("triton", version)
    if has_gpu:
        return Check("triton", "not installed", "error", "install a CUDA build of torch, which brings its own triton")
    return Check("triton", "not installed", "optional", "pip install triton (without a GPU only its interpreter runs)")


def _compiler(has_gpu: bool) -> Check:
    from dkfuse.kernels.shared_library import compiler

    try:
        return Check("C compiler", compiler())
    except OSError as error:
        needed = "Triton builds launchers with it, and CuTe DSL kernels are linked to be kept"
        return Check("C compiler", "not found", "warning" if has_gpu else "optional", f"{error}; {needed}")


def _driver() -> list[list[str]] | None:
    """One row (name, driver version, memory) per NVIDIA GPU, None where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()] or None


def _devices(driver: list[list[str]] | None) -> list[Check]:
    try:
        import torch
    except ImportError:
        return []
    checks = [Check("NVIDIA driver", driver[0][1]) if driver else Check("NVIDIA driver", "not found", "optional")]
    if not torch.cuda.is_available():
        if driver:
            checks.append(Check("GPU", f"{driver[0][0]}, not usable by torch", "error", _cuda_hint(torch)))
        else:
            hint = "kernels run as plain PyTorch; `dkfuse coverage --target sm90` still plans for a GPU"
            checks.append(Check("GPU", "none", "optional", hint))
        return checks
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        target = f"sm{properties.major}{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        check = Check(f"GPU {index}", f"{properties.name}, {target}, {memory}, {built}")
        if torch.version.hip is None and properties.major < 8:
            check.state, check.hint = "warning", "older than sm80: every site is left to Inductor"
        checks.append(check)
    return checks


def _cuda_hint(torch: Any) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build: pip install torch from the CUDA index"
    return f"torch is built for CUDA {torch.version.cuda}; is the driver new enough and CUDA_VISIBLE_DEVICES right?"


def _folders(environ: Mapping[str, str]) -> list[Check]:
    inductor = environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not inductor:
        try:
            from ..compat import cache_folder

            inductor = cache_folder()
        except (ImportError, OSError) as error:
            return [Check("caches", "unknown", "warning", f"Inductor's cache folder cannot be made: {error}")]
    triton = environ.get("TRITON_CACHE_DIR") or str(Path(inductor) / "triton")
    own = Path(environ.get("DKFUSE_CACHE_DIR") or Path(inductor) / "dkfuse")
    folders = (
        ("Inductor cache", inductor),
        ("Triton cache", triton),
        ("coverage records", str(own / "records")),
        ("compiled kernels", str(own / "kernels")),
    )
    return [_folder(name, Path(path)) for name, path in folders]


def _folder(name: str, path: Path) -> Check:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check(name, str(path), "warning", "not writable: every start compiles anew")
    free = shutil.disk_usage(existing).free
    if free < 1 << 30:
        return Check(name, str(path), "warning", f"only {free >> 20} MiB free")
    return Check(name, str(path) + ("" if path.exists() else " (not there yet)"))
