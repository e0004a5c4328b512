"""How norm_rope is launched: one call, or several as one launch (queries and keys, of text and image).

A compiler pass gives `plan_group` the calls of one attention; programs are divided among them by their number, and each
branch is the kernel body specialised to its call. Everything is decided from shapes and strides, also of fake tensors
with symbolic sizes, which are never guarded on. Triton is imported when a plan is made, not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

from .axes import Int
from .configs import CANDIDATES, MOST_WARPS
from .launch import Launch, check_output
from .rope_configs import RopeConfig, choose_rope, ranked
from .rope_support import NAMES, ROTATIONS, TABLES, supports_rope, with_defaults
from .rope_views import Rows, see

POINTERS = (*NAMES, "out")
Configs = tuple[RopeConfig, ...]  # one for each call of a launch, all with the same warps
LAYOUT_ROWS = 256  # strides of up to so many rows belong to the layout and are fixed in the kernel,
MAX_HEADS = 128  # and so do sizes of the tile axis up to this


@dataclass(frozen=True)
class Call:
    """One norm_rope call: arguments by name (defaults may miss), the output, its distance from the output's pointer.

    out: tensor-like of x's shape with inner stride 1 and any outer strides; offset in elements.
    """

    arguments: Mapping[str, Any]
    out: Any
    offset: Int = 0


def plan_rope(
    arguments: Mapping[str, Any], outputs: Mapping[str, Any], *, offsets: Mapping[str, Int], config: Any = None
) -> Launch:
    """`launch.plan` for norm_rope; config is a RopeConfig, or one of `candidates`."""
    if outputs.get("out") is None:
        raise ValueError(f"plan('norm_rope') needs the output tensor 'out'; got {sorted(outputs)}.")
    return _planned({"": Call(arguments, outputs["out"], offsets.get("out", 0))}, {}, config)


def plan_group(
    calls: Sequence[Call], *, alias: Mapping[str, str] | None = None, config: RopeConfig | Configs | None = None
) -> Launch:
    """One launch of all `calls`; raises `Unsupported` as `supports` reports it for the first call that says no.

    Launch.tensors names them "0.x", "0.weight", ..., "0.out", "1.x", ...
    alias: name -> name of the same tensor, as {"2.cos": "0.cos", "1.out": "0.out"}; one pointer serves both. Views that
        start elsewhere are not the same tensor; an output's offset is what tells parts of one buffer apart.
    config: overrides the tuned configuration, of all calls or, as `candidates` gives them, of each
    """
    if not calls:
        raise ValueError("plan_group needs at least one call.")
    return _planned({f"{i}.": call for i, call in enumerate(calls)}, alias or {}, config)


def candidates(calls: Sequence[Call]) -> list[Configs]:
    """What is worth timing for a launch of `calls`, at most CANDIDATES; the configuration of `plan_group` first.

    The same tiles with operands spread through shared memory or not, the next best tiles, and both with half and twice
    the warps.
    """
    seen = [_seen(call) for call in calls]
    table = tuple(_configs(seen, None))
    found = [table, tuple(replace(c, repeat=not c.repeat) for c in table)]
    for num_warps in (table[0].num_warps, 2 * table[0].num_warps, table[0].num_warps // 2):
        if not 1 <= num_warps <= MOST_WARPS:
            continue
        orders = [ranked(*_measures(rows), num_warps=num_warps) for rows in seen]
        found += [tuple(order[min(i, len(order) - 1)] for order in orders) for i in range(2)]
    return list(dict.fromkeys(found))[:CANDIDATES]


def _planned(calls: Mapping[str, Call], alias: Mapping[str, str], config: RopeConfig | Configs | None) -> Launch:
    """`calls` by the prefix of their tensors' names."""
    from .specialize import dispatch
    from .triton_rope import rope_rows

    seen = {prefix: _seen(call) for prefix, call in calls.items()}
    labels = {f"{prefix}{name}" for prefix, rows in seen.items() for name in rows.inner}
    for label, source in alias.items():
        if label not in labels or source not in labels or source in alias:
            raise ValueError(f"plan_group: alias {label!r} -> {source!r} does not lead to a tensor of the calls.")
    configs = _configs(list(seen.values()), config)
    tensors: dict[str, str] = {}
    scalars: dict[str, Int] = {}
    branches: list[tuple[tuple[str, str], ...]] = []
    programs: Int = 0
    for (prefix, call), chosen in zip(calls.items(), configs, strict=True):
        rows, suffix = seen[prefix], f"_{prefix[:-1]}" if prefix else ""
        texts = dict.fromkeys(POINTERS, "None")
        for name in rows.inner:
            label = alias.get(prefix + name, prefix + name)
            texts[name] = "_".join(reversed(label.split(".")))
            tensors[texts[name]] = label
        layout, constants = _layout(call, rows, chosen), _constants(with_defaults(call.arguments), rows, chosen)
        texts.update((name, repr(value)) for name, value in constants.items())
        for name, value in layout.items():
            fixed = _fixed(name, value, rows)
            texts[name] = repr(value) if fixed else name + suffix
            if not fixed:
                scalars[name + suffix] = value  # type: ignore[assignment]
        if branches:
            scalars[f"first{len(branches)}"] = programs
        branches.append(tuple(texts.items()))
        programs = programs + _programs(rows, chosen)
    return Launch(
        kernel=dispatch(
            rope_rows,
            "dkfuse_norm_rope" + (f"_x{len(calls)}" if len(calls) > 1 else ""),
            tuple(branches),
            (*tensors, *scalars),
        ),
        grid=(programs, 1, 1),
        tensors=tensors,
        scalars=scalars,
        constants={},
        num_warps=configs[0].num_warps,
        num_stages=configs[0].num_stages,
        config=tuple(configs),
    )


def _seen(call: Call) -> Rows:
    reason = supports_rope(call.arguments)
    if reason is not None:
        raise reason
    arguments = with_defaults(call.arguments)
    return see(arguments, check_output("out", call.out, tuple(arguments["x"].shape)))


def _configs(seen: list[Rows], config: RopeConfig | Configs | None) -> list[RopeConfig]:
    """A configuration per call, all with the warps of the one whose programs are largest."""
    if isinstance(config, tuple):
        return list(config)
    if config is not None:
        return [config] * len(seen)
    alone = [choose_rope(*_measures(rows)) for rows in seen]
    _, warps = max((c.rows * c.blocks * rows.d, c.num_warps) for c, rows in zip(alone, seen, strict=True))
    return [choose_rope(*_measures(rows), num_warps=warps) for rows in seen]


def _measures(rows: Rows) -> tuple[int, int, int | None, bool]:
    part, tail = _columns(rows)
    size = rows.axes[0].size
    return 2 * part + tail if rows.half else part, part, size if isinstance(size, int) else None, rows.across


def _columns(rows: Rows) -> tuple[int, int]:
    """Padded columns of a load, and of the columns behind a half rotation (0 where there are none)."""
    if not rows.half:
        return _padded(rows.d), 0
    return _padded(rows.r // 2), _padded(rows.d - rows.r) if rows.r < rows.d else 0


def _padded(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tiles(rows: Rows, config: RopeConfig) -> Int:
    """Programs along the tile axis."""
    tile = config.rows * config.blocks
    size = rows.axes[0].size
    if rows.across and tile < size:
        raise ValueError(f"a norm across {size} rows needs them in one program; {config} takes {tile}.")
    return (size + (tile - 1)) // tile


def _programs(rows: Rows, config: RopeConfig) -> Int:
    programs = _tiles(rows, config)
    for axis in rows.axes[1:]:
        programs = programs * axis.size
    return programs


def _masked(rows: Rows, config: RopeConfig) -> bool:
    return not statically_known_true(rows.axes[0].size % (config.rows * config.blocks) == 0)


def _layout(call: Call, rows: Rows, config: RopeConfig) -> dict[str, Int | None]:
    """The body's integers that depend on sizes and strides; None for those that it does not need."""
    axes = rows.axes
    layout: dict[str, Int | None] = {"n0": axes[0].size if _masked(rows, config) else None}
    layout["tiles"] = _tiles(rows, config) if len(axes) > 1 else None
    layout["n1"] = axes[1].size if len(axes) > 2 else None
    for name in POINTERS:
        for i in range(3):
            stride = axes[i].strides[name] if name in rows.inner and i < len(axes) else 0
            absent = isinstance(stride, int) and stride == 0 and (i > 0 or name not in ("x", "out"))
            layout[f"{name}_s{i}"] = None if absent else stride
        if name not in ("x", "out"):
            layout[f"{name}_si"] = rows.inner.get(name)
    layout["out_offset"] = None if isinstance(call.offset, int) and call.offset == 0 else call.offset
    return layout


def _fixed(name: str, value: Int | None, rows: Rows) -> bool:
    """Whether the kernel's source holds this value: what belongs to the layout and not to the number of tokens."""
    if value is None:
        return True
    if not isinstance(value, int):
        return False
    if name in ("n0", "tiles"):
        return rows.across or value <= (MAX_HEADS if name == "n0" else 1)
    return name not in ("n1", "out_offset") and value <= LAYOUT_ROWS * rows.d


def _constants(arguments: Mapping[str, Any], rows: Rows, config: RopeConfig) -> dict[str, Any]:
    part, tail = _columns(rows)
    return {
        "D": rows.d,
        "R": rows.r,
        "COUNT": rows.d * int(rows.axes[0].size) if rows.across else rows.d,
        "ROWS": config.rows,
        "BLOCKS": config.blocks,
        "COLUMNS": part,
        "TAIL": tail,
        "AXES": len(rows.axes),
        "MASKED": _masked(rows, config),
        "REPEAT": config.repeat,
        "NORM": ("none", "rms", "layer").index(arguments["norm"]),
        "NORM_LAST": bool(arguments["norm_last"]),
        "ACROSS": rows.across,
        "EPS": float(arguments["eps"]),
        "WEIGHT_OFFSET": float(arguments["weight_offset"]),
        "STYLE": ROTATIONS.index(arguments["rotation"]),
        "TABLES": list(TABLES).index(arguments["tables"]),
        "ROUNDINGS": int(arguments["roundings"]),
    }
