"""Which kernel providers to try in which order, for all ops or for one: the value of `dkfuse.kernels`.

cute,triton                            for every op
norm_rope=cuda+triton,triton           for norm_rope, and for the others
{"norm_rope": ["cuda", "triton"], "*": ["triton"]}     the same, as an option
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def names(value: Any) -> tuple[str, ...] | None:
    """`None`, "a,b" or a list of names; an empty list means "none of them", an empty string "not set"."""
    if value is None:
        return None
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip()) or None
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) and part.strip() for part in value):
        return tuple(part.strip() for part in value)
    raise ValueError("a list of names, or one string with commas between them")


def kernel_orders(value: Any) -> tuple[str, ...] | None:
    """`names`, whose entries "op=a+b" are about one op; or {"op": ["a", "b"], "*": ["a"]}, "*" being all others.

    In what is returned the entries without "=" are those of "*"; "*=" stands for an empty list of them.
    """
    if not isinstance(value, Mapping):
        entries = names(value)
    else:
        found = {op: names(listed) or () for op, listed in value.items() if isinstance(op, str) and "=" not in op}
        if len(found) < len(value):
            raise ValueError("a dict from the name of an op, or '*', to a list of providers")
        rest = found.pop("*", None)
        entries = tuple(f"{op}={'+'.join(listed)}" for op, listed in found.items())
        entries = (*entries, *(("*=",) if rest == () else rest or ())) or None
    for entry in entries or ():
        op, equals, listed = entry.partition("=")
        if equals and (not op.strip() or "=" in listed):
            raise ValueError('providers, best first, or "op=a+b" for one op: "norm_rope=cuda+triton,triton"')
    return entries


def orders(entries: Iterable[str] | None) -> dict[str, tuple[str, ...]]:
    """Providers, best first, by op; "*" are the ops that have no list of their own. Empty where nothing was asked."""
    if entries is None:
        return {}
    entries = tuple(entries)
    listed = [entry.partition("=") for entry in entries if "=" in entry]
    found = {op.strip(): tuple(n.strip() for n in given.split("+") if n.strip()) for op, _, given in listed}
    rest = tuple(entry for entry in entries if "=" not in entry)
    return {**found, "*": rest} if rest or not entries else found
