"""`dkfuse bench`: how fast whole models and single kernels are on this machine's GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import did_you_mean
from .exits import ENVIRONMENT, NOT_TRACED, USAGE, Failure, check_writable
from .options import Dtype, Size, TableFormat

bench = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Measure models and kernels against torch.compile on this machine's GPU.",
)

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every number here.")]
Layers = Annotated[int | None, typer.Option(min=1, metavar="N", help="Blocks per stack.  [default: 8 for the zoo]")]
Widths = Annotated[Size, typer.Option(help="Widths and token counts.")]
Weights = Annotated[Dtype, typer.Option(help="Of weights and activations, of models that have a name.")]
Mode = Annotated[
    str | None, typer.Option("--mode", metavar="MODE", help="Mode of torch.compile for dkfuse and inductor.")
]
Pack = Annotated[bool, typer.Option("--pack", help="Pack the weights of parallel projections first.")]
Attention = Annotated[
    str | None, typer.Option(metavar="KERNEL", help="The option dkfuse.attention of the side dkfuse.")
]
Picture = Annotated[Path | None, typer.Option("--picture", metavar="FILE.svg", help="Write a picture here.")]


@bench.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit()


@bench.command()
def model(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL[@BATCH]...",
            help="Models of the zoo (NAME or NAME:SIZE), path/to/file.py:function, vit, bert, llama, convnet; zoo for "
            "the whole zoo, headline for six of it, others for these four.",
        ),
    ],
    against: Annotated[
        str,
        typer.Option(
            metavar="SIDE,...",
            help="inductor, max-autotune (no CUDA graphs), plain (dkfuse without packed weights, torch's own "
            "kernels of attention and GEMMs), eager; main one first.",
        ),
    ] = "inductor",
    layers: Layers = None,
    size: Widths = Size.full,
    dtype: Weights = Dtype.bf16,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Timed calls of each side, alternating.")] = 15,
    mode: Mode = None,
    pack: Pack = False,
    attention: Attention = None,
    fp32: Annotated[bool, typer.Option(help="Take errors against fp32 where it fits, else against eager.")] = True,
    warm: Annotated[
        bool, typer.Option(help="Measure the warm compile too; without, each side is compiled once.")
    ] = True,
    top: Annotated[int, typer.Option(min=0, metavar="N", help="List the N slowest kernels of each side.")] = 0,
    json_: JsonFile = None,
    picture: Picture = None,
) -> None:
    """Compare whole models with torch.compile: GPU time by kind, wall time, compile time, memory, error, sites.

    Sides run alternately in this process, dynamic=False; results are medians, ratios are dkfuse / other.
    """
    from ..bench import targets
    from ..bench.sides import PROFILES, RIVALS, Options

    names = _listed("--against", against, RIVALS)
    _check_mode(mode)
    found = list(dict.fromkeys(target for name in models for target in targets.find(name)))
    options = Options(
        names,
        layers,
        rounds,
        min(rounds, PROFILES),
        mode=mode,
        pack=pack,
        attention=attention,
        size=size.value,
        dtype=dtype.value,
        fp32=fp32,
        warm=warm,
    )
    _check_extras(options)
    _prepare((json_, picture))
    device = _device()
    from ..bench import session

    _check_all(found, *session.models(found, options, device, top, json_, picture))


@bench.command()
def start(
    models: Annotated[list[str], typer.Argument(metavar="MODEL[@BATCH]...", help="As `bench model` takes them.")],
    against: Annotated[
        str, typer.Option(metavar="SIDE,...", help="inductor, max-autotune, plain; main one first.")
    ] = "inductor",
    layers: Layers = None,
    size: Widths = Size.full,
    dtype: Weights = Dtype.bf16,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Times that each side starts with empty caches.")] = 1,
    mode: Mode = None,
    pack: Pack = False,
    attention: Attention = None,
    json_: JsonFile = None,
) -> None:
    """Compare compile times: seconds to the first result in a new process, with empty caches and with full ones."""
    from ..bench import targets
    from ..bench.sides import RIVALS, Options

    names = _listed("--against", against, [name for name in RIVALS if name != "eager"])
    _check_mode(mode)
    found = list(dict.fromkeys(target for name in models for target in targets.find(name)))
    options = Options(
        names,
        layers,
        rounds,
        mode=mode,
        pack=pack,
        attention=attention,
        size=size.value,
        dtype=dtype.value,
    )
    _check_extras(options)
    _prepare((json_,))
    device = _device()
    from ..bench import session

    _check_all(found, *session.starts(found, options, device, json_))


def _check_all(found: Sequence[Any], measured: Sequence[Any], failed: Sequence[str]) -> None:
    """Fail at the end where a model could not be measured."""
    if failed:
        done = f"{len(measured)} of {len(found)} models were measured"
        raise Failure(NOT_TRACED, f"{done}; {'; '.join(failed)}")


def _check_mode(mode: str | None) -> None:
    from ..bench.sides import MODES

    if mode is not None and mode not in MODES:
        raise Failure(USAGE, f"--mode {mode} is not allowed: give one of {', '.join(MODES)}")


def _check_extras(options: Any) -> None:
    """Fail at once where this version lacks what an option asks for."""
    import dkfuse

    from ..settings import Settings

    if options.attention is not None:
        Settings.parse(None, {"dkfuse.attention": options.attention})
    if options.pack and not hasattr(dkfuse, "pack"):
        raise Failure(USAGE, "--pack needs dkfuse.pack, which this version does not have")


@bench.command()
def kernels(
    op: Annotated[list[str] | None, typer.Option("--op", metavar="OP", help="Only this op; may be repeated.")] = None,
    case: Annotated[str | None, typer.Option(metavar="TEXT", help="Only cases whose name contains this.")] = None,
    provider: Annotated[str | None, typer.Option(metavar="NAME,...", help="Only these providers.")] = None,
    against: Annotated[
        str, typer.Option(metavar="MODE,...", help="Inductor's modes to compare with: default, max-autotune, none.")
    ] = "default",
    peers: Annotated[
        bool, typer.Option("--peers", help="Also quack, Liger, FlashInfer and sgl-kernel, where installed.")
    ] = False,
    json_: JsonFile = None,
    picture: Picture = None,
    write_crossovers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write each provider's time / Triton's, as Python, or JSON if named so."),
    ] = None,
) -> None:
    """Time every provider's kernel on the shapes that models have, against a copy, Inductor and eager."""
    from ..bench import kernels as work
    from ..bench import providers

    for name in op or ():
        if name not in work.OPS:
            raise Failure(USAGE, f"--op {name} has no cases{did_you_mean(name, work.OPS)}")
    chosen = work.chosen(op or (), case)
    if not chosen:
        raise Failure(USAGE, f"--case {case} is in no case's name; known: {', '.join(c.name for c in work.ALL)}")
    known = list(dict.fromkeys(name for c in chosen for name in providers.names(c.op)))
    wanted = _listed("--provider", provider, known) if provider is not None else None
    rivals = [] if against == "none" else [work.RIVALS[n] for n in _listed("--against", against, tuple(work.RIVALS))]
    _prepare((json_, picture, write_crossovers))
    device = _device()
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        raise Failure(ENVIRONMENT, "the bench of kernels needs triton, which is not installed: pip install triton")
    from ..bench import session

    session.kernels(chosen, wanted, rivals, peers, device, json_, picture, write_crossovers)


@bench.command()
def show(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE.json...", help="What `bench model` or `bench kernels` wrote by --json."),
    ],
    format: Annotated[TableFormat, typer.Option("--format", "-f")] = TableFormat.text,
) -> None:
    """Print saved measurements as tables: models with their gains, kernels against copies, Inductor and peers.

    Files of one device, day and set of versions make one table for each way of measuring.
    """
    from ..bench import kernels, results, saved, sections, sections_kernels, sections_models

    makers = {results.SCHEMA: sections_models.sections, kernels.SCHEMA: sections_kernels.sections}
    found = saved.merged([saved.read(file) for file in files])
    made = [section for one in found for section in makers[one.schema](one)]
    if format is TableFormat.markdown:
        print(sections.to_markdown(made), end="")
    else:
        from ..bench.session import console

        sections.print_text(made, console(sections.WIDEST))


def _listed(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names of a comma-separated option, each once."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in known:
            raise Failure(USAGE, f"{option} {name} is not allowed: give one or more of {', '.join(known)}")
    if not names:
        raise Failure(USAGE, f"{option} names nothing: give one or more of {', '.join(known)}")
    return names


def _prepare(files: Sequence[Path | None]) -> None:
    for file in files:
        if file is not None:
            check_writable(file)


def _device() -> Any:
    """The GPU to measure on."""
    import torch

    if not torch.cuda.is_available():
        raise Failure(ENVIRONMENT, "dkfuse bench needs a CUDA GPU, and torch sees none here")
    from ..bench.device import Cuda

    return Cuda()
