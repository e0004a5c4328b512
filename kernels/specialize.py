"""Kernels with the short argument list of one call, made from the general kernel bodies.

A body takes every operand and stride there can be, some seventy parameters, of which a call uses five to twelve. Unused
ones cost CPU time at every launch (measured: 3.3 against 0.8 us in a wrapper like Inductor's, 16 against 4 us in
Triton's own launcher), so each pattern of use gets a `@triton.jit` function of its own with only its parameters, which
calls the body with the rest fixed. Its text is like

    @triton.jit
    def dkfuse_norm_modulate(x, scale, shift, out, D: tl.constexpr, ...):
        row_norm(x, None, None, None, None, scale, shift, ..., D, ...)
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import linecache
from typing import Any


@functools.cache
def specialize(body: Any, name: str, fixed: tuple[tuple[str, str], ...]) -> Any:
    """A JITFunction `name` with the parameters of `body` that are not in `fixed`, as (parameter, expression) pairs.

    The same arguments give the same object. Its source is kept where `inspect` finds it, since Triton and Inductor
    compile from source.
    """
    values = dict(fixed)
    constexprs = _constexprs(body)
    parameters = [f"{p}: tl.constexpr" if p in constexprs else p for p in body.arg_names if p not in values]
    return _defined(body, name, parameters, "    " + _call(body, [values.get(p, p) for p in body.arg_names]))


@functools.cache
def dispatch(body: Any, name: str, calls: tuple[tuple[tuple[str, str], ...], ...], parameters: tuple[str, ...]) -> Any:
    """A JITFunction `name(*parameters)` that runs several calls of `body`, each by its own range of programs.

    A call is (parameter of `body`, expression) for all of them but the first, `program`, the program's number within
    the call. Call i > 0 starts at the program number `first{i}`, one of `parameters`. All programs of one call take the
    same branch.
    """
    last = len(calls) - 1
    lines = [] if last == 0 else ["    program = tl.program_id(0)"]
    for i, call in enumerate(calls):
        program = "tl.program_id(0)" if last == 0 else f"program - first{i}" if i else "program"
        values = {**dict(call), body.arg_names[0]: program}
        if last:
            condition = "    else:" if i == last else f"    {'el' if i else ''}if program < first{i + 1}:"
            lines.append(condition)
        indent = "    " if last == 0 else "        "
        lines.append(indent + _call(body, [values[p] for p in body.arg_names]))
    return _defined(body, name, list(parameters), "\n".join(lines))


def _call(body: Any, arguments: list[str]) -> str:
    return f"{body.fn.__name__}({', '.join(arguments)})"


def _defined(body: Any, name: str, parameters: list[str], statements: str) -> Any:
    source = f"@triton.jit\ndef {name}(\n    {', '.join(parameters)}\n):\n{statements}\n"
    filename = f"<dkfuse kernel {name} {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    modules = {"triton": importlib.import_module("triton"), "tl": importlib.import_module("triton.language")}
    scope: dict[str, Any] = {**modules, body.fn.__name__: body, "__name__": body.fn.__module__}
    exec(compile(source, filename, "exec"), scope)
    return scope[name]


def _constexprs(body: Any) -> set[str]:
    """Parameters annotated `tl.constexpr`; annotations are strings in our modules."""
    return {p for p, annotation in body.fn.__annotations__.items() if "constexpr" in str(annotation)}
