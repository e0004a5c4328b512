"""Options, environment twins, defaults: precedence, values, error sentences, torch versions."""

from __future__ import annotations

import string
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dkfuse.errors import SettingsError, UnsupportedTorchError, UntestedTorchWarning
from dkfuse.settings import LOG_LEVELS, TARGETS, Settings, setting_fields, unknown_variables
from dkfuse.versions import TESTED_TORCH, check_torch, release

NAMES = [f.name for f in setting_fields()]
WORDS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)


def test_defaults_and_foreign_keys_are_handed_on() -> None:
    settings, mode, options = Settings.parse(None, {"max_autotune": True, "triton.cudagraphs": False}, {})
    assert settings == Settings()
    assert mode is None
    assert options == {"max_autotune": True, "triton.cudagraphs": False}


def test_parse_does_not_change_its_argument() -> None:
    given_options = {"dkfuse.fuel": 3, "mode": "max-autotune", "epilogue_fusion": True}
    copy = dict(given_options)
    settings, mode, options = Settings.parse(None, given_options, {})
    assert given_options == copy
    assert (settings.fuel, mode, options) == (3, "max-autotune", {"epilogue_fusion": True})


def test_mode_may_come_from_either_side_but_not_two() -> None:
    assert Settings.parse("reduce-overhead", None, {})[1] == "reduce-overhead"
    assert Settings.parse("default", {"mode": "default"}, {})[1] == "default"
    with pytest.raises(SettingsError, match="disagree"):
        Settings.parse("default", {"mode": "max-autotune"}, {})
    with pytest.raises(SettingsError, match="name of an Inductor mode"):
        Settings.parse(None, {"mode": 3}, {})


@pytest.mark.parametrize("name", NAMES)
def test_unknown_option_names_the_nearest(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.parse(None, {f"dkfuse.{name}s": 1}, {})
    assert f"'dkfuse.{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_option_that_is_near_nothing_lists_all() -> None:
    with pytest.raises(SettingsError, match=r"known: .*dkfuse\.remainder"):
        Settings.parse(None, {"dkfuse.zzzzzzzzzzzzzzzzzzzzzzzzzzzzzz": 1}, {})


@pytest.mark.parametrize(
    ("name", "value", "parsed"),
    [
        ("disable", "1", True),
        ("disable", "off", False),
        ("pointwise", True, True),
        ("rules", "a, -b,", ("a", "-b")),
        ("rules", ["a", "b"], ("a", "b")),
        ("rules", [], ()),
        ("kernels", ("triton",), ("triton",)),
        ("target", "SM90", "sm90"),
        ("fuel", "12", 12),
        ("fuel", 0, 0),
        ("remainder", "eager", "eager"),
        ("log", "DEBUG", "debug"),
        ("report", "out.html", "out.html"),
        ("cache_dir", None, None),
    ],
)
def test_values(name: str, value: object, parsed: object) -> None:
    assert getattr(Settings.read({f"dkfuse.{name}": value}, {}), name) == parsed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("disable", "maybe"),
        ("disable", 2),
        ("rules", [1]),
        ("rules", 7),
        ("target", "sm70"),
        ("target", 90),
        ("fuel", -1),
        ("fuel", True),
        ("fuel", 1.5),
        ("fuel", "many"),
        ("remainder", "aot"),
        ("log", "loud"),
        ("report", ""),
        ("report", 3),
    ],
)
def test_bad_value_is_one_sentence_that_names_it(name: str, value: object) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.read({f"dkfuse.{name}": value}, {})
    message = str(caught.value)
    assert message.startswith(f"dkfuse.{name}={value!r} is not allowed: give ")
    assert "\n" not in message


def test_bad_environment_value_names_the_variable() -> None:
    with pytest.raises(SettingsError, match=r"^DKFUSE_FUEL='-1' is not allowed"):
        Settings.read({}, {"DKFUSE_FUEL": "-1"})


@pytest.mark.parametrize("options", [3, "dkfuse.fuel=1", [("dkfuse.fuel", 1)], {1: 2}])
def test_options_must_be_a_dict_of_strings(options: object) -> None:
    with pytest.raises(SettingsError, match="options must"):
        Settings.parse(None, options, {})  # type: ignore[arg-type]


@given(option=st.none() | st.sampled_from(TARGETS), variable=st.none() | st.sampled_from(TARGETS))
def test_option_beats_environment_beats_default(option: str | None, variable: str | None) -> None:
    options = {} if option is None else {"dkfuse.target": option}
    environ = {} if variable is None else {"DKFUSE_TARGET": variable}
    settings = Settings.read(options, environ)
    assert settings.target == (option or variable or "current")
    row = next(row for row in settings.table() if row.option == "dkfuse.target")
    assert row.origin == ("option" if option else "environment" if variable else "default")
    assert (row.variable, row.default, row.value) == ("DKFUSE_TARGET", "current", settings.target)


@given(st.lists(WORDS, min_size=1), st.lists(WORDS))
def test_rule_lists(listed: list[str], removed: list[str]) -> None:
    settings = Settings.read({"dkfuse.rules": [*listed, *("-" + name for name in removed)]}, {})
    for name in {*listed, *removed, "other_rule_1"}:
        assert settings.allows(name) == (name in listed and name not in removed)
    only_removed = Settings(rules=tuple("-" + name for name in removed) or None)
    assert only_removed.allows("other_rule_1")
    assert not any(only_removed.allows(name) for name in removed)


def test_names_that_do_not_exist() -> None:
    rules, providers = ("norm", "norm_modulate"), ("triton", "native")
    Settings().check_names(rules, providers)
    Settings(rules=("-norm", "norm_modulate"), kernels=("native",)).check_names(rules, providers)
    with pytest.raises(SettingsError, match=r"dkfuse\.rules: there is no rule 'normm'; did you mean 'norm'"):
        Settings(rules=("-normm",)).check_names(rules, providers)
    with pytest.raises(SettingsError, match="no kernel provider 'trition'; did you mean 'triton'"):
        Settings(kernels=("trition",)).check_names(rules, providers)


def test_no_rules_at_all() -> None:
    assert not Settings(rules=()).allows("norm")
    assert Settings().allows("norm")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "dkfuse.disable": st.booleans(),
            "dkfuse.rules": st.lists(WORDS, min_size=1).map(tuple),
            "dkfuse.fuel": st.integers(0, 1 << 40),
            "dkfuse.target": st.sampled_from(TARGETS),
            "dkfuse.log": st.sampled_from(LOG_LEVELS),
        },
    )
)
def test_options_and_environment_twins_mean_the_same(options: dict[str, object]) -> None:
    def text(value: object) -> str:
        return ",".join(value) if isinstance(value, tuple) else str(value)

    environ = {"DKFUSE_" + key.removeprefix("dkfuse.").upper(): text(value) for key, value in options.items()}
    by_option, by_variable = Settings.read(options, {}), Settings.read({}, environ)
    assert by_option == by_variable
    assert hash(by_option) == hash(by_variable)
    assert {row.origin for row in by_variable.table()} <= {"environment", "default"}


def test_empty_variable_is_not_set() -> None:
    assert Settings.read({}, {"DKFUSE_FUEL": "", "DKFUSE_TARGET": " "}) == Settings()


def test_spelling_mistakes_in_variables_are_found() -> None:
    environ = {"DKFUSE_TARGET": "cpu", "DKFUSE_DEBUG": "1", "DKFUSE_REPROT": "x", "HOME": "/"}
    assert unknown_variables(environ) == ["DKFUSE_REPROT"]


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0a0+git1234", "2.14.1+cu130"])
def test_tested_torch_is_silent(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_torch(version)


def test_newer_torch_warns_once() -> None:
    newer = f"{TESTED_TORCH[1][0]}.{TESTED_TORCH[1][1] + 61}.0"
    with pytest.warns(UntestedTorchWarning, match="tested up to torch"):
        assert not check_torch(newer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not check_torch(newer)


def test_older_torch_is_an_error_with_a_way_out() -> None:
    with pytest.raises(UnsupportedTorchError, match=r"needs torch >= 2\.11, found 2\.10\.1: pip install"):
        check_torch("2.10.1")


def test_release() -> None:
    assert release("2.13.0+cpu") == (2, 13)
    with pytest.raises(ValueError, match="not a version number"):
        release("main")


def test_readme_lists_every_setting() -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    for row in Settings().table():
        assert f"| `{row.option}` | `{row.variable}` |" in readme


def test_settings_that_are_made_by_hand_are_read_as_options_are() -> None:
    """A target that does not exist would be taken for a device that nothing runs on."""
    assert Settings(rules="-norm", fuel="3") == Settings(rules=("-norm",), fuel=3)  # type: ignore[arg-type]
    for name, value in (("target", "h100"), ("roundings", "none"), ("fuel", -1)):
        with pytest.raises(SettingsError, match=rf"dkfuse\.{name}={value!r} is not allowed"):
            Settings(**{name: value})  # type: ignore[arg-type]
