"""Settings of the backend: options passed to torch.compile, their environment twins, and their defaults.

    torch.compile(model, backend="dkfuse", options={"dkfuse.rules": "-gated_residual", "max_autotune": True})

An option beats its environment variable (`DKFUSE_RULES`), which beats the default. Keys without the `dkfuse.` prefix
belong to Inductor and are handed on untouched. torch.compile takes `mode` or `options` but not both, therefore
`options={"mode": "max-autotune", ...}` is understood here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from .choosing.orders import kernel_orders, names, orders
from .errors import SettingsError, did_you_mean

PREFIX = "dkfuse."
ENVIRONMENT_PREFIX = "DKFUSE_"
TARGETS = ("current", "cpu", "sm80", "sm89", "sm90", "sm100")
REMAINDERS = ("inductor", "eager")
ROUNDINGS = ("fused", "eager")
ATTENTIONS = ("auto", "torch", "sdpa", "fa4", "fa3", "cudnn", "flash", "efficient", "sage")
GEMMS = ("auto", "quack", "cublas")
LOG_LEVELS = ("debug", "info", "warning", "error")
# For who looks for an error of dkfuse's own, therefore not an option of a compilation.
OTHER_VARIABLES = {
    "DKFUSE_DEBUG": "1 raises an internal error instead of leaving the graph to Inductor; the command line shows the "
    "traceback of what it reports in one sentence"
}

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError("true or false (also 1/0, yes/no, on/off)")


def _count(value: Any) -> int | None:
    if value is None:
        return None
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError("a whole number, 0 or more")
    return number


def _choice(*choices: str) -> Callable[[Any], Any]:
    def parse(value: Any) -> str:
        if isinstance(value, str) and value.strip().lower() in choices:
            return value.strip().lower()
        raise ValueError("one of " + ", ".join(choices))

    return parse


def _optional(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else parse(value)


def _path(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return str(os.fspath(value))
    raise ValueError("a path")


def _setting(default: Any, parse: Callable[[Any], Any], text: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": text})


class Row(NamedTuple):
    """One line of the settings table of `dkfuse doctor`. `origin` is "option", "environment" or "default"."""

    option: str
    variable: str
    default: Any
    value: Any
    origin: str
    help: str


@dataclass(frozen=True)
class Settings:
    """What a compilation was asked to do. Immutable and hashable, so that it can be part of a cache key.

    Values are given as options are, ``Settings(rules="-norm", target="sm90")``. Raises SettingsError for others.
    """

    disable: bool = _setting(False, _flag, "hand every graph to Inductor unchanged")
    rules: tuple[str, ...] | None = _setting(
        None, names, 'names of the rules to use; "-name" removes one from all of them'
    )
    kernels: tuple[str, ...] | None = _setting(
        None,
        kernel_orders,
        'kernel providers, best first; "op=a+b" for one op: "norm_rope=cuda+triton,triton", or a dict with lists',
    )
    target: str = _setting("current", _choice(*TARGETS), "device to choose kernels for: " + ", ".join(TARGETS))
    report: str | None = _setting(
        None, _optional(_path), "file for the coverage report after each compile (.json, .html, .md or .txt)"
    )
    fuel: int | None = _setting(None, _count, "fuse at most this many sites, to bisect a wrong result")
    remainder: str = _setting(
        "inductor", _choice(*REMAINDERS), "what runs the code that was not fused: inductor, or eager for instant start"
    )
    roundings: str = _setting(
        "fused", _choice(*ROUNDINGS), "fused: one rounding per output; eager: every rounding that eager would do"
    )
    log: str | None = _setting(None, _optional(_choice(*LOG_LEVELS)), "log level: " + ", ".join(LOG_LEVELS))
    cache_dir: str | None = _setting(
        None,
        _optional(_path),
        "folder for compiled kernels, coverage records and times (default: beside Inductor's cache)",
    )
    pointwise: bool = _setting(False, _flag, "also fuse regions that contain no norm, where Inductor usually does well")
    attention: str = _setting(
        "auto",
        _choice(*ATTENTIONS),
        "attention kernel: auto (the fastest measured), torch (of torch's own), sdpa (what torch chooses), or one of "
        + ", ".join(ATTENTIONS[3:]),
    )
    gemm: str = _setting(
        "auto",
        _choice(*GEMMS),
        "GEMM of linears: auto (the fastest measured), quack (quack's wherever it can), or cublas (torch's)",
    )
    origins: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for f in setting_fields():
            object.__setattr__(self, f.name, _parse(f, PREFIX + f.name, getattr(self, f.name)))

    @classmethod
    def parse(
        cls,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> tuple[Settings, str | None, dict[str, Any]]:
        """Split what torch.compile was given into (settings, Inductor's mode, Inductor's options).

        Raises SettingsError for an unknown `dkfuse.` option, a value that is not allowed, or two different modes.
        """
        if options is not None and not isinstance(options, Mapping):
            raise SettingsError(f"options must be a dict from option name to value, not {type(options).__name__}")
        rest = dict(options or {})
        if not all(isinstance(key, str) for key in rest):
            bad = next(key for key in rest if not isinstance(key, str))
            raise SettingsError(f"options must have strings as keys, not {bad!r}")
        given = {key: rest.pop(key) for key in list(rest) if key.startswith(PREFIX)}
        inner = rest.pop("mode", None)
        if mode is not None and inner is not None and mode != inner:
            raise SettingsError(f"mode={mode!r} and options={{'mode': {inner!r}}} disagree; give one of them")
        mode = inner if mode is None else mode
        if mode is not None and not isinstance(mode, str):
            raise SettingsError(f"mode must be the name of an Inductor mode, not {mode!r}")
        return cls.read(given, environ), mode, rest

    @classmethod
    def read(cls, options: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
        """Settings from `{"dkfuse.target": "sm90", ...}`, the environment and the defaults, in this precedence."""
        options, known = dict(options or {}), [PREFIX + f.name for f in setting_fields()]
        for key in options:
            if key not in known:
                raise SettingsError(f"unknown option {key!r}{did_you_mean(key, known)}")
        values: dict[str, Any] = {}
        origins = []
        for f in setting_fields():
            option, variable = PREFIX + f.name, ENVIRONMENT_PREFIX + f.name.upper()
            if option in options:
                values[f.name], origin = options[option], "option"
            elif environ.get(variable, "").strip():
                values[f.name], origin = _parse(f, variable, environ[variable]), "environment"
            else:
                origin = "default"
            origins.append((f.name, origin))
        return cls(**values, origins=tuple(origins))

    def allows(self, rule: str) -> bool:
        """Whether the rule of this name may fuse: listed if any name is listed, and not removed by "-name"."""
        if self.rules is None:
            return True
        listed = [name for name in self.rules if not name.startswith("-")]
        only_removals = bool(self.rules) and not listed
        return f"-{rule}" not in self.rules and (rule in listed or only_removals)

    def providers(self, op: str) -> tuple[str, ...] | None:
        """The providers that were asked for to run `op`, best first; None: none were, choose automatically."""
        asked = orders(self.kernels)
        return asked.get(op, asked.get("*"))

    def provider_names(self) -> list[str]:
        """Every provider that was asked for, once."""
        return list(dict.fromkeys(name for listed in orders(self.kernels).values() for name in listed))

    def check_names(self, rules: Iterable[str], providers: Iterable[str], ops: Iterable[str] = ()) -> None:
        """Raise SettingsError for a rule, kernel provider or op that does not exist; they register elsewhere."""
        for option, what, given, known in (
            ("rules", "rule", [name.removeprefix("-") for name in self.rules or ()], list(rules)),
            ("kernels", "op", [op for op in orders(self.kernels) if op != "*"], list(ops)),
            ("kernels", "kernel provider", self.provider_names(), list(providers)),
        ):
            for name in given:
                if name not in known:
                    raise SettingsError(f"{PREFIX}{option}: there is no {what} {name!r}{did_you_mean(name, known)}")
        self._check_attention()
        self._check_gemm()

    def _check_gemm(self) -> None:
        from dkfuse.kernels.gemm_kernels import DISTRIBUTION, INSTALL, untested, version

        if self.gemm != "quack" or (version() is not None and untested() is None):
            return
        problem = untested() or f"needs {DISTRIBUTION}, which is not installed: {INSTALL}"
        raise SettingsError(f"{PREFIX}gemm='quack': {problem}, or use {PREFIX}gemm=auto")

    def _check_attention(self) -> None:
        if self.attention in ("auto", "torch", "sdpa"):
            return
        from dkfuse.kernels.attention_kernels import KERNELS, version_of

        if version_of(self.attention) is None:
            raise SettingsError(
                f"{PREFIX}attention={self.attention!r} needs a package that is not installed: "
                f"{KERNELS[self.attention].install}, or use {PREFIX}attention=auto"
            )

    def table(self) -> list[Row]:
        """One row per setting, in the order of the class."""
        origins = dict(self.origins)
        return [
            Row(
                PREFIX + f.name,
                ENVIRONMENT_PREFIX + f.name.upper(),
                f.default,
                getattr(self, f.name),
                origins.get(f.name, "default" if getattr(self, f.name) == f.default else "option"),
                f.metadata["help"],
            )
            for f in setting_fields()
        ]


def setting_fields() -> list[Any]:
    """The dataclass fields that are settings (all but `origins`)."""
    return [f for f in fields(Settings) if "parse" in f.metadata]


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Set variables that start with DKFUSE_ but mean nothing: most likely spelling mistakes."""
    known = {ENVIRONMENT_PREFIX + f.name.upper() for f in setting_fields()} | set(OTHER_VARIABLES)
    return sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX) and name not in known)


def _parse(f: Any, name: str, value: Any) -> Any:
    try:
        return f.metadata["parse"](value)
    except ValueError as error:
        raise SettingsError(f"{name}={value!r} is not allowed: give {error}") from None
