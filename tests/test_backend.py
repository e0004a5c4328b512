"""The backend itself: options, modes, passing through, falling back, numerics outside sites, and warm starts."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed

import dkfuse
from dkfuse import compat, fuse
from dkfuse.errors import PassedThroughWarning, SettingsError

D = 32


def block(x, scale, shift, weight):
    return (F.layer_norm(x, (D,)) * (1 + scale[:, None]) + shift[:, None]) @ weight


def inputs(requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, D), (2, D), (2, D), (D, D))
    return [torch.randn(s, generator=generator).bfloat16().requires_grad_(requires_grad) for s in shapes]


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def inductor_calls(monkeypatch):
    """What would be handed to Inductor, which is not run."""
    calls = []

    def inductor(gm, example_inputs, options):
        calls.append(options)
        return gm.forward

    monkeypatch.setattr(compat, "inductor", inductor)
    monkeypatch.setattr(compat, "plain_inductor", inductor)
    return calls


def test_modes_and_options_reach_inductor(inductor_calls):
    with torch.no_grad():
        torch.compile(block, backend="dkfuse", mode="reduce-overhead")(*inputs())
        torch.compiler.reset()
        torch.compile(block, backend="dkfuse", options={"max_autotune": True, "dkfuse.fuel": 3})(*inputs())
        torch.compiler.reset()
        torch.compile(block, backend="dkfuse", options={"mode": "max-autotune", "epilogue_fusion": False})(*inputs())
    first, second, third = inductor_calls
    assert first["triton.cudagraphs"] is True
    assert second["max_autotune"] is True and not any(k.startswith("dkfuse") for k in second)
    assert third["max_autotune"] is True and third["epilogue_fusion"] is False and "mode" not in third


def test_an_unknown_option_names_the_nearest(inductor_calls):
    words = r"unknown option 'dkfuse\.feul'; did you mean 'dkfuse\.fuel'"
    with pytest.raises(BackendCompilerFailed, match=words) as caught, torch.no_grad():
        torch.compile(block, backend="dkfuse", options={"dkfuse.feul": 3})(*inputs())
    assert isinstance(caught.value.inner_exception, SettingsError)


def test_an_unknown_rule_or_kernel_is_an_error(inductor_calls):
    for option, value, known in (("rules", "normm", "norm"), ("kernels", "trition", "triton")):
        torch.compiler.reset()
        with pytest.raises(Exception, match=known), torch.no_grad():
            torch.compile(block, backend="dkfuse", options={f"dkfuse.{option}": value})(*inputs())


def test_a_kernel_that_cannot_run_here_is_not_chosen():
    with torch.no_grad(), dkfuse.record() as coverage:
        options = {"dkfuse.remainder": "eager", "dkfuse.kernels": "triton", "dkfuse.target": "cpu"}
        torch.compile(block, backend="dkfuse", options=options)(*inputs())
    (site,) = coverage.sites
    assert site.reason is not None and site.reason.code == "no_kernel" and "triton" in site.reason.message


def test_disabled_by_the_environment(inductor_calls, monkeypatch):
    monkeypatch.setenv("DKFUSE_DISABLE", "1")
    with torch.no_grad(), dkfuse.record() as coverage:
        torch.compile(block, backend="dkfuse")(*inputs())
    assert "post_grad_custom_pre_pass" not in inductor_calls[0]
    assert "DKFUSE_DISABLE" in (coverage.graphs[0].note or "") and not coverage.sites


def test_training_graphs_pass_through_with_a_reason(inductor_calls):
    """A model from a file has parameters that require grad: without torch.no_grad() nothing is fused."""
    words = r"a graph is left to Inductor unchanged: training: .* \(use torch.no_grad\(\)\)"
    warned = pytest.warns(PassedThroughWarning, match=words)
    with warned, dkfuse.record() as coverage:
        torch.compile(block, backend="dkfuse")(*inputs(requires_grad=True))
    assert "training" in (coverage.graphs[0].note or "")
    assert "nothing was fused: 1 of 1 graph passed through unchanged" in str(coverage)


def test_parameters_that_require_grad_are_fine_without_grad(inductor_calls):
    with torch.no_grad(), dkfuse.record() as coverage:
        torch.compile(block, backend="dkfuse", options={"dkfuse.remainder": "eager"})(*inputs(requires_grad=True))
    coverage.assert_fused("norm_modulate", exactly=1)


def test_an_error_of_ours_leaves_the_graph_to_inductor(monkeypatch, caplog):
    def broken(graph, settings):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(fuse, "run", broken)
    values = inputs()
    with torch.no_grad(), dkfuse.record() as coverage:
        out = torch.compile(block, backend="dkfuse")(*values)
    assert "a bug of ours" in (coverage.graphs[0].note or "")
    assert "a bug of ours" in caplog.text
    torch.testing.assert_close(out, block(*values), atol=0.1, rtol=0.05)


def test_fuel_and_rules_and_report(tmp_path):
    def two(x, scale, shift, weight):
        return block(block(x, scale, shift, weight), scale, shift, weight)

    report = tmp_path / "coverage.json"
    options = {"dkfuse.remainder": "eager", "dkfuse.fuel": 1, "dkfuse.report": str(report)}
    with torch.no_grad(), dkfuse.record() as coverage:
        torch.compile(two, backend="dkfuse", options=options)(*inputs())
    coverage.assert_fused("norm_modulate", exactly=1)
    (left,) = [s for s in coverage.sites if s.reason]
    assert "fuel" in {attempt.code for attempt in left.attempts}
    assert json.loads(report.read_text())["totals"]["fused"] == 1
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        torch.compile(two, backend="dkfuse", options={"dkfuse.remainder": "eager", "dkfuse.rules": "-norm_modulate"})(
            *inputs()
        )
    assert not coverage.fused("norm_modulate")
    assert {s.reason.code for s in coverage.sites if s.reason} <= {"disabled", "feeds_pointwise"}


def test_the_timestep_keeps_eagers_rounding():
    """3.5 * 1000 is 3504 in bf16; Inductor alone computes the sine of 3500."""

    def embed(t, frequencies):
        return torch.sin((t.to(torch.bfloat16) * 1000)[:, None].float() * frequencies)

    t, frequencies = torch.tensor([0.7, 3.5]), torch.exp(-torch.arange(8) / 2.0)
    with torch.no_grad():
        out = torch.compile(embed, backend="dkfuse")(t, frequencies)
    torch.testing.assert_close(out, embed(t, frequencies), atol=2e-3, rtol=0)


SCRIPT = """
    import json, sys, torch, dkfuse, torch.nn.functional as F
    torch.manual_seed(0)

    def f(x, s, w):
        return (F.layer_norm(x, (32,)) * (1 + s[:, None])) @ w

    args = [torch.randn(2, 5, 32).bfloat16(), torch.randn(2, 32).bfloat16(), torch.randn(32, 32).bfloat16()]
    with torch.no_grad(), dkfuse.record() as coverage:
        torch.compile(f, backend="dkfuse", dynamic=False)(*args)
    (graph,) = coverage.graphs
    print(json.dumps({"cached": graph.from_cache, "ids": [s.id for s in coverage.sites], **coverage.totals}))
"""


PACKED = """
    import os

    class Model(torch.nn.Module):
        def __init__(self, buffers):
            super().__init__()
            for i, half in enumerate(half for buffer in buffers for half in buffer.split(32)):
                self.register_parameter(f"w{i}", torch.nn.Parameter(half, requires_grad=False))

        def forward(self, x, s, w):
            return [f(x, s, w), *(F.linear(x, weight) for weight in (self.w0, self.w1, self.w2, self.w3))]

    buffers = [torch.randn(64, 32).bfloat16() for _ in range(8)]
    buffers.sort(key=lambda buffer: buffer.untyped_storage()._cdata, reverse=os.environ["ORDER"] == "down")
    model = Model(buffers[:2])
"""


def start(folder: pathlib.Path, packed: bool = False, before: str = "", after: str = "", **environment: str) -> dict:
    script = folder / "script.py"
    text = "\n".join(map(textwrap.dedent, (before, SCRIPT, after)))
    if packed:
        text = text.replace("\nwith ", textwrap.dedent(PACKED) + "\nwith ", 1).replace("compile(f,", "compile(model,")
    script.write_text(text)
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), **environment}
    done = subprocess.run([sys.executable, str(script)], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_warm_start_reports_what_the_cold_one_did(tmp_path):
    cold, warm = start(tmp_path), start(tmp_path)
    assert (cold["cached"], warm["cached"]) == (False, True), "Inductor's cache was not used"
    assert cold["fused"] == warm["fused"] == 1 and cold["ids"] == warm["ids"]
    for record in (tmp_path / "inductor" / "dkfuse" / "records").glob("*.json"):
        record.unlink()
    again = start(tmp_path)
    assert again["fused"] == 1 and not again["cached"], "a graph without its record must be compiled anew"
    for record in (tmp_path / "inductor" / "dkfuse" / "records").glob("*.json"):
        record.write_text(json.dumps({**json.loads(record.read_text()), "coverage": None}))
    again = start(tmp_path)
    assert again["fused"] == 1 and not again["cached"], "nor may one be found whose record was only begun"


SAVE = """
    import os, pathlib
    artifacts, _ = torch.compiler.save_cache_artifacts()
    pathlib.Path(os.environ["ARTIFACTS"]).write_bytes(artifacts)
"""
LOAD = """
    import os, pathlib, torch
    torch.compiler.load_cache_artifacts(pathlib.Path(os.environ["ARTIFACTS"]).read_bytes())
"""


def test_artifacts_of_the_compiler_start_another_machine_warm(tmp_path):
    """Loaded before dkfuse is imported, and saved from a warm start as from a cold one."""
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for i, folder in enumerate(folders):
        folder.mkdir()
        found = start(folder, before=LOAD * (i > 0), after=SAVE, ARTIFACTS=str(tmp_path / "artifacts"))
        assert (found["fused"], found["cached"]) == (1, i > 0)


def test_a_warm_start_of_packed_weights(tmp_path):
    """Which of two storages has the lower address is another thing in each process."""
    cold, warm = (start(tmp_path, packed=True, ORDER=order) for order in ("up", "down"))
    assert (cold["cached"], warm["cached"]) == (False, True)


OPS = """
    import importlib, json, pkgutil, torch, dkfuse, dkfuse.kernels
    from dkfuse.kernels.provider_ops import define_all

    def known():
        return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dkfuse")}

    torch._dynamo.lookup_backend("dkfuse")
    define_all()  # as each compilation does
    before = known()
    for module in pkgutil.iter_modules(dkfuse.kernels.__path__):
        try:
            importlib.import_module(f"dkfuse.kernels.{module.name}")
        except ImportError:
            print(module.name, "needs what is not installed")
    print(json.dumps([sorted(before), sorted(known() - before)]))
"""


def test_compiled_code_from_a_cache_finds_every_op(tmp_path):
    """No pass runs there that would import the module of an op."""
    script = tmp_path / "ops.py"
    script.write_text(textwrap.dedent(OPS))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    before, later = json.loads(done.stdout.splitlines()[-1])
    assert {"dkfuse::attention", "dkfuse::linear", "dkfuse::norm_rope"} <= set(before) and later == []


def test_an_option_is_part_of_the_cache_key(tmp_path):
    assert start(tmp_path)["fused"] == 1
    other = start(tmp_path, DKFUSE_FUEL="0")
    assert other["fused"] == 0 and not other["cached"]
