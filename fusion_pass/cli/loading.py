"""The MODEL argument of the command line: NAME or NAME:SIZE of the zoo, or `path/to/file.py:function`."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import DkfuseError, ModelError, did_you_mean, first_line

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class FactoryError(DkfuseError):
    """The user's file or function raised; the message carries their error and its line."""


def load(model: str, size: str | None, layers: int | None, dtype: str | None) -> tuple[str, nn.Module, dict[str, Any]]:
    """(label, module, keyword arguments of forward) for MODEL. Options that are None were not given.

    A function is called with those of `size`, `layers` and `dtype` (a torch.dtype) that were given. Raises ModelError
    when MODEL does not exist, FactoryError when the user's code raises, ImportError when diffusers is missing.
    """
    path, separator, function = model.rpartition(":")
    if not separator and (model.endswith(".py") or "/" in model):
        found = f": {model} defines {_listed(_factories(_imported(Path(model))))}" if Path(model).is_file() else ""
        raise ModelError(f"{model!r} names no function; give path/to/file.py:function{found}")
    if names_a_file(model):
        given = {"size": size, "layers": layers, "dtype": DTYPES[dtype] if dtype else None}
        from ..reporting.weightless import without_memory

        return f"{Path(path)}:{function}", *without_memory(*load_real(model, given))
    from .. import zoo

    entry = zoo.find(model)
    size = size or ("tiny" if entry.latent is None else "full")
    module, kwargs = zoo.build_fake(entry.name, size, DTYPES[dtype or "bf16"], layers)
    parts = [size, f"{layers} layers" if layers is not None else "", dtype or ""]
    return f"{entry.name} ({', '.join(part for part in parts if part)})", module, kwargs


def names_a_file(model: str) -> bool:
    """Whether MODEL, which has a colon, is a file with a function rather than a model of the zoo with a size."""
    path, separator, _ = model.rpartition(":")
    return bool(separator) and (path.endswith(".py") or "/" in path or os.sep in path or Path(path).is_file())


def load_real(model: str, given: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """(module, keyword arguments of forward) as `path/to/file.py:function` makes them, from its arguments not None.

    Raises ModelError when there is no such function or it takes no such argument, FactoryError when it raises.
    """
    name, _, function = model.rpartition(":")
    path, given = Path(name), {key: value for key, value in given.items() if value is not None}
    label = f"{path}:{function}"
    if not path.is_file():
        raise ModelError(f"no file {str(path)!r}; give the name of a zoo model or path/to/file.py:function")
    imported = _imported(path)
    factory = getattr(imported, function, None)
    if factory is None:
        known = _factories(imported)
        hint = did_you_mean(function, known) if known else ""
        raise ModelError(f"{path} has no function {function!r}{hint}")
    if not callable(factory):
        raise ModelError(f"{label} is a {type(factory).__name__}, not a function that returns (module, kwargs)")
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        raise ModelError(f"{label} is a module class; give a function that returns (module, kwargs)")
    parameters = inspect.signature(factory).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in given:
        if name not in parameters and not takes_all:
            raise ModelError(f"--{name} was given, but {label} has no parameter {name!r}")
    try:
        made = factory(**given)
    except Exception as error:
        raise FactoryError(f"{label} raised {describe_error(error)}") from error
    if not (
        isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and isinstance(made[1], dict)
    ):
        got = f"({', '.join(type(m).__name__ for m in made)})" if isinstance(made, tuple) else type(made).__name__
        raise ModelError(f"{label} must return (module, kwargs), an nn.Module and a dict; it returned {got}")
    return made


def _imported(path: Path) -> ModuleType:
    name = f"_dkfuse_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} is not a Python file; give path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as if the file were run
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise FactoryError(f"{path} cannot be imported: {describe_error(error)}") from error
    return module


def _factories(module: ModuleType) -> list[str]:
    found = [name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")]
    return [name for name in found if getattr(module, name).__module__ == module.__name__]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no function"


def describe_error(error: BaseException) -> str:
    """`ValueError: message (file.py, line 3)`: the error of the user's code and the place that they can change."""
    place = _place(error)
    # Dynamo quotes the error of the user's operation in the middle of its own: "... got RuntimeError('shapes differ')"
    quoted = re.search(r"""got (\w+)\((['"])(.+)\2\)""", str(error))
    text = f"{quoted[1]}: {quoted[3]}" if quoted else f"{type(error).__name__}: {first_line(error)}"
    return text + (f" ({place})" if place else "")


def _place(error: BaseException) -> str | None:
    """The innermost line that is neither torch's nor dkfuse's; for an error of Dynamo the user line that it names."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    lines = str(error).splitlines()
    named = [line.strip() for line in lines if line.strip().startswith('File "')]
    if any("from user code" in line for line in lines) and named:
        file, _, rest = named[-1][len('File "') :].partition('", line ')
        return f"{file}, line {rest.split(',')[0]}"
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None
