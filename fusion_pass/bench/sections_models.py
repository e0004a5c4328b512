"""Saved benches of models as tables: one line for each model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .averages import ratio
from .results import OURS, PLAIN, ModelResult
from .saved import Saved
from .sections import Column, Section, tabulated
from .show_models import blocks

NAMES = {"inductor": "Inductor", "max-autotune": "max-autotune", "plain": "a plain install", "eager": "eager"}
RATIOS = (
    ("wall", "wall"),
    ("cpu", "CPU"),
    ("compile_cold", "compile, cold"),
    ("compile_warm", "compile, warm"),
    ("peak_gib", "memory"),
    ("error", "error"),
)


def sections(saved: Saved) -> list[Section]:
    """One section for each way of measuring in the file: main rival, mode, packing, size and dtype."""
    groups: dict[tuple[Any, ...], list[ModelResult]] = {}
    for result in saved.models:
        key = (result.rivals[:1], result.mode, result.pack, result.attention, result.size, result.dtype)
        groups.setdefault((str(key[0]), *key[1:]), []).append(result)
    if not groups:
        return [Section(f"Models: {saved.about}", "No model was measured.")]
    return [_section(saved, results) for results in groups.values()]


def _section(saved: Saved, results: Sequence[ModelResult]) -> Section:
    one = results[0]
    if not one.rivals:
        return Section(f"Models: {saved.about}", "Measured without a side to compare with.")
    rival = NAMES.get(one.rivals[0], one.rivals[0])
    how = [
        f"{one.dtype}, dynamic=False, random weights, {'published' if one.size == 'full' else one.size} sizes",
        f"mode {one.mode}" if one.mode else "",
        "weights packed" if one.pack else "",
        f"attention {one.attention}" if one.attention else "",
    ]
    caption = (
        f"{', '.join(filter(None, how))}. Gain: GPU time of {rival} / dkfuse's; in a loop: the same of the time that a "
        f"forward takes among others without a pause. Saved: parts of {rival}'s GPU time. Glue (GPU time that is "
        "neither GEMM nor attention), wall time of a forward on an idle GPU, CPU time, compile time, memory and error: "
        f"dkfuse's / {rival}'s, less is better."
    )
    titles, rows = tabulated(_columns(one, rival), results, f"geometric mean of {len(results)}")
    return Section(f"Models: {saved.about}", caption, titles, rows, _notes(results))


def _columns(one: ModelResult, rival: str) -> list[Column]:
    packed = ", weights packed" if one.pack else ""
    return [
        Column("model", lambda r: r.model + (f", batch {r.batch}" if r.batch > 1 else "")),
        Column("blocks", blocks),
        Column("gain, plain install", _gain(lambda r: r.rivals[0], PLAIN), "{:.3f}x"),
        Column(f"glue of {rival}'s", _ratio("glue")),
        Column(f"gain{packed}", _gain(lambda r: r.rivals[0]), "{:.3f}x"),
        Column("in a loop, plain install", _loop(PLAIN), "{:.3f}x"),
        Column(f"in a loop{packed}", _loop(OURS), "{:.3f}x"),
        Column("saved: glue, GEMM, attention", _saved(lambda r: r.rivals[0])),
        Column("better of Inductor's modes", lambda r: r.better),
        Column("gain over it, plain install", _gain(lambda r: r.better, PLAIN), "{:.3f}x"),
        Column(f"gain over it{packed}", _gain(lambda r: r.better), "{:.3f}x"),
        Column("saved of it: glue, GEMM, attention", _saved(lambda r: r.better)),
        *(Column(title, _ratio(name)) for name, title in RATIOS),
    ]


def _gain(rival: Callable[[ModelResult], str | None], side: str = OURS) -> Callable[[ModelResult], float | None]:
    def read(result: ModelResult) -> float | None:
        other = rival(result)
        shown = other is not None and side in result.sides and other != side
        return result.gain(other, side)["speedup"] if other is not None and shown else None

    return read


def _loop(side: str) -> Callable[[ModelResult], float | None]:
    def read(result: ModelResult) -> float | None:
        shown = side in result.sides and result.rivals[0] != side
        return ratio(result.sides[result.rivals[0]].loop, result.sides[side].loop) if shown else None

    return read


def _saved(rival: Callable[[ModelResult], str | None]) -> Callable[[ModelResult], str | None]:
    def read(result: ModelResult) -> str | None:
        if (other := rival(result)) is None:
            return None
        gain = result.gain(other)
        return ", ".join(f"{gain[part] * 100:.1f} %" for part in ("glue", "gemm", "attention"))

    return read


def _ratio(name: str) -> Callable[[ModelResult], float | None]:
    return lambda result: result.ratios(result.rivals[0])[name]


def _notes(results: Sequence[ModelResult]) -> list[str]:
    found: dict[str, list[str]] = {}
    for result in results:
        if result.note:
            found.setdefault(f"{result.note}; errors are against {result.reference}", []).append(result.model)
    every = len(results)
    return [note if len(names) == every else f"{', '.join(names)}: {note}" for note, names in found.items()]
