"""`dkfuse kernels`: who can run which op, and who would run a given call."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..errors import did_you_mean
from .exits import USAGE, Failure


def kernels(
    op: Annotated[str | None, typer.Argument(metavar="[OP]", help="An op: say who would run it.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="SIZES", help="Of x, like 1x4096x3072; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="bf16, fp16 or fp32.")] = "bf16",
    target: Annotated[
        str | None, typer.Option("--target", metavar="TARGET", help="sm80, sm89, sm90, sm100, cpu or current.")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="layer, rms or none.  [default: layer, of norm_rope rms]")] = None,
    rotation: Annotated[
        str | None, typer.Option(help="Of norm_rope: interleaved, half or none.  [default: interleaved]")
    ] = None,
    tables: Annotated[str, typer.Option(help="Of norm_rope: half, full, complex or matrix.")] = "half",
    constraints: Annotated[
        bool, typer.Option("--constraints", help="Of every op: what each asks of a call. With OP they are shown.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List ops, providers, what each asks of a call, and what is available here.

    With OP and --shape: who would run such a call, and why the others would not.
    """
    from dkfuse.kernels.rope_support import TABLES
    from dkfuse.kernels.support import OPERANDS

    from ..choosing.example_calls import DTYPES, NORMS, ROTATIONS
    from ..settings import TARGETS

    if shape and op is None:
        raise Failure(USAGE, "--shape is about one op: dkfuse kernels OP --shape 1x4096x3072")
    if op is not None and op not in OPERANDS:
        raise Failure(USAGE, f"there is no op {op!r}{did_you_mean(op, OPERANDS)}")
    for name, value, allowed in (
        ("dtype", dtype, DTYPES),
        ("target", target, TARGETS),
        ("norm", norm, NORMS),
        ("rotation", rotation, ROTATIONS),
        ("tables", tables, TABLES),
    ):
        if value is not None and value not in allowed:
            raise Failure(USAGE, f"--{name} {value} is not allowed: give one of {', '.join(allowed)}")
    if norm == "none" and op != "norm_rope":
        raise Failure(USAGE, "--norm none is for norm_rope: the other ops have a norm or take none")
    from .kernels_text import print_table, print_verdicts

    if not shape:
        rows = _rows(op)
        if json_:
            print(json.dumps(rows, indent=1))
        else:
            print_table(rows, constraints or op is not None)
        return
    assert op is not None
    found = [_verdict(op, text, DTYPES[dtype], dtype, target, norm, rotation, tables) for text in shape]
    if json_:
        print(json.dumps(found, indent=1))
    else:
        print_verdicts(found)


def _here() -> str:
    """The target that a call on this machine's GPU, or without one its CPU, is chosen for."""
    import torch

    from ..choosing.choose import resolve_target

    kind = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"
    return resolve_target("current", torch.device(kind))


def _rows(op: str | None) -> list[dict[str, Any]]:
    """One row per op and provider."""
    from dkfuse.kernels import registry
    from dkfuse.kernels.providers import PROVIDERS
    from dkfuse.kernels.support import OPERANDS

    here = _here()
    rows = []
    for name in [op] if op else OPERANDS:
        for implementation in registry.of(name):
            provider = PROVIDERS[implementation.provider]
            missing = provider.problem()
            problem = None if implementation.serves(here) else f"does not run on {here}"
            rows.append(
                {
                    "op": name,
                    "provider": provider.name,
                    "version": provider.version,
                    "devices": _devices(implementation),
                    "constraints": [{"code": c.code, "text": c.text} for c in implementation.constraints],
                    "available": missing is None and problem is None,
                    "reason": missing.message if missing is not None else problem,
                }
            )
    return rows


def _devices(implementation: Any) -> list[str]:
    """["sm80 and newer", "rocm", ...]"""
    if "cuda" not in implementation.devices or not implementation.oldest:
        return list(implementation.devices)
    newest = f" to sm{implementation.newest}" if implementation.newest else " and newer"
    cuda = f"sm{implementation.oldest}" + ("" if implementation.newest == implementation.oldest else newest)
    return [cuda, *(device for device in implementation.devices if device != "cuda")]


def _verdict(
    op: str,
    text: str,
    dtype: Any,
    dtype_name: str,
    target: str | None,
    norm: str | None,
    rotation: str | None,
    tables: str,
) -> dict[str, Any]:
    """Who would run a call of this shape, and why each other provider would not."""
    from dkfuse import patterns
    from dkfuse.kernels import crossovers, registry
    from dkfuse.kernels.ops import check
    from dkfuse.kernels.providers import PROVIDERS
    from dkfuse.kernels.support import OPERANDS

    from ..choosing.choose import check_installed, decide, refusal
    from ..choosing.example_calls import example, parse_shape
    from ..matching.rules import Reject
    from ..settings import Settings

    settings = Settings.read()
    registry.implementations()
    settings.check_names(patterns.NAMES, PROVIDERS, OPERANDS)
    if target in (None, "current"):
        check_installed(settings)
    try:
        arguments = example(op, parse_shape(text), dtype, norm, rotation, tables)
        check(op, arguments)
    except ValueError as error:
        raise Failure(USAGE, str(error)) from error
    wanted = target if target not in (None, "current") else _here()
    planned = wanted != _here()
    asked = settings.providers(op)
    others: dict[str, dict[str, str]] = {}
    try:
        choice = decide(op, [arguments], wanted, asked, planned)
        runs, reason = choice.provider, None
        others = {r.rule or "": {"code": r.code, "message": r.message} for r in choice.passed_over}
    except Reject as reject:
        runs, reason = None, reject.message
    for implementation in registry.of(op):
        name = implementation.provider
        if name == runs or name in others:
            continue
        refused = refusal(name, op, [arguments], wanted, asked is not None, planned)
        if refused is not None:
            others[name] = {"code": refused.code, "message": refused.message}
        else:
            behind = name in (asked or ())
            message = f"{name} takes it, but {runs} comes before it"
            if not behind:
                message = f"{name} takes it, but is not tried unless it is asked for: dkfuse.kernels={name}"
            others[name] = {"code": "not_first" if behind else "not_asked", "message": message}
    ratio = None if runs is None else crossovers.ratio(runs, op, wanted, [arguments])
    head = {"op": op, "shape": text, "dtype": dtype_name, "target": wanted, "provider": runs, "reason": reason}
    config = _table_config(op, arguments) if runs == "triton" else None
    why_not = [{"provider": name, **why} for name, why in others.items()]
    return {**head, "config": config, "speed_against_triton": ratio, "others": why_not}


def _table_config(op: str, arguments: dict[str, Any]) -> str:
    """How the Triton kernel would be launched, unless max-autotune times it."""
    from dkfuse.kernels.launch import candidates

    first = candidates(op, arguments, {"out": arguments["x"]})[0]
    return "; ".join(map(str, first if isinstance(first, tuple) else [first]))
