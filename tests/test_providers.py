"""Providers other than Triton in compiled programs: their ops, and what happens when they fail. On CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

import dkfuse
from dkfuse import compat
from dkfuse.choosing.example_calls import example
from dkfuse.errors import KernelFailedWarning
from dkfuse.kernels import failures, ops, provider_ops, registry
from dkfuse.kernels.registry import Constraint, Implementation
from dkfuse.kernels.support import OPERANDS
from dkfuse.reporting import recording
from dkfuse.settings import Settings

D = 32
CODES = {"dkfuse.kernels": "mine,native", "dkfuse.remainder": "eager"}


pytestmark = pytest.mark.usefixtures("fresh_providers")


class Kernel:
    """An implementation that counts its runs, computes the definition, and may be told to fail."""

    def __init__(self, op, provider="mine", constraints=(), fails=None):
        self.op, self.runs, self.fails, self.seen = op, 0, fails, []
        self.implementation = registry.register(Implementation(op, provider, constraints, self, devices=("cpu",)))

    def __call__(self, arguments, outputs):
        self.runs += 1
        self.seen.append({k: v.stride() for k, v in arguments.items() if isinstance(v, torch.Tensor)})
        self.written = {k: (t.shape, t.stride()) for k, t in outputs.items()}
        if self.fails is not None:
            raise self.fails
        for name, value in ops.reference_outputs(self.op, dict(arguments)).items():
            if name in outputs:
                outputs[name].copy_(value)


def block(x, scale, shift, weight):
    return (F.layer_norm(x, (D,)) * (1 + scale[:, None]) + shift[:, None]) @ weight


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, D), (2, D), (2, D), (D, D))
    return [torch.randn(s, generator=generator) for s in shapes]


def compiled(function, *values, **options):
    with torch.no_grad(), dkfuse.record() as coverage:
        program = torch.compile(function, backend="dkfuse", options={**CODES, **options}, dynamic=False)
        result = program(*values)
    torch.testing.assert_close(result, function(*values), atol=1e-4, rtol=1e-4)
    return coverage, program


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_a_provider_runs_in_compiled_programs(remainder):
    kernel = Kernel("norm_modulate")
    coverage, program = compiled(block, *inputs(), **{"dkfuse.remainder": remainder})
    (site,) = coverage.fused()
    assert (site.kernel, kernel.runs) == ("mine", 1)
    program(*inputs())
    assert kernel.runs == 2


def test_operands_arrive_with_the_strides_that_were_checked():
    """Inductor would hand over the transposed matrix product in a layout of its own choice."""

    def constraint(arguments):
        stride = arguments["scale"].stride()
        return None if stride[-1] == 1 and stride[0] == 6 * D else f"stride {stride}"

    kernel = Kernel("norm_modulate", constraints=(Constraint("strides", "as planned", constraint),))

    def model(x, t, weight):
        shift, scale = (F.silu(t) @ weight).chunk(6, -1)[:2]
        y = x.transpose(1, 2).contiguous().transpose(1, 2) + 1
        return (F.layer_norm(y.contiguous(), (D,)) * (1 + scale[:, None]) + shift[:, None]) @ weight[:, :D]

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator) for s in ((2, 5, D), (2, D), (D, 6 * D))]
    coverage, _ = compiled(model, *values, **{"dkfuse.remainder": "inductor"})
    assert [s.kernel for s in coverage.fused()] == ["mine"] and kernel.runs == 1
    assert kernel.seen[0]["scale"][0] == 6 * D and kernel.seen[0]["x"] == (5 * D, D, 1)


def test_a_sum_that_nobody_reads_is_not_asked_for():
    def last(x, y, g, w):
        return F.layer_norm(x + g[:, None] * y, (D,)) @ w

    def both(x, y, g, w):
        r = x + g[:, None] * y
        return r, F.layer_norm(r, (D,)) @ w

    kernel = Kernel("residual_norm_modulate")
    x, g, _, w = inputs()
    compiled(last, x, x * 2, g, w)
    assert set(kernel.written) == {"out"}
    torch.compiler.reset()
    compiled(both, x, x * 2, g, w)
    assert set(kernel.written) == {"out", "sum"} and kernel.runs == 2


def test_parts_of_a_joint_tensor_are_joined_by_its_cat():
    kernel = Kernel("norm_rope")

    def rotate(x, cos, sin):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def attend(q1, q2, weight, cos, sin):
        q = torch.cat([F.rms_norm(q1, (D,), weight, 1e-6), F.rms_norm(q2, (D,), weight, 1e-6)], 2)
        q = rotate(q, cos, sin)
        return F.scaled_dot_product_attention(q, q, q)

    generator = torch.Generator().manual_seed(0)
    q1, q2 = (torch.randn(1, 2, n, D, generator=generator) for n in (3, 5))
    angles = torch.randn(8, D // 2, generator=generator).repeat(1, 2)
    coverage, _ = compiled(attend, q1, q2, torch.rand(D, generator=generator), angles.cos(), angles.sin())
    fused = [site for site in coverage.fused() if site.kernel == "mine"]
    assert fused and kernel.runs == 2, coverage


@pytest.mark.parametrize("op", OPERANDS)
def test_opcheck(op):
    Kernel(op)
    shape = (2, 4, 2, 16) if op == "norm_rope" else (2, 4, 16)
    call = {k: torch.rand(v.shape).to(v) if isinstance(v, torch.Tensor) else v for k, v in example_real(op, shape)}
    schema = getattr(torch.ops.dkfuse, op).default._schema.arguments
    args = tuple(call.pop(a.name) for a in schema if not a.kwarg_only)
    overload = getattr(torch.ops.dkfuse_mine, op).default
    assert str(overload._schema).split("::")[1] == str(getattr(torch.ops.dkfuse, op).default._schema).split("::")[1]
    torch.library.opcheck(overload, args, call)


def example_real(op, shape):
    for name, value in example(op, shape, torch.float32).items():
        yield name, torch.empty_like(value, device="cpu") if isinstance(value, torch.Tensor) else value


def test_on_a_device_that_is_not_the_providers_the_definition_runs():
    def never(arguments, outputs):
        raise AssertionError("not on this device")

    registry.register(Implementation("scale_shift", "other", (), never, devices=("cuda",)))
    x = torch.randn(2, 3, 8)
    out = torch.ops.dkfuse_other.scale_shift(x, x, None, out_dtype=torch.float32)
    torch.testing.assert_close(out, x * (1 + x))


def test_an_op_with_another_schema_is_refused():
    library = torch.library.Library("dkfuse_strange", "FRAGMENT")
    library.define("scale_shift(Tensor x) -> Tensor")
    try:
        with pytest.raises(RuntimeError, match="another schema"):
            registry.register(Implementation("scale_shift", "strange", (), print, devices=("cpu",)))
    finally:
        registry.unregister("strange")


def test_a_launch_that_fails_is_computed_and_reported_and_not_tried_again():
    kernel = Kernel("norm_modulate", fails=RuntimeError("illegal instruction\nand more"))
    with pytest.warns(
        KernelFailedWarning, match=r"mine's kernel for norm_modulate failed .*illegal instruction; plain"
    ):
        coverage, program = compiled(block, *inputs())
    (site,) = coverage.sites
    assert [r.code for r in site.passed_over] == ["kernel_failed"] and site.kernel == "mine"
    assert "1 site: mine's kernel for norm_modulate failed when it was launched" in str(coverage)
    assert json.loads(coverage.to_json())["sites"][0]["passed_over"][0]["rule"] == "mine"
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelFailedWarning)
        torch.testing.assert_close(program(*inputs()), block(*inputs()), atol=1e-4, rtol=1e-4)
        assert kernel.runs == 1
        torch.compiler.reset()
        again, _ = compiled(block, *inputs())
    assert (again.sites[0].kernel, again.sites[0].passed_over[0].code) == ("native", "kernel_failed")


def test_a_report_that_cannot_be_written_stops_no_model(tmp_path, monkeypatch, caplog):
    """Neither when a graph is compiled, nor when a launch fails later and the report is written again."""
    monkeypatch.setattr(recording, "_files", {})
    folder = tmp_path / "reports"
    kernel = Kernel("norm_modulate")
    _, program = compiled(block, *inputs(), **{"dkfuse.report": str(folder / "coverage.json")})
    folder.mkdir()
    torch.compiler.reset()
    _, program = compiled(block, *inputs(), **{"dkfuse.report": str(folder / "coverage.json")})
    (folder / "coverage.json").unlink()
    folder.rmdir()
    kernel.fails = RuntimeError("illegal instruction")
    with torch.no_grad(), pytest.warns(KernelFailedWarning, match="illegal instruction"):
        torch.testing.assert_close(program(*inputs()), block(*inputs()), atol=1e-4, rtol=1e-4)
    assert [r.getMessage().count("coverage.json cannot be written") for r in caplog.records] == [1, 1]


def test_out_of_memory_is_not_taken_for_a_broken_kernel():
    Kernel("norm_modulate", fails=torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        torch.compile(block, backend="dkfuse", options=CODES)(*inputs())
    assert not failures._known


def built_by(monkeypatch, prepare, run):
    """A module with `prepare`, and an implementation that names it."""
    module = types.ModuleType("a_provider_of_the_tests")
    module.prepare, module.run = prepare, run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registry.register(Implementation("norm_modulate", "mine", (), "a_provider_of_the_tests:run", devices=("cpu",)))


@pytest.mark.parametrize("kernels", ["mine,native", "mine"])
def test_a_kernel_that_cannot_be_built(monkeypatch, kernels):
    """The next provider takes the site; without one, the site stays what it was."""
    asked = []

    def prepare(arguments, outputs):
        asked.append((tuple(arguments["x"].shape), set(outputs)))
        raise ValueError("no such instruction")

    built_by(monkeypatch, prepare, Kernel("gated_residual", "other"))
    with pytest.warns(KernelFailedWarning, match=r"test_providers\.py:\d+.* could not be built: ValueError: no such"):
        coverage, _ = compiled(block, *inputs(), **{"dkfuse.kernels": kernels})
    (site,) = coverage.sites
    assert asked == [((2, 5, D), {"out"})]
    if kernels == "mine":
        assert site.status is dkfuse.Status.REJECTED and site.reason.code == "kernel_failed"
    else:
        assert site.kernel == "native" and site.passed_over[0].code == "kernel_failed"


def test_a_kernel_is_built_once_for_equal_sites_before_it_runs(monkeypatch):
    order = []
    kernel = Kernel("gated_residual", "other")
    kernel.op = "norm_modulate"

    def run(arguments, outputs):
        order.append("run")
        kernel(arguments, outputs)

    built_by(monkeypatch, lambda arguments, outputs: order.append("build"), run)
    compiled(lambda x, s, t, w: block(block(x, s, t, w), s, t, w), *inputs())
    assert order == ["build", "run", "run"]


def test_a_broken_package_is_a_failure(monkeypatch):
    registry.register(Implementation("norm_modulate", "mine", (), "no_such_module_here:run", devices=("cpu",)))
    with pytest.warns(KernelFailedWarning, match="ModuleNotFoundError"):
        coverage, _ = compiled(block, *inputs())
    assert coverage.sites[0].kernel == "native"


def breaking(monkeypatch, breaks):
    """Inductor that runs the pass and fails where `breaks` says so of the graph's targets."""
    calls = []

    def inductor(gm, values, options):
        def inner(graph_module, _):
            options["post_grad_custom_pre_pass"](graph_module.graph)
            graph_module.recompile()
            targets = [str(node.target) for node in graph_module.graph.nodes]
            calls.append(targets)
            breaks(targets)
            return graph_module.forward

        return compat.lower_with(gm, values, inner, {})

    monkeypatch.setattr(compat, "inductor", inductor)
    return calls


def test_a_kernel_that_inductor_cannot_compile(monkeypatch):
    kernel, other = Kernel("norm_modulate"), Kernel("norm_modulate", "other")

    def breaks(targets):
        if "dkfuse_mine.norm_modulate.default" in targets:
            raise RuntimeError("out of resource: shared memory")

    calls = breaking(monkeypatch, breaks)
    options = {"dkfuse.remainder": "inductor", "dkfuse.kernels": "mine,other"}
    with pytest.warns(KernelFailedWarning, match=r"test_providers\.py:\d+.*mine.*out of resource"):
        coverage, _ = compiled(block, *inputs(), **options)
    (site,) = coverage.sites
    assert (site.kernel, kernel.runs, other.runs, len(calls)) == ("other", 0, 1, 2)
    assert site.passed_over[0].code == "kernel_failed" and "shared memory" in site.passed_over[0].message


def test_an_error_that_inductor_raises_anyway_is_raised(monkeypatch):
    Kernel("norm_modulate")

    def breaks(targets):
        raise RuntimeError("a bug of somebody else")

    calls = breaking(monkeypatch, breaks)
    options = {**CODES, "dkfuse.remainder": "inductor"}
    with warnings.catch_warnings(), pytest.raises(Exception, match="a bug of somebody else"), torch.no_grad():
        warnings.simplefilter("error", KernelFailedWarning)
        torch.compile(block, backend="dkfuse", options=options)(*inputs())
    assert len(calls) == 2 and not failures._known, "our kernels are not to blame"


def test_only_the_op_that_the_error_names_is_blamed():
    from dkfuse.choosing.building import Launched, blamed

    calls = [
        Launched("triton", op, example(op, (2, 4, 16), torch.float32), "") for op in ("norm_modulate", "gated_residual")
    ]
    error = RuntimeError("loading failed")
    error.__cause__ = ValueError("at 3:4 in def dkfuse_gated_residual_0(x, out)")
    assert [f.op for f in blamed(error, calls)] == ["gated_residual"]
    assert [f.op for f in blamed(RuntimeError("?"), calls)] == ["norm_modulate", "gated_residual"]


def test_the_eager_op_survives_a_triton_kernel_that_does_not_build(monkeypatch):
    def broken(launch, tensors):
        raise RuntimeError("PTX version 9.9 does not support target")

    call = dict(example_real("scale_shift", (2, 3, 8)))
    call = {k: torch.rand_like(v) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    monkeypatch.setattr(ops, "_planned", lambda *_: object())
    monkeypatch.setattr(ops, "run", broken)
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    with pytest.warns(KernelFailedWarning, match="PTX version"):
        out = ops._triton("scale_shift", call)
    torch.testing.assert_close(out, call["x"] * (1 + call["scale"]) + call["shift"])
    ops._plans.clear()


def test_a_graph_is_planned_without_building(monkeypatch):
    def prepare(arguments, outputs):
        raise AssertionError("built while planning")

    built_by(monkeypatch, prepare, Kernel("gated_residual", "other"))
    model = torch.nn.LayerNorm(D, elementwise_affine=False)

    class Modulated(torch.nn.Module):
        def forward(self, x, scale, shift, weight):
            return (model(x) * (1 + scale[:, None]) + shift[:, None]) @ weight

    coverage = dkfuse.coverage(Modulated(), *inputs(), settings=Settings.read({"dkfuse.kernels": "mine"}, {}))
    assert [site.kernel for site in coverage.sites] == ["mine"]


def test_the_example_runs_its_kernel(root):
    done = subprocess.run([sys.executable, "examples/custom_kernel.py"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "dkfuse::norm_modulate by mine; 1 call, largest difference " in done.stdout
    assert float(done.stdout.split()[-1]) < 1e-4


def test_without_a_compiler_the_definition_is_an_op_of_its_own_where_triton_would_run():
    """With dkfuse.remainder=eager, dkfuse.kernels=native on a GPU must not launch Triton."""
    from dkfuse.rewriting.opaque import is_opaque

    for provider, device, eager, opaque in (
        ("native", "meta", True, True),
        ("native", "meta", False, False),
        ("native", "cpu", True, False),
        ("triton", "meta", True, False),
    ):
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(2, 8, device=device)
        call = graph.call_function(torch.ops.dkfuse.scale_shift.default, (x, None, None), {"out_dtype": torch.float32})
        call.meta["dkfuse_kernel"] = provider
        assert is_opaque(call, eager) is opaque
    x = torch.randn(2, 8)
    registry.implementations()
    provider_ops.define_all()
    out = torch.ops.dkfuse_native.scale_shift(x, x, None, out_dtype=torch.float32)
    torch.testing.assert_close(out, x * (1 + x))
