"""Who kernels come from: the package a provider needs, the versions that were tested, and what is there.

    triton        comes with every build of torch for a GPU
    cute          CuTe DSL: nvidia-cutlass-dsl
    cuda          CUDA C++ compiled at run time by NVRTC, which comes with torch
    sgl           sgl-kernel, also published as sglang-kernel
    flashinfer    FlashInfer
    native        the op's definition in plain torch, which Inductor compiles

A version outside of the tested range is reported and not used: the signatures of these packages change.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass

from .packages import installed
from .unsupported import Unsupported


@dataclass(frozen=True)
class Provider:
    """package: what is imported, None where nothing is; distributions: names under which it is published.

    tested: first and last release that the tests passed with, as ("4.5", "4.6"); install: the pip command's argument.
    bundled: part of torch's builds for the devices it runs on, so that planning on another machine may count on it.
    """

    name: str
    title: str
    package: str | None = None
    distributions: tuple[str, ...] = ()
    tested: tuple[str, str] | None = None
    install: str = ""
    bundled: bool = False

    @property
    def version(self) -> str | None:
        """Of the installed distribution; None where there is none."""
        return installed(*self.distributions)

    def problem(self) -> Unsupported | None:
        """Why it cannot be used here: "not_installed" or "untested_version", with the pip command."""
        if self.package is None:
            return None
        if not _importable(self.package):
            return Unsupported("not_installed", f"{self.title} is not installed: {self.command}")
        if self.tested is None:
            return None
        version = self.version
        if version is not None and in_range(version, self.tested):
            return None
        found = "of unknown version" if version is None else version
        oldest, newest = self.tested
        return Unsupported(
            "untested_version", f"{self.title} {found} is not tested, {oldest} to {newest} are: {self.command}"
        )

    @property
    def command(self) -> str:
        """How to get it."""
        return f"pip install '{self.install}'"


def in_range(version: str, tested: tuple[str, str]) -> bool:
    """Whether `version` is one of the releases from the first to the last; both stand for all that start with them.

    >>> in_range("4.6.2", ("4.5", "4.6")), in_range("4.7.0.dev1", ("4.5", "4.6"))
    (True, False)
    """
    found, oldest, newest = (_numbers(text) for text in (version, *tested))
    return bool(found) and oldest <= found and found[: len(newest)] <= newest


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


@functools.cache
def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


BUILT_IN: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(
            "triton",
            "Triton",
            "triton",
            ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"),
            install="triton",
            bundled=True,
        ),
        Provider("cute", "CuTe DSL", "cutlass", ("nvidia-cutlass-dsl",), ("4.6", "4.6"), "dkfuse[cute]"),
        Provider("cuda", "CUDA C++"),
        Provider("sgl", "sgl-kernel", "sgl_kernel", ("sglang-kernel", "sgl-kernel"), ("0.4", "0.4"), "dkfuse[sgl]"),
        Provider(
            "flashinfer", "FlashInfer", "flashinfer", ("flashinfer-python",), ("0.6", "0.6"), "dkfuse[flashinfer]"
        ),
        Provider("native", "plain torch"),
    )
}
PROVIDERS: dict[str, Provider] = dict(BUILT_IN)


def add(name: str) -> None:
    """A provider from outside; nothing is known about its package."""
    PROVIDERS.setdefault(name, Provider(name, name))


def remove(name: str) -> None:
    """Forget a provider from outside."""
    if name not in BUILT_IN:
        PROVIDERS.pop(name, None)
