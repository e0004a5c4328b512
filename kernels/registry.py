"""Who can run an op, and what each of them takes.

An `Implementation` is one provider's kernel for one op: its constraints as data, which the command line prints, and the
function that runs it, which is imported when it is first needed. The function writes into tensors it is given:

    run(arguments, outputs)     arguments: the op's arguments by name, tensors or values, defaults filled in
                                outputs: result name -> tensor of the result's shape, inner stride 1, any outer strides;
                                a result that nobody reads is absent

on the current stream, without synchronising, so that it can be captured in a CUDA graph. A module that `run` names may
also define `prepare(arguments, outputs)`, which builds the kernel for such a call from tensor-likes without launching.

The implementations of dkfuse are listed by `provider_<name>.py`, one for each provider of `providers`; `register` adds
one from outside.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import providers
from .support import OPERANDS
from .unsupported import Unsupported

DEVICES = ("cuda", "rocm", "xpu", "npu", "cpu")
Run = Callable[[Mapping[str, Any], Mapping[str, Any]], None]

_ENTRY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, eq=False)
class Constraint:
    """One thing that a kernel asks of a call. `text` is what the command line prints: "D % 256 == 0, D <= 8192".

    problem: what is wrong with a call, in one sentence that names the value, or None. It sees tensor-likes (also fake
    ones, with symbolic sizes) and must not guard on a symbol.
    """

    code: str
    text: str
    problem: Callable[[Mapping[str, Any]], str | None]


@dataclass(frozen=True, eq=False)
class Implementation:
    """`provider`'s kernel for `op`, for compute capabilities from `oldest` on (80, 90, ...).

    run: "module:function", imported when first needed, or a function. devices: of DEVICES; `oldest` and `newest` are
    about "cuda" alone.
    Errors: ValueError for an unknown op or device, two constraints with one code, an entry that names no function.
    """

    op: str
    provider: str
    constraints: tuple[Constraint, ...]
    run: str | Run  # "dkfuse.kernels.cute_norm:run"
    oldest: int = 80
    newest: int | None = None
    devices: tuple[str, ...] = ("cuda",)

    def __post_init__(self) -> None:
        name = f"{self.provider}'s implementation of {self.op!r}"
        if self.op not in OPERANDS:
            raise ValueError(f"{name}: dkfuse has no such op; known: {', '.join(OPERANDS)}.")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.provider):
            raise ValueError(f"{name}: a provider's name has small letters, digits and underscores.")
        codes = [constraint.code for constraint in self.constraints]
        if twice := next((code for code in codes if codes.count(code) > 1), None):
            raise ValueError(f"{name}: two constraints have the code {twice!r}; reports tell them apart by it.")
        if not callable(self.run) and not (isinstance(self.run, str) and _ENTRY.fullmatch(self.run)):
            raise ValueError(f"{name}: run is {self.run!r}; give 'module:function' or a function.")
        if unknown := set(self.devices) - set(DEVICES):
            raise ValueError(f"{name}: there is no device {min(unknown)!r}; known: {', '.join(DEVICES)}.")

    def problem(self, arguments: Mapping[str, Any]) -> Unsupported | None:
        """The first constraint that the call breaks."""
        for constraint in self.constraints:
            if (message := constraint.problem(arguments)) is not None:
                return Unsupported(constraint.code, message)
        return None

    def serves(self, target: str) -> bool:
        """Whether it runs on `target`: "sm90", "rocm", "xpu", "npu", "cpu"."""
        if not target.startswith("sm"):
            return target in self.devices
        capability = int(target[2:])
        return "cuda" in self.devices and self.oldest <= capability <= (self.newest or capability)

    def runs_on(self, device: str) -> bool:
        """Whether it runs on tensors of this device type, as torch calls it."""
        return device in self.devices or (device == "cuda" and "rocm" in self.devices)

    def load(self) -> Run:
        """The function that runs it; ImportError where the provider's package is missing or broken."""
        if not isinstance(self.run, str):
            return self.run
        module, name = self.run.split(":")
        return getattr(importlib.import_module(module), name)

    def builder(self) -> Run | None:
        """`prepare` of the module of `run`, where it has one."""
        if not isinstance(self.run, str):
            return None
        return getattr(importlib.import_module(self.run.split(":")[0]), "prepare", None)

    @functools.cached_property
    def identity(self) -> str:
        """What a cached choice of this implementation depends on beside dkfuse's own sources."""
        functions: list[Callable[..., Any]] = [constraint.problem for constraint in self.constraints]
        functions += [] if isinstance(self.run, str) else [self.run]
        parts = [self.op, self.provider, str(self.run if isinstance(self.run, str) else ""), *map(_code, functions)]
        parts += [str((self.oldest, self.newest, self.devices)), *(c.code + c.text for c in self.constraints)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _code(function: Callable[..., Any], depth: int = 8) -> str:
    """What a function does, as far as it says: name, byte code, names, constants, defaults, what it closes over.

    depth: how many functions within functions are looked at, since one may close over itself.
    """
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    code = getattr(function, "__code__", None)
    if code is None or not depth:
        return name
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return f"{name}:{_stated((code, function.__defaults__, function.__kwdefaults__, cells), depth - 1)}"


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # of a variable that has no value yet
        return False
    return True


def _stated(value: Any, depth: int = 8) -> str:
    """A value as text that is the same in every process: sets have another order in each, objects another address."""
    if hasattr(value, "co_code"):
        return _stated((value.co_code, value.co_names, value.co_consts), depth)
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_stated(each, depth) for each in value))}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_stated(each, depth) for each in value)})"
    if isinstance(value, dict):
        return _stated(list(value.items()), depth)
    if value is None or isinstance(value, (str, bytes, bool, int, float, complex, torch.dtype)):
        return repr(value)
    return _code(value, depth)


_table: dict[tuple[str, str], Implementation] = {}
_loaded: set[str] = set()


def add(implementation: Implementation) -> None:
    """Put an implementation in the table. ValueError where the provider already has one for the op."""
    key = (implementation.provider, implementation.op)
    if key in _table:
        raise ValueError(f"{key[0]} has two implementations of {key[1]!r}; list one.")
    _table[key] = implementation


def register(implementation: Implementation) -> Implementation:
    """Offer a kernel from outside dkfuse, selected by its provider's name: ``dkfuse.kernels=mine,triton``.

    Returns its argument. Registering a provider's kernel for an op again replaces it, also in programs that are
    compiled already, and what the one before failed at is tried again. ValueError for a provider of dkfuse's own: give
    your kernels a name of their own.
    """
    from .provider_ops import define

    name = implementation.provider
    if name in providers.BUILT_IN:
        raise ValueError(f"{name!r} is a provider of dkfuse; choose another name for your implementation.")
    providers.add(name)
    _table[name, implementation.op] = implementation
    define(implementation)
    _forget(name, implementation.op)
    return implementation


def unregister(provider: str) -> None:
    """Take back what `register` added for a provider."""
    for key in [key for key in _table if key[0] == provider and provider not in providers.BUILT_IN]:
        del _table[key]
        _forget(*key)
    providers.remove(provider)


def _forget(provider: str, op: str) -> None:
    """What is known of the kernel that was there: which calls it serves, and which it failed at."""
    from . import failures, provider_ops

    provider_ops.reset()
    failures.forget_kernel(provider, op)


def implementations() -> dict[tuple[str, str], Implementation]:
    """Every implementation, by (provider, op); those of dkfuse in the order of `providers`."""
    for name in providers.BUILT_IN:
        if name not in _loaded:
            _loaded.add(name)
            for implementation in _listed(name):
                add(implementation)
    return _table


def _listed(name: str) -> tuple[Implementation, ...]:
    """What `provider_<name>.py` lists."""
    module = f"dkfuse.kernels.provider_{name}"
    listed = importlib.import_module(module).IMPLEMENTATIONS
    if other := next((i for i in listed if i.provider != name), None):
        raise ValueError(f"{module} lists an implementation of provider {other.provider!r}.")
    return listed


def find(provider: str, op: str) -> Implementation | None:
    """The implementation of `op` by `provider`."""
    return implementations().get((provider, op))


def of(op: str) -> list[Implementation]:
    """The implementations of `op`."""
    return [implementation for (_, known), implementation in implementations().items() if known == op]


def fingerprint() -> str:
    """Hash of who is there: implementations, and the versions of their providers' packages."""
    digest = hashlib.sha256()
    for (name, _), implementation in sorted(implementations().items(), key=lambda item: item[0]):
        digest.update(f"{implementation.identity}{providers.PROVIDERS[name].version}".encode())
    return digest.hexdigest()
