"""The bench of models: the measuring loop on a made-up device, references, sides, and which models there are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dkfuse import seams, zoo
from dkfuse.bench import measure, reference, sides, targets
from dkfuse.bench.device import Launched, Timed
from dkfuse.bench.others import OTHERS
from dkfuse.bench.results import OURS, ModelResult
from dkfuse.bench.sides import Options
from dkfuse.cli import loading
from dkfuse.errors import ModelError
from dkfuse.settings import Settings


class FakeDevice:
    """A device whose kernels and times are made up: each call of a side takes the next of its times."""

    kind, name = "cpu", "made-up <device>"

    def __init__(self) -> None:
        self.order: list[str] = []
        self.current = ""
        self.launches = 2
        self.before: dict[str, int] = {}

    def seconds(self, run: Callable[[], Any]) -> float:
        run()
        return {OURS: 2.0, "inductor": 1.0}.get(self.current, 0.5)

    def timed(self, run: Callable[[], Any]) -> Timed:
        run()
        self.order.append(self.current)
        slow = 9.0 if self.order.count(self.current) == 2 else 1.0  # an outlier, which a median does not see
        return Timed({OURS: 3.0, "inductor": 4.0}.get(self.current, 8.0) * slow, 0.5)

    def looped(self, run: Callable[[], Any], calls: int) -> float:
        run()
        return {OURS: 2.5, "inductor": 3.5}.get(self.current, 7.5)

    def profiled(self, run: Callable[[], Any], before: int = 0) -> list[Launched]:
        run()
        self.before[self.current] = before
        name, time = {OURS: ("dkfuse_norm_modulate", 1000.0)}.get(self.current, ("triton_red_fused_0", 2000.0))
        return [Launched("nvjet_tst", 4000.0), *[Launched(name, time)] * (self.launches - 1)]

    def peak(self, run: Callable[[], Any]) -> float:
        run()
        return 1.5

    def copy(self, traffic: int) -> float:
        return traffic / 1000

    def synchronize(self) -> None: ...
    def free(self) -> None: ...


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8).bfloat16()

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"sample": (self.linear(x) * 2,), "ids": torch.arange(3)}


def on_fake_device(options: Options, device: FakeDevice, made: list[str] | None = None) -> ModelResult:
    def compile(module: nn.Module, backend: str, **_: Any) -> Callable[..., Any]:
        if made is not None:
            made.append(backend)

        def call(**kwargs: Any) -> Any:
            device.current = backend
            return module(**kwargs)

        return call

    module = Doubles().requires_grad_(False)
    inputs = {"x": torch.randn(4, 8, dtype=torch.bfloat16)}
    weights = module.linear.weight.clone()
    result = measure.compare(targets.Target("m", "file"), module, inputs, options, device, compile, lambda _: None)
    assert module.linear.weight.dtype is torch.bfloat16
    assert torch.equal(module.linear.weight, weights)  # widened for the reference, and narrowed back
    return result


def test_the_measuring_loop() -> None:
    device = FakeDevice()
    result = on_fake_device(Options(rounds=5, profiles=3), device)
    assert device.order == [OURS, "inductor"] * measure.CALLS
    assert device.before == {OURS: min(100, measure.MOST_BEFORE), "inductor": min(75, measure.MOST_BEFORE)}
    ours, theirs = result.sides[OURS], result.sides["inductor"]
    assert (ours.wall, theirs.wall, ours.cpu) == (3.0, 4.0, 0.5)
    assert (ours.loop, theirs.loop) == (2.5, 3.5)
    assert (ours.compile_cold, ours.compile_warm, theirs.compile_cold) == (2.0, 2.0, 1.0)
    assert (ours.gemm, ours.glue, theirs.glue, ours.gpu) == (4.0, 1.0, 2.0, 5.0)
    assert ours.split["dkfuse"] == 1.0
    assert theirs.split["inductor"] == 2.0
    assert result.reference == "fp32"
    assert result.note is None
    assert 0 < ours.error < 0.01  # type: ignore[operator]
    assert result.gain("inductor")["glue"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(("enough", "rounds"), [(30.0, 5), (7.0 * (9 + 8), 10)])
def test_calls_that_take_long_are_timed_as_often_as_asked(
    monkeypatch: pytest.MonkeyPatch, enough: float, rounds: int
) -> None:
    """A round of both sides takes 7 milliseconds, the second nine times as long."""
    monkeypatch.setattr(measure, "ENOUGH", enough)
    device = FakeDevice()
    on_fake_device(Options(rounds=5, profiles=1), device)
    assert device.order == [OURS, "inductor"] * rounds


def test_without_the_warm_compile_each_side_is_compiled_once() -> None:
    device = FakeDevice()
    made: list[str] = []
    result = on_fake_device(Options(("inductor", "eager"), rounds=3, profiles=1, warm=False), device, made)
    assert made == [OURS, "inductor"]
    assert device.order[:3] == [OURS, "inductor", "inductor"]  # eager goes through no backend
    assert (result.sides[OURS].compile_cold, result.sides[OURS].compile_warm) == (2.0, None)
    assert result.ratios("inductor")["compile_warm"] is None
    assert result.sides["eager"].error is not None
    both: list[str] = []
    on_fake_device(Options(rounds=1, profiles=1), FakeDevice(), both)
    assert both == [OURS, "inductor"] * 2


def test_a_full_queue_hides_the_cpu_time_and_eager_is_no_error_of_itself() -> None:
    device = FakeDevice()
    device.launches = 2000
    result = on_fake_device(Options(("eager",), rounds=1, profiles=1, fp32=False), device)
    assert result.sides[OURS].cpu is None
    assert result.reference == "eager"
    assert result.note == "no fp32 reference was asked for"
    assert result.sides["eager"].error is None
    assert result.sides["eager"].compile_cold is None
    assert result.sides[OURS].error == 0.0


def test_a_model_that_does_not_run_in_fp32() -> None:
    class Mixed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.bfloat16())

    module = Mixed(4, 4).bfloat16().requires_grad_(False)
    found, name, why = reference.outputs(module, {"x": torch.ones(2, 4)})
    assert (name, len(found), found[0].dtype) == ("eager", 1, torch.bfloat16)
    assert why is not None
    assert why.startswith("the model does not run in fp32 (")


def test_arguments_of_the_sides() -> None:
    options = Options(mode="reduce-overhead", attention="cudnn")
    own = {"dkfuse.attention": "cudnn", "mode": "reduce-overhead"}
    assert sides.arguments(OURS, options) == {"backend": "dkfuse", "dynamic": False, "options": own}
    assert sides.arguments("inductor", options)["mode"] == "reduce-overhead"
    assert sides.arguments("max-autotune", options)["mode"] == "max-autotune-no-cudagraphs"
    assert sides.arguments(OURS, Options()) == {"backend": "dkfuse", "dynamic": False}
    plain = sides.arguments("plain", Options(attention="fa4"))
    assert plain == {"backend": "dkfuse", "dynamic": False, "options": sides.PLAIN_OPTIONS}
    Settings.parse(None, sides.PLAIN_OPTIONS)[0].check_names(seams.NAMES, ())
    assert options.graphs(OURS)
    assert not options.graphs("max-autotune")


def test_caches_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    monkeypatch.delenv("DKFUSE_CACHE_DIR", raising=False)
    with sides.caches_in(tmp_path):
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
        assert os.environ["DKFUSE_CACHE_DIR"] == str(tmp_path / "dkfuse")
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert "DKFUSE_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_run(name: str) -> None:
    pytest.importorskip("transformers")
    module, kwargs = targets.build(targets.Target(name, "others", 1), None, "tiny", "fp32", "cpu")
    with torch.no_grad():
        found = reference.tensors(module(**kwargs))
    assert found
    assert all(t.shape[0] == 1 and t.isfinite().all() for t in found)
    assert not any(p.requires_grad for p in module.parameters())


def test_targets(tmp_path: Path) -> None:
    assert targets.find("Flux@2") == [targets.Target("flux", "zoo", 2)]
    assert targets.find("dit-xl/2") == [targets.Target("dit-xl-2", "zoo")]
    assert [t.name for t in targets.find("others")] == list(OTHERS)
    assert [t.name for t in targets.find("zoo")] == list(zoo.MODELS)
    headline = {t.name: t.batch for t in targets.find("headline")}
    assert (len(headline), headline["hunyuan-video:480p"], headline["sd35-large"]) == (6, None, 2)
    assert {t.batch for t in targets.find("headline@4")} == {4}
    assert targets.find("Hunyuan_Video:480P@2") == [targets.Target("hunyuan-video:480p", "zoo", 2)]
    for name, message in {
        "hunyuan-video:48p": "no size '48p' of hunyuan-video; did you mean '480p'",
        "flux:480p": "no size '480p' of flux; it has one only",
        "headlin": "did you mean 'headline'",
        "vit:480p": "did you mean 'vit'",
    }.items():
        with pytest.raises(ModelError, match=message):
            targets.find(name)
    with pytest.raises(ModelError, match="the batch size in 'flux@0' is '0'"):
        targets.find("flux@0")
    with pytest.raises(ModelError, match="did you mean 'bert'"):
        targets.find("bertt")
    with pytest.raises(ModelError, match="no file"):
        targets.find(f"{tmp_path / 'none.py'}:make")
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\ndef make(batch=3):\n    return torch.nn.ReLU(), {'input': torch.ones(batch)}\n"
        "def meta():\n    return torch.nn.Linear(2, 2, device='meta'), {}\n"
    )
    (target,) = targets.find(f"{file}:make@5")
    module, kwargs = targets.build(target, None, "full", "bf16", "cpu")
    assert isinstance(module, nn.ReLU)
    assert kwargs["input"].shape == (5,)
    with pytest.raises(ModelError, match="meta device"):
        targets.build(targets.Target(f"{file}:meta", "file"), None, "full", "bf16", "cpu")
    with pytest.raises(ModelError, match="no parameter 'layers'"):
        loading.load_real(f"{file}:make", {"layers": 2})


def test_depths() -> None:
    def depth(model: str, layers: int | None = None, size: str = "full") -> tuple[int, ...]:
        return targets.depth(*targets.find(model), layers, size)

    assert (depth("auraflow", 5), depth("flux"), depth("flux", None, "tiny")) == ((4, 5), (8, 8), (2, 2))
    assert (depth("vit"), depth("vit", 3), depth("vit", None, "tiny")) == ((12,), (3,), (2,))
    assert depth("hunyuan-video:480p", 50) == (20, 40)
    assert targets.depth(targets.Target("m.py:make", "file"), 5, "full") == ()


def test_layers_are_at_most_the_published_ones() -> None:
    pytest.importorskip("diffusers")
    module, _ = targets.build(targets.Target("auraflow", "zoo"), 5, "tiny", "bf16", "cpu")
    assert len(module.joint_transformer_blocks) == 4  # type: ignore[arg-type]
    assert len(module.single_transformer_blocks) == 5  # type: ignore[arg-type]
