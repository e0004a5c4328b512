"""The bench of kernels: providers behind one adapter, crossovers, rendering, and the command line without a GPU."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from dkfuse.bench import kernels, peers, providers, show_kernels
from dkfuse.bench.cases import CASES, Case
from dkfuse.bench.rope_cases import RopeCase
from dkfuse.cli import bench as cli_bench
from dkfuse.kernels import registry
from dkfuse.kernels.ops import reference_outputs
from dkfuse.kernels.registry import Constraint, Implementation

SHAPE = (1, 8, 64)


def _run(arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    for name, value in reference_outputs("norm_modulate", dict(arguments)).items():
        outputs[name].copy_(value)


WIDE = Constraint("D", "D >= 256", lambda a: None if a["x"].shape[-1] >= 256 else f"D is {a['x'].shape[-1]}")
SPREAD = Constraint("pick", "no pick", lambda a: None if a["pick"] is None else "pick is given")


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three providers: one that takes all, one for wide rows of sm90, one whose package is missing."""
    module = types.ModuleType("_bench_provider")
    module.run = _run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "_bench_provider", module)
    made = [
        Implementation("norm_modulate", "cuda", (SPREAD,), "_bench_provider:run"),
        Implementation("norm_modulate", "cute", (WIDE,), "_bench_provider:run", oldest=90),
        Implementation("norm_modulate", "sgl", (), "_no_such_package:run"),
        Implementation("norm_modulate", "triton", (), "_bench_provider:run"),
    ]
    made.append(Implementation("norm_modulate", "native", (), "_bench_provider:run", devices=("cuda", "cpu")))
    table = {(i.provider, i.op): i for i in made}
    monkeypatch.setattr(providers.registry, "implementations", lambda: table)


def operands(width: int = 64) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).bfloat16()

    rows = {"x": random(1, 8, width), "scale": random(1, 1, width), "shift": random(1, 1, width)}
    return {**rows, "weight": None, "bias": None}


def test_a_provider_behind_the_adapter(listed: None) -> None:
    case, given = Case("c", "norm_modulate", SHAPE), operands()
    assert providers.names("norm_modulate") == ["triton", "cuda", "cute", "sgl"]
    (out,) = providers.launcher(case, "cuda", given, 80)()
    (exact,) = case.reference(given)
    assert kernels.error_of([out], [exact]) < 3e-3
    assert providers.launcher(case, "cuda", given, 80)()[0] is not out


@pytest.mark.parametrize(
    ("provider", "capability", "message"),
    [
        ("cute", 80, "not for sm80"),
        ("cute", 90, "D is 64"),
        ("sgl", 90, "not installed: No module named '_no_such_package'"),
        ("flashinfer", 90, "no kernel for norm_modulate"),
    ],
)
def test_a_provider_that_refuses(listed: None, provider: str, capability: int, message: str) -> None:
    with pytest.raises(providers.Refused, match=message):
        providers.launcher(Case("c", "norm_modulate", SHAPE), provider, operands(), capability)


def test_defaults_are_filled_in() -> None:
    complete = providers.filled("norm_modulate", {"x": 1, "out_dtype": torch.float16})
    assert (complete["pick"], complete["roundings"], complete["scale_offset"]) == (None, 0, 1.0)
    assert (complete["x"], complete["out_dtype"]) == (1, torch.float16)
    rope = providers.filled("norm_rope", {})
    assert {"x", "weight", "cos", "sin", "rotation", "tables"} <= set(rope)


def test_the_providers_are_those_of_the_registry() -> None:
    made = registry.register(Implementation("scale_shift", "made_up", (), _run))
    elsewhere = registry.register(Implementation("scale_shift", "other_chip", (), _run, devices=("xpu",)))
    try:
        assert made in providers.implementations("scale_shift")
        assert elsewhere not in providers.implementations("scale_shift")
        assert made not in providers.implementations("norm_rope")
        assert providers.names("scale_shift")[0] == "triton" and "native" not in providers.names("scale_shift")
    finally:
        registry.unregister("made_up")
        registry.unregister("other_chip")
    assert {"cute", "sgl", "flashinfer"} <= set(providers.names("norm_modulate"))


def test_a_failure_is_a_problem_of_its_column() -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("no kernel image\nmore")

    def refused() -> dict[str, Any]:
        raise providers.Refused("D is 3")

    assert kernels.attempt(broken) == {"problem": "RuntimeError: no kernel image"}
    assert kernels.attempt(refused) == {"problem": "D is 3"}


def test_the_listed_shapes() -> None:
    shapes = {(c.op, c.shape) for c in kernels.ALL}
    wanted = [(1, 4096, 3072), (1, 4608, 3072), (1, 32760, 5120), (1, 32760, 1536), (2, 4096, 2432)]
    wanted += [(1, 32760, 3072), (1, 256, 1152), (1, 4096, 3840)]
    for op in ("norm_modulate", "residual_norm_modulate"):
        assert all((op, shape) in shapes for shape in wanted)
    assert len({(c.op, c.name) for c in kernels.ALL}) == len(kernels.ALL)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_the_models_spelling_computes_the_op(case: Case) -> None:
    batch, length = case.shape[0], 4
    small = dataclasses.replace(case, shape=(batch, length, 64))
    given = small.inputs(0, "cpu")
    results, reference = small.eager()(given), small.reference(given)
    assert len(results) == len(reference)
    for result, exact in zip(results, reference, strict=True):
        assert result.shape == exact.shape == (batch, length, 64)
        assert kernels.error_of([result], [exact]) < 1e-2
    per_row = [t for t in given.values() if t is not None and t.numel() >= length * 64]
    moved = sum(t.numel() * t.element_size() for t in per_row)
    assert small.traffic(given) >= moved + len(results) * batch * length * 64 * 2


@pytest.mark.parametrize("op", ["norm_modulate", "residual_norm_modulate"])
def test_norms_alone_are_what_the_libraries_take(op: str) -> None:
    alone = [case for case in CASES if case.op == op and case.alone]
    assert {(1, 4096, 3840), (1, 8064, 2048)} <= {case.shape for case in alone}
    for case in alone:
        small = dataclasses.replace(case, shape=(1, 4, case.shape[-1]))
        [(arguments, _)], _ = small.calls(small.inputs(0, "cpu"))
        complete = providers.filled(op, arguments)
        taken = {i.provider for i in providers.implementations(op) if i.problem(complete) is None}
        assert {"sgl", "flashinfer"} <= taken
        modulated = dataclasses.replace(small, alone=False)
        [(arguments, _)], _ = modulated.calls(modulated.inputs(0, "cpu"))
        complete = providers.filled(op, arguments)
        assert not {"sgl", "flashinfer"} & {
            i.provider for i in providers.implementations(op) if i.problem(complete) is None
        }


def test_rows_and_width() -> None:
    assert Case("c", "norm_modulate", (2, 10, 64)).size == (20, 64)
    assert RopeCase("c", (4, 6), 3, 32, projections=2).size == (60, 32)
    assert RopeCase("c", (4, 6), 3, 32, across=True).size == (10, 96)


def row(case: str, triton: float, cute: float | None, width: int = 3072, **more: Any) -> dict[str, Any]:
    def entry(us: float) -> dict[str, float]:
        return {"microseconds": us, "of_copy": 20 / us, "of_peak": 18 / us, "error": 1e-3}

    found = {
        "op": "norm_modulate",
        "case": case,
        "shape": [1, 4096, width],
        "rows": 4096,
        "width": width,
        "bytes": 50_000_000,
        "copy_microseconds": 20.0,
        "providers": {"triton": entry(triton), "cute": entry(cute) if cute else {"problem": "D is <odd>"}},
        "rivals": {"eager": entry(100.0), "inductor": entry(40.0)},
        "peers": [{"name": "quack", "part": "RMSNorm alone", **entry(21.0)}],
        **more,
    }
    found["best"] = kernels.best(found)
    return found


ROWS = [row("Flux & co", 20.0, 16.0), row("narrow", 10.0, None, 1152), row("same", 20.0, 22.0)]


def test_best_and_speedups() -> None:
    assert [r["best"] for r in ROWS] == ["cute", "triton", "triton"]
    assert kernels.best({"providers": {"triton": {"problem": "x"}}}) is None
    assert kernels.speedups(ROWS, "inductor") == pytest.approx({"norm_modulate": (2.5 * 4 * 2) ** (1 / 3)})
    assert kernels.speedups(ROWS, "max-autotune") == {}


def test_crossovers_take_the_worst_case() -> None:
    assert kernels.crossovers(ROWS) == [("norm_modulate", "cute", 4096, 3072, 1.1)]
    text = show_kernels.crossovers_text(ROWS, "a GPU", "2.11")
    scope: dict[str, Any] = {}
    exec(compile(text, "crossovers.py", "exec"), scope)
    assert scope["CROSSOVERS"] == tuple(kernels.crossovers(ROWS))
    (entry,) = json.loads(show_kernels.crossovers_text(ROWS, "a GPU", "2.11", as_json=True))
    assert entry == {"op": "norm_modulate", "provider": "cute", "rows": 4096, "width": 3072, "ratio": 1.1}
    empty: dict[str, Any] = {}
    exec(show_kernels.crossovers_text([], "a GPU", "2.11"), empty)
    assert empty["CROSSOVERS"] == ()


def test_text_and_picture() -> None:
    out = io.StringIO()
    show_kernels.print_rows(ROWS, Console(file=out, width=200), "a GPU")
    text = out.getvalue()
    for part in (
        "1.250",
        "cute: D is <odd>",
        "quack: RMSNorm alone",
        "2.50x",
        "over Inductor, best provider: norm_modulate 2.71x",
    ):
        assert part in text
    root = ElementTree.fromstring(show_kernels.picture(ROWS, "a GPU"))
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "norm_modulate: Flux & co, 1x4096x3072" in texts
    assert sum(t == "cute" for t in texts) == 1 + 2  # the legend and two bars: the third has no time
    assert json.loads(json.dumps(kernels.report(ROWS, "a GPU", 3e6)))["copy_tb_per_s"] == 3.0


def test_peers_for_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        seen.append((*x.shape, *weight.shape))

    module = types.ModuleType("sgl_kernel")
    module.rmsnorm = rmsnorm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgl_kernel", module)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object() if name == "sgl_kernel" else None)
    ((name, part, make),) = peers.peers_of(Case("c", "norm_modulate", SHAPE), [operands(), operands()])
    for call in make():
        call()
    assert (name, part, seen) == ("sgl-kernel", peers.NORM, [(8, 64, 64)] * 2)
    assert peers.peers_of(Case("c", "scale_shift", SHAPE), [operands()]) == []


def test_peers_of_a_residual_and_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Case("c", "residual_norm_modulate", SHAPE, norm="rms", weight=True, alone=True).inputs(0, "cpu")
    seen: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def quack(x: torch.Tensor, weight: torch.Tensor, bias: None = None, residual: Any = None, eps: float = 0.0) -> None:
        seen["quack"] = (x, residual, weight)

    def liger(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *rest: Any) -> None:
        assert (eps, rest) == (1e-6, (0.0, "llama"))
        seen["Liger"] = (x, residual, weight)

    def in_place(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        seen["FlashInfer"] = (x, residual, weight)
        x.zero_()

    functions = {
        "quack.rmsnorm": ("rmsnorm_fwd", quack),
        "liger_kernel.ops.fused_add_rms_norm": ("fused_add_rms_norm_forward", liger),
        "flashinfer.norm": ("fused_add_rmsnorm", in_place),
    }
    for path, (name, function) in functions.items():
        module = types.ModuleType(path)
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, path, module)
        for i in range(path.count(".")):
            package = path.rsplit(".", i + 1)[0]
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    installed = ("quack", "liger_kernel", "flashinfer")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object() if name in installed else None)
    before = {name: t.clone() for name, t in given.items() if t is not None}
    case = Case("c", "residual_norm_modulate", SHAPE, norm="rms", weight=True, alone=True)
    found = peers.peers_of(case, [given])
    for _, _, make in found:
        for call in make():
            call()
    assert {name: part for name, part, _ in found} == {
        "quack": peers.ADD_NORM,
        "Liger": peers.ADD_NORM,
        "FlashInfer": peers.ADD_NORM_IN_PLACE,
    }
    for x, residual, weight in seen.values():
        assert (x.shape, residual.shape, weight.shape) == ((8, 64), (8, 64), (64,))
        assert weight is given["weight"]
    assert all(torch.equal(given[name], t) for name, t in before.items())  # type: ignore[arg-type]


Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--op", "norm_modulat"], 64, "--op norm_modulat has no cases; did you mean 'norm_modulate'"),
        (["--case", "nothing"], 64, "--case nothing is in no case's name; known: Flux"),
        (["--provider", "tritn"], 64, "--provider tritn is not allowed: give one or more of triton"),
        (["--against", "eager"], 64, "--against eager is not allowed: give one or more of default, max-autotune"),
        (["--picture", "/no/such/folder/x.svg"], 4, "there is no folder"),
        (["--op", "norm_rope", "--peers"], 4, "needs a CUDA GPU, and torch sees none here"),
    ],
)
def test_errors(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, out, err = run("bench", "kernels", *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1


def test_rows_are_printed_and_saved(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def measured(case: Any, *options: Any) -> dict[str, Any]:
        asked.append((case.name, *options[1:]))
        return row(case.name, 20.0, 16.0)

    device = types.SimpleNamespace(name="a <GPU>", copy=lambda traffic: traffic / 2e6, free=lambda: None)
    monkeypatch.setattr(cli_bench, "_device", lambda: device)
    monkeypatch.setattr(kernels, "measure", measured)
    files = ["--json", tmp_path / "x.json", "--picture", tmp_path / "x.svg", "--write-crossovers", tmp_path / "c.py"]
    options = ["--op", "norm_modulate", "--case", "Flux", "--against", "default,max-autotune", "--peers"]
    code, out, err = run("bench", "kernels", *options, "--provider", "triton", *files)
    assert code == 0, err
    assert asked == [(name, ("triton",), ["inductor", "max-autotune"], True) for name, *_ in asked]
    assert [name for name, *_ in asked] == ["Flux, Qwen-Image", "Flux joint", "Flux text"]
    assert "large copy 2.00 TB/s" in out
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 3
    ElementTree.parse(tmp_path / "x.svg")
    assert '("norm_modulate", "cute", 4096, 3072, 0.8),' in (tmp_path / "c.py").read_text()
