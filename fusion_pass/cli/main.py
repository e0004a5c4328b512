"""The `dkfuse` command.

Exit codes: 0 ok, 1 a regression against the baseline, 2 below --fail-under, 3 the model could not be traced,
4 environment (a missing package, an unwritable file, an unsupported torch), 64 usage, 70 internal error.
"""

from __future__ import annotations

import enum
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..errors import ReportError
from ..reporting.render import format_of, print_report, render, write
from ..reporting.report import Coverage, Site
from .bench import bench
from .cache import cache_app
from .exits import BELOW, ENVIRONMENT, OK, REGRESSION, USAGE, Failure, check_writable, explain, say
from .kernels import kernels
from .options import Dtype, Size
from .tracing import trace


class Format(str, enum.Enum):
    text = "text"
    json = "json"
    html = "html"
    markdown = "markdown"


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fuse the adaLN, norm, gate and residual code of diffusion transformers under torch.compile.",
)
app.add_typer(bench, name="bench")


app.command()(kernels)
app.add_typer(cache_app, name="cache")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from ..version import __version__

        print(f"dkfuse {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit()


@app.command()
def coverage(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model of the zoo (see `dkfuse zoo`) or path/to/file.py:function.")
    ],
    size: Annotated[Size | None, typer.Option(help="Size of a zoo model.  [default: tiny; full for NAME:SIZE]")] = None,
    layers: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Blocks per stack, instead of the size's own.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of weights and activations.  [default: bf16]")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="TARGET", help="Device to choose kernels for: sm80, sm89, sm90, sm100, cpu or current."
        ),
    ] = None,
    format: Annotated[
        Format | None, typer.Option("--format", "-f", help="[default: by the extension of FILE, else text]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the report here.")
    ] = None,
    fail_under: Annotated[
        float | None, typer.Option(metavar="PCT", min=0, max=100, help="Exit with 2 if less of the sites is fused.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Exit with 1 if a site that this JSON report has as fused is not any more."),
    ] = None,
) -> None:
    """Say what is fused in a model, and why the rest is not.

    The model is traced, never run: zoo models and models built on the meta device need no memory and no GPU.
    A function must return (module, kwargs) and gets --size, --layers and --dtype if it has such parameters.
    """
    from rich.console import Console

    console = Console(stderr=True)
    settings = _settings(target)
    before = _read_baseline(baseline) if baseline else None
    if output:
        check_writable(output)
    found = trace(model, size.value if size else None, layers, dtype.value if dtype else None, settings, console)
    regressions = found.regressions(before) if before else []
    if before and before.model != found.model:
        say(f"note: the baseline is of {before.model}, this report of {found.model}")
    _deliver(found, format.value if format else None, output, regressions)
    if regressions:
        raise Failure(
            REGRESSION, f"{len(regressions)} of the sites that {baseline} has as fused are not fused any more"
        )
    reached = found.totals["coverage"] * 100
    if fail_under is not None and reached < fail_under:
        raise Failure(BELOW, f"{reached:.1f} % of the sites are fused, less than --fail-under {fail_under:g}")


@app.command()
def zoo(
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the models that `dkfuse coverage` knows by name."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..zoo import MODELS

    if json_:
        rows = [
            {
                "name": m.name,
                "repo": m.repo,
                "layers": list(m.depth),
                "tokens": m.tokens,
                "variants": {name: v.tokens for name, v in m.variants.items()},
            }
            for m in MODELS.values()
        ]
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("Name", "Shape of", "Layers", "Tokens at full size"):
        table.add_column(title, no_wrap=title == "Name")
    for entry in MODELS.values():
        table.add_row(entry.name, entry.repo, " + ".join(map(str, entry.depth)), entry.tokens)
        for name, variant in entry.variants.items():
            table.add_row(f"{entry.name}:{name}", "", "", variant.tokens)
    Console().print(table)


@app.command()
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show versions, devices, settings and what is missing."""
    from rich.console import Console

    from .doctor import diagnose
    from .doctor_text import print_diagnosis

    found = diagnose()
    if json_:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        print_diagnosis(found, Console())
    if not found.usable:
        raise typer.Exit(ENVIRONMENT)


def _settings(target: str | None) -> Any:
    from ..settings import TARGETS, Settings

    if target is not None and target not in TARGETS:
        raise Failure(USAGE, f"--target {target} is not allowed: give one of {', '.join(TARGETS)}")
    return Settings.read({} if target is None else {"dkfuse.target": target})


def _deliver(found: Coverage, format: str | None, output: Path | None, regressions: list[Site]) -> None:
    """Print the report, or write it to a file and print the result in one line."""
    from ..reporting.summary import headline

    if output:
        try:
            write(found, output, format or format_of(output), regressions)
        except OSError as error:
            raise Failure(ENVIRONMENT, f"cannot write {output}: {error.strerror or error}") from error
        say(f"{found.model}: {headline(found)}; written to {output}")
    elif format in (None, "text"):
        from rich.console import Console

        print_report(found, Console(highlight=False), regressions)
    else:
        print(render(found, format, regressions), end="")


def _read_baseline(path: Path) -> Coverage:
    try:
        return Coverage.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(USAGE, f"cannot read the baseline {path}: {getattr(error, 'strerror', None) or error}") from error
    except ReportError as error:
        raise Failure(USAGE, f"the baseline {path} is {error}; make one with -o {path} --format json") from error


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are one sentence on stderr."""
    try:
        result = typer.main.get_command(app).main(arguments, prog_name="dkfuse", standalone_mode=False)
        return result if isinstance(result, int) else OK
    except KeyboardInterrupt:
        return 130
    except typer.Abort:
        return 130
    except BrokenPipeError:  # `dkfuse ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed at exit
        return OK
    except Exception as error:
        code, message = explain(error)
        if os.environ.get("DKFUSE_DEBUG") == "1":
            import traceback

            traceback.print_exception(error)
        say(message)
        return code


def main() -> NoReturn:
    """Entry point of the console script."""
    sys.exit(run())
