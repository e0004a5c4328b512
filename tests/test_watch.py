"""Kernels that compile and fail at their first launch: what the watched first call of a program does. On CPU."""

from __future__ import annotations

import linecache
import timeit
import warnings

import pytest
import torch
import torch.nn.functional as F

import dkfuse
from dkfuse import compat
from dkfuse.choosing import watch
from dkfuse.errors import KernelFailedWarning, KernelLaunchError
from dkfuse.kernels import failures, ops, registry
from dkfuse.kernels.registry import Implementation

D = 32


@pytest.fixture(autouse=True)
def cache_folder(fresh_providers, tmp_path, monkeypatch):
    monkeypatch.setenv("DKFUSE_CACHE_DIR", str(tmp_path))


def offer(provider, op="norm_modulate"):
    def run(arguments, outputs):
        for name, value in ops.reference_outputs(op, dict(arguments)).items():
            if name in outputs:
                outputs[name].copy_(value)

    registry.register(Implementation(op, provider, (), run, devices=("cpu",)))


def block(x, scale, shift, weight):
    return (F.layer_norm(x, (D,)) * (1 + scale[:, None]) + shift[:, None]) @ weight


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator) for s in ((2, 5, D), (2, D), (2, D), (D, D))]


def wrapper(line, error):
    """A function of one line, as of a wrapper that Inductor generated, in which a kernel raises `error`."""

    class Kernel:
        @staticmethod
        def run(*args):
            raise error

        norm_modulate = run

    name, source = f"generated_{len(linecache.cache)}.py", f"def call(args):\n    {line}\n"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    names = ("dkfuse_mine", "dkfuse_norm_modulate_0", "dkfuse_gated_residual_x2_1", "triton_poi_fused_0")
    scope = dict.fromkeys(names, Kernel)
    exec(compile(source, name, "exec"), scope)
    return scope["call"]


LINE = "dkfuse_mine.norm_modulate(args)"
REFUSED = RuntimeError("CUDA driver error: invalid argument")


class Inductor:
    """Inductor that runs the pass; what it compiles raises `error` in a line of a wrapper where `fails` is launched."""

    def __init__(self, monkeypatch, error=REFUSED, line=LINE, fails="dkfuse_mine.norm_modulate.default"):
        self.error, self.line, self.fails = error, line, fails
        self.compiled = self.called = 0
        monkeypatch.setattr(compat, "inductor", self)
        monkeypatch.setattr(compat, "plain_inductor", self)

    def __call__(self, gm, values, options):
        def inner(graph_module, _):
            if "post_grad_custom_pre_pass" in options:
                options["post_grad_custom_pre_pass"](graph_module.graph)
            graph_module.recompile()
            self.compiled += 1
            targets = {str(node.target) for node in graph_module.graph.nodes}
            launch = wrapper(self.line, self.error)

            def forward(*args):
                self.called += 1
                result = graph_module.forward(*args)  # what a kernel before the broken one may have written
                if self.fails in targets:
                    launch(args)
                return result

            return forward

        return compat.lower_with(gm, values, inner, {})


def compiled(function=block, kernels="mine,other"):
    return torch.compile(function, backend="dkfuse", options={"dkfuse.kernels": kernels}, dynamic=False)


@pytest.mark.parametrize("kernels", ["mine,other", "mine"])
def test_a_kernel_that_is_refused_at_its_first_launch(monkeypatch, kernels):
    """Compiled once more: the next provider takes the site, or it stays what it was."""
    offer("mine")
    offer("other")
    inductor, values = Inductor(monkeypatch), inputs()
    program = compiled(kernels=kernels)
    message = r"test_watch\.py:\d+.*mine's kernel for norm_modulate failed when it was launched: .*invalid argument"
    with pytest.warns(KernelFailedWarning, match=message) as caught, torch.no_grad(), dkfuse.record() as coverage:
        result = program(*values)
    assert len([w for w in caught if w.category is KernelFailedWarning]) == 1
    torch.testing.assert_close(result, block(*values))
    (graph,) = coverage.graphs
    (site,) = graph.sites
    assert graph.index == 0 and (inductor.compiled, inductor.called) == (2, 2)
    if kernels == "mine":
        assert site.status is dkfuse.Status.REJECTED and site.reason.code == "kernel_failed"
    else:
        assert site.kernel == "other" and [r.code for r in site.passed_over] == ["kernel_failed"]
    with torch.no_grad():
        program(*values)
    assert (inductor.compiled, inductor.called) == (2, 3)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), LINE),
        (RuntimeError("CUDA driver error: out of memory"), LINE),
        (RuntimeError("a bug of somebody else"), "triton_poi_fused_0.run(args)"),
        (RuntimeError("dkfuse_mine.norm_modulate"), "triton_poi_fused_0.run(args)"),
    ],
)
def test_errors_that_are_not_a_kernels_are_raised(monkeypatch, error, line):
    offer("mine")
    offer("other")
    inductor = Inductor(monkeypatch, error, line)
    with pytest.raises(type(error), match=str(error)), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", KernelFailedWarning)
        compiled()(*inputs())
    assert inductor.compiled == 1 and not failures._known


def test_an_error_of_the_second_call_is_raised(monkeypatch):
    offer("mine")
    offer("other")
    inductor = Inductor(monkeypatch, fails="nothing")
    program = compiled()
    with torch.no_grad():
        program(*inputs())
        inductor.fails = "dkfuse_mine.norm_modulate.default"
        with pytest.raises(RuntimeError, match="invalid argument"):
            program(*inputs())
    assert inductor.compiled == 1 and not failures._known


def test_inputs_are_not_written_twice(monkeypatch):
    """The call raises, and the next one runs without the kernel."""

    def step(state, x, scale, shift, weight):
        state.add_(1)
        return block(x, scale, shift, weight)

    offer("mine")
    offer("other")
    inductor, state = Inductor(monkeypatch), torch.zeros(3)
    program = compiled(step)
    message = r"norm_modulate failed when it was launched \(RuntimeError: .*invalid argument\).* writes into its inputs"
    with torch.no_grad(), pytest.warns(KernelFailedWarning):
        with pytest.raises(KernelLaunchError, match=message) as caught:
            program(state, *inputs())
        assert caught.value.__cause__ is REFUSED and inductor.called == 1
        assert torch.equal(state, torch.ones(3)), "the broken call wrote it"
        torch.testing.assert_close(program(state, *inputs()), block(*inputs()))
    assert torch.equal(state, torch.full((3,), 2.0)) and inductor.called == 2


def test_symbolic_sizes_do_not_go_on_for_ever(monkeypatch):
    """Each trace names the symbols anew, so that a failure may not be recognised: then Inductor alone compiles."""
    offer("mine")
    inductor, values = Inductor(monkeypatch), inputs()
    monkeypatch.setattr(failures, "known", lambda *_: None)
    with torch.no_grad(), pytest.warns(KernelFailedWarning), dkfuse.record() as coverage:
        result = torch.compile(block, backend="dkfuse", options={"dkfuse.kernels": "mine"}, dynamic=True)(*values)
    torch.testing.assert_close(result, block(*values))
    assert inductor.compiled == 3 and [g.note for g in coverage.graphs] == [
        "mine's kernel for norm_modulate failed when it was launched: RuntimeError: CUDA driver error: invalid "
        "argument; so did it after another compilation"
    ]


def test_a_graph_from_the_cache_is_compiled_anew(monkeypatch):
    """Nobody knows what it launches; and the next process must not find it there."""
    offer("mine")
    offer("other")
    inductor = Inductor(monkeypatch)
    fails, inductor.fails = inductor.fails, "nothing"
    with torch.no_grad():
        compiled()(*inputs())
    torch.compiler.reset()

    def cached(gm, values, options):
        monkeypatch.setattr(compat, "inductor", inductor)
        inductor.fails = fails
        launch = wrapper(LINE, REFUSED)
        return lambda *args: launch(args)

    monkeypatch.setattr(compat, "inductor", cached)
    with torch.no_grad(), pytest.warns(KernelFailedWarning), dkfuse.record() as coverage:
        result = compiled()(*inputs())
    torch.testing.assert_close(result, block(*inputs()))
    (graph,) = coverage.graphs
    assert not graph.from_cache and graph.sites[0].kernel == "other" and inductor.compiled == 3


def test_which_kernels_the_lines_name():
    from dkfuse.choosing.building import Launched, refused
    from dkfuse.choosing.example_calls import example

    operators = ("norm_modulate", "norm_modulate_dual", "gated_residual", "residual_norm_modulate")
    calls = [Launched("triton", op, example(op, (2, 4, 16), torch.float32), "") for op in operators]
    calls.append(Launched("cuda", "norm_modulate", calls[0].arguments, ""))
    for line, named in (
        ("dkfuse_norm_modulate_0.run(args)", ["norm_modulate"]),
        ("dkfuse_gated_residual_x2_1.run(args)", ["gated_residual"]),
        ("triton_poi_fused_0.run(args)", []),
    ):
        with pytest.raises(RuntimeError) as caught:
            wrapper(line, RuntimeError("residual_norm_modulate"))(())
        assert [(f.provider, f.op, f.stage) for f in refused(caught.value, calls)] == [
            ("triton", op, "launch") for op in named
        ]


@pytest.mark.parametrize("boxed", [False, True])
def test_the_calling_convention_is_kept(boxed):
    """A boxed program empties the list of its arguments; a second run needs them."""
    launch = wrapper(LINE, REFUSED)

    def program(*args):
        values = list(args[0]) if boxed else args
        if boxed:
            args[0].clear()
        launch(values)

    program._boxed_call, program.serialize = True, "kept"
    seen = []
    call = watch.watched(program, lambda error: lambda *args: seen.append(args), None)
    assert call._boxed_call is True and call.serialize == "kept"
    for _ in range(2):
        call(*([[1, 2]] if boxed else [1, 2]))
    assert seen == [(1, 2), (1, 2)]


def test_after_the_first_call_watching_costs_next_to_nothing():
    def program(*args):
        return list(args)

    call, args = watch.watched(program, lambda error: None, None), [None] * 500
    call(*args)
    with_, without = (min(timeit.repeat(lambda f=f: f(*args), number=200, repeat=20)) / 200 for f in (call, program))
    assert with_ - without < 10e-6
