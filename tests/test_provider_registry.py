"""The registry: what is registered, what is refused, who is available, and who is chosen with which reasons."""

from __future__ import annotations

import pytest
import torch

from dkfuse.choosing import choose
from dkfuse.choosing.example_calls import example
from dkfuse.errors import SettingsError
from dkfuse.kernels import crossovers, failures, providers, registry
from dkfuse.kernels.crossovers import Crossover
from dkfuse.kernels.providers import in_range
from dkfuse.kernels.registry import Constraint, Implementation
from dkfuse.kernels.support import OPERANDS, supports
from dkfuse.matching.rules import Reject
from dkfuse.settings import Settings

NEVER = Constraint("never", "nothing", lambda arguments: "never")


def nothing(arguments, outputs):
    raise AssertionError("not to be run")


def decide(shape=(1, 4096, 3072), target="sm90", asked=None, planned=True, op="norm_modulate", **more):
    call = {**example(op, shape, torch.bfloat16), **more}
    return choose.decide(op, [call], target, asked, planned)


@pytest.mark.parametrize("provider", ["triton", "native"])
def test_every_op_has_an_implementation_that_can_be_loaded(provider):
    for op in OPERANDS:
        assert callable(registry.find(provider, op).load())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("no_op", "mine", (), nothing), "no such op; known: norm_modulate"),
        (("norm_modulate", "My-Kernels", (), nothing), "small letters"),
        (("norm_modulate", "mine", (NEVER, NEVER), nothing), "code 'never'"),
        (("norm_modulate", "mine", (), "no colon"), "'no colon'"),
        (("norm_modulate", "mine", (), "a.b:"), "'a.b:'"),
        (("norm_modulate", "mine", (), None), "None"),
        (("norm_modulate", "mine", (), nothing, 80, None, ("gpu",)), "no device 'gpu'"),
    ],
)
def test_a_malformed_implementation_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        Implementation(*arguments)


def test_a_built_in_provider_cannot_be_replaced_nor_listed_twice():
    with pytest.raises(ValueError, match="'triton' is a provider of dkfuse"):
        registry.register(Implementation("norm_modulate", "triton", (), nothing))
    with pytest.raises(ValueError, match="two implementations"):
        registry.add(registry.find("triton", "norm_modulate"))


@pytest.mark.parametrize("op", OPERANDS)
def test_tritons_constraints_say_what_supports_says(op):
    """Codes and messages, from a call that is right and from calls that are wrong in one way each."""
    shape = (2, 8, 4, 64) if op == "norm_rope" else (2, 8, 64)
    good = example(op, shape, torch.bfloat16)
    x = good["x"]
    wrong = {
        "row_too_long": {"x": x.new_empty(1, 20000), **dict.fromkeys(OPERANDS[op][1]), "norm": "layer"},
        "dtype": {"x": x.new_empty(shape, dtype=torch.int32)},
        "inner_stride": {"x": x.new_empty((*shape[:-1], 2 * shape[-1]))[..., ::2]},
        "empty": {"x": x.new_empty(0, *shape[1:])},
    }
    if op == "norm_rope":
        wrong["row_too_long"].update(rotation="none")
    if "residual" in good:
        wrong["row_too_long"]["residual"] = x.new_empty(1, 20000)
        wrong["empty"]["residual"] = x.new_empty(0, *shape[1:])
    implementation = registry.find("triton", op)
    assert implementation.problem(good) is None and all(c.problem(good) is None for c in implementation.constraints)
    seen = set()
    for change in wrong.values():
        call = {**good, **change}
        reason = supports(op, call)
        found = implementation.problem(call)
        assert (found.code, found.message) == (reason.code, reason.message)
        by_data = {c.code: c.problem(call) for c in implementation.constraints}
        assert {c: m for c, m in by_data.items() if m} == {reason.code: reason.message}
        seen.add(reason.code)
    assert {"dtype", "inner_stride", "row_too_long"} <= seen


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("4.5", True),
        ("4.5.2", True),
        ("4.6.9.dev0", True),
        ("4.7", False),
        ("4.4.9", False),
        ("5", False),
        ("x", False),
    ],
)
def test_tested_versions(version, inside):
    assert in_range(version, ("4.5", "4.6")) is inside


def test_a_missing_or_untested_package_is_one_sentence_with_the_command(monkeypatch):
    cute = providers.Provider("cute", "CuTe DSL", "no_such_package", ("none",), ("4.5", "4.6"), "dkfuse[cute]")
    assert (cute.problem().code, cute.problem().message) == (
        "not_installed",
        "CuTe DSL is not installed: pip install 'dkfuse[cute]'",
    )
    other = providers.Provider("t", "PyTest", "pytest", ("pytest",), ("1.0", "1.9"), "pytest<2")
    problem = other.problem()
    assert problem.code == "untested_version" and "1.0 to 1.9 are: pip install 'pytest<2'" in problem.message
    assert providers.Provider("t", "PyTest", "pytest", ("pytest",), ("1", "99")).problem() is None


def test_asking_for_what_is_not_installed_is_an_error_with_the_command(monkeypatch):
    missing = providers.Provider("cute", "CuTe DSL", "no_such_package", (), ("4.5", "4.6"), "dkfuse[cute]")
    monkeypatch.setitem(providers.PROVIDERS, "cute", missing)
    with pytest.raises(SettingsError, match=r"'cute': CuTe DSL is not installed: pip install 'dkfuse\[cute\]'"):
        choose.check_installed(Settings.read({"dkfuse.kernels": "norm_rope=cute"}, {}))
    choose.check_installed(Settings.read({"dkfuse.kernels": "triton,native"}, {}))

    def compiled():
        with torch.no_grad():
            torch.compile(lambda x: x + 1, backend="dkfuse", options={"dkfuse.kernels": "cute"})(torch.ones(2))

    with pytest.raises(Exception, match="CuTe DSL is not installed"):
        compiled()


def test_triton_is_the_choice_where_nothing_was_measured(fake_cute, monkeypatch):
    assert decide().provider == "triton"
    monkeypatch.setattr(crossovers, "CROSSOVERS", ())
    choice = decide()
    assert choice.provider == "triton"
    assert [(r.rule, r.code) for r in choice.passed_over] == [("cute", "not_faster")]
    assert "not measured" in choice.passed_over[0].message
    assert decide(target="cpu").provider == "native"
    assert [decide(target=target).provider for target in ("rocm", "xpu", "npu")] == ["triton", "triton", "native"]
    with pytest.raises(Reject, match="no kernel for target sm75"):
        decide(target="sm75")


def test_measured_crossovers_decide(fake_cute, monkeypatch):
    table = (
        Crossover("norm_modulate", "cute", 1.2, "test", widths=(2048, 4096), rows=(1024, None)),
        Crossover("norm_modulate", "cute", 0.9, "test", rows=(None, 1023)),
        Crossover("norm_modulate", "cute", 1.01, "test", widths=(512, 512), rows=(1024, None)),
    )
    monkeypatch.setattr(crossovers, "CROSSOVERS", table)
    assert decide().provider == "cute"
    small = decide((1, 512, 3072))
    assert small.provider == "triton" and "0.90 of Triton's speed" in small.passed_over[0].message
    assert decide((1, 4096, 512)).provider == "triton", "within the noise of a measurement"
    assert decide(target="sm100").provider == "triton", "measured on another architecture"
    wide = [example("norm_modulate", s, torch.bfloat16) for s in ((1, 4096, 3072), (1, 77, 3072))]
    assert choose.decide("norm_modulate", wide, "sm90", None, True).provider == "triton", "the worst part counts"


def test_a_measured_provider_that_says_no_is_passed_over_with_its_reason(fake_cute, monkeypatch):
    monkeypatch.setattr(crossovers, "CROSSOVERS", (Crossover("norm_modulate", "cute", 1.5, "test"),))
    choice = decide((1, 4096, 5120))
    assert choice.provider == "triton"
    assert [(r.rule, r.code, r.message) for r in choice.passed_over] == [("cute", "width", "D is 5120")]
    assert decide(target="sm80").passed_over[0].message == "cute does not run on target sm80"


def test_a_crossover_may_ask_for_arguments(fake_cute, monkeypatch):
    only = Crossover("norm_modulate", "cute", 1.5, "test", only=(("norm", "rms"), ("out_dtype", torch.bfloat16)))
    monkeypatch.setattr(crossovers, "CROSSOVERS", (only,))
    assert decide(norm="rms").provider == "cute" and decide(norm="layer").provider == "triton"


def test_the_order_that_is_asked_for(fake_cute):
    assert decide(asked=("cute", "triton")).provider == "cute"
    fallen = decide((1, 4096, 5120), asked=("cute", "triton"))
    assert (fallen.provider, fallen.passed_over[0].code) == ("triton", "width")
    with pytest.raises(Reject, match="D is 5120"):
        decide((1, 4096, 5120), asked=("cute",))
    with pytest.raises(Reject, match="cute has no kernel for scale_shift"):
        decide(op="scale_shift", asked=("cute",))
    assert decide(asked=("native",)).provider == "native"


def test_a_failure_is_about_one_signature(fake_cute):
    call = example("norm_modulate", (1, 4096, 3072), torch.bfloat16)
    failure = failures.note("cute", "norm_modulate", call, RuntimeError("no registers left"), "build")
    try:
        choice = decide(asked=("cute", "triton"))
        assert (choice.provider, choice.passed_over[0].code) == ("triton", "kernel_failed")
        assert "could not be built: RuntimeError: no registers left" in choice.passed_over[0].message
        assert decide((1, 4096, 1024), asked=("cute", "triton")).provider == "cute"
    finally:
        failures.forget([failure])
    assert decide(asked=("cute", "triton")).provider == "cute"


def test_the_fingerprint_follows_the_registered_code():
    def kernel(factor):
        return eval(f"lambda arguments, outputs: outputs['out'].fill_({factor})")

    found = set()
    for factor in (1, 2, 1):
        registry.register(Implementation("scale_shift", "mine", (), kernel(factor), devices=("cpu",)))
        found.add(registry.fingerprint())
    registry.unregister("mine")
    found.add(registry.fingerprint())
    assert len(found) == 3 and registry.find("mine", "scale_shift") is None and "mine" not in providers.PROVIDERS


@pytest.mark.parametrize(
    ("value", "rope", "others"),
    [
        ("norm_rope=cuda+triton,triton", ("cuda", "triton"), ("triton",)),
        ({"norm_rope": ["cuda", "triton"], "*": ["triton"]}, ("cuda", "triton"), ("triton",)),
        ("norm_rope=cuda", ("cuda",), None),
        ({"norm_rope": "cuda"}, ("cuda",), None),
        ({"norm_rope": []}, (), None),
        ({"*": [], "norm_rope": ["cuda"]}, ("cuda",), ()),
        (["cute", "triton"], ("cute", "triton"), ("cute", "triton")),
        ([], (), ()),
        ({}, None, None),
        (None, None, None),
    ],
)
def test_providers_by_op(value, rope, others):
    settings = Settings.read({"dkfuse.kernels": value}, {})
    assert (settings.providers("norm_rope"), settings.providers("norm_modulate")) == (rope, others)
    hash(settings)
    if value and settings.kernels:
        twin = Settings.read({}, {"DKFUSE_KERNELS": ",".join(settings.kernels)})
        assert twin.kernels == settings.kernels


def test_bad_orders():
    for value in ("=cuda", "norm_rope=a=b", {1: ["cuda"]}, {"norm_rope": 3}, {"a=b": ["c"]}):
        with pytest.raises(SettingsError, match=r"dkfuse\.kernels"):
            Settings.read({"dkfuse.kernels": value}, {})
    known = ((), ("triton", "cuda"), tuple(OPERANDS))
    Settings(kernels=("norm_rope=cuda+triton", "triton")).check_names(*known)
    with pytest.raises(SettingsError, match="no op 'norm_rop'; did you mean 'norm_rope'"):
        Settings(kernels=("norm_rop=cuda",)).check_names(*known)
    with pytest.raises(SettingsError, match="no kernel provider 'cudo'"):
        Settings(kernels=("norm_rope=cudo",)).check_names(*known)
