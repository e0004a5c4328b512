"""Attention kernels timed at compile time: the choice, and where the times are kept."""

from __future__ import annotations

import logging

import pytest
import torch

from dkfuse import Status
from dkfuse.kernels import disk_cache
from dkfuse.seams import attention_choice, attention_measure

from .attentions import install, on_gpu, rewritten, use_rows

LONG = (1, 24, 4096, 128)


@pytest.fixture
def timed(monkeypatch):
    """Max-autotune on a machine with a GPU, where kernels take the times in this dict."""
    found = {"cudnn": 400.0, "flash": 800.0, "efficient": 1000.0, "fa4": 300.0}
    on_gpu(LONG)  # torch 2.11 asks a GPU that seems to be there for memory at the first fake tensor on it
    monkeypatch.setattr(attention_choice.compat, "inductor_config", lambda name: name == "max_autotune")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(attention_measure, "times", lambda tensors, causal, kernels, *_: {k: found[k] for k in kernels})
    install(monkeypatch, fa4="4.0.0b20")
    return found


def test_the_fastest_timed_kernel_is_taken(timed):
    site = rewritten(on_gpu(LONG))
    assert (site.status, site.kernel) == (Status.FUSED, "fa4")
    assert {a.message.split()[0] for a in site.attempts if a.code == "slower"} == {"cudnn", "flash", "efficient"}


def test_causal_attention_is_timed_too(timed):
    assert rewritten(on_gpu(LONG, causal=True)).kernel == "fa4"


@pytest.mark.parametrize(
    ("times", "code"),
    [
        ({"fa4": 399.0}, "fastest"),  # within the noise
        ({"fa4": float("inf")}, "fastest"),
        ({"fa4": 55.0}, "launch_bound"),  # less than a call may cost
        ({"fa4": 900.0, "flash": 40.0, "cudnn": 60.0}, "launch_bound"),  # what was timed is the call
    ],
)
def test_torch_choice_stays(timed, times, code):
    timed.update(times)
    site = rewritten(on_gpu(LONG))
    assert (site.status, site.reason.code) == (Status.LEFT_TO_INDUCTOR, code)
    assert any(a.code == "failed" for a in site.attempts) == (times["fa4"] == float("inf"))


def test_a_cudnn_with_wrong_results_is_no_candidate(timed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    timed["fa4"] = 1000.0
    site = rewritten(on_gpu(LONG, traced="flash"))
    assert site.kernel is None
    assert any(a.code == "runtime" and "91002" in a.message for a in site.attempts)


# -- where times are kept ----------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """Counts what is timed; nothing is known beforehand."""
    done = []
    monkeypatch.setattr(attention_measure, "_known", {})
    monkeypatch.setattr(
        attention_measure, "_time", lambda tensors, causal, name, *_: done.append(name) or 10.0 + len(done)
    )
    return done


def test_times_are_taken_once_and_kept(runs, tmp_path, monkeypatch):
    tensors = [torch.empty(1, 2, 8, 16).expand(3, 2, 8, 16) for _ in range(3)]
    first = attention_measure.times(tensors, False, ["cudnn", "flash"], str(tmp_path))
    assert first == {"cudnn": 11.0, "flash": 12.0} and runs == ["cudnn", "flash"]
    assert attention_measure.times(tensors, False, ["flash"], str(tmp_path)) == {"flash": 12.0}
    monkeypatch.setattr(attention_measure, "_known", {})  # another process
    assert attention_measure.times(tensors, False, ["cudnn", "flash"], str(tmp_path)) == first
    assert runs == ["cudnn", "flash"]
    assert attention_measure.times(tensors, False, ["cudnn", "fa4"], str(tmp_path)) == {"cudnn": 11.0, "fa4": 13.0}
    attention_measure.times(tensors, True, ["cudnn"], str(tmp_path))
    assert runs == ["cudnn", "flash", "fa4", "cudnn"]


def test_timing_leaves_the_models_random_numbers_alone(runs, tmp_path):
    state = torch.get_rng_state()
    attention_measure.times([torch.empty(1, 2, 8, 16)] * 3, False, ["cudnn"], str(tmp_path))
    assert runs == ["cudnn"] and torch.equal(torch.get_rng_state(), state)


def test_a_broken_file_is_replaced(runs, tmp_path, monkeypatch):
    tensors = [torch.empty(1, 2, 8, 16) for _ in range(3)]
    attention_measure.times(tensors, False, ["cudnn"], str(tmp_path))
    (file,) = (tmp_path / "attention").iterdir()
    whole = file.read_bytes()
    for data in (b"", b"{", whole[:-1], whole.replace(b"11.0", b"99.0")):
        file.write_bytes(data)
        monkeypatch.setattr(attention_measure, "_known", {})
        expected = {"cudnn": 11.0 + len(runs)}
        assert attention_measure.times(tensors, False, ["cudnn"], str(tmp_path)) == expected
        monkeypatch.setattr(attention_measure, "_known", {})
        assert attention_measure.times(tensors, False, ["cudnn"], str(tmp_path)) == expected
    assert len(runs) == 5


def test_calls_with_numbers_of_keys_are_other_calls(runs, tmp_path):
    tensors = [torch.empty(1, 2, 8, 16) for _ in range(3)]
    assert attention_measure.times(tensors, False, ["cudnn"], str(tmp_path)) == {"cudnn": 11.0}
    assert attention_measure.times(tensors, False, ["cudnn"], str(tmp_path), True) == {"cudnn": 12.0}


def test_times_are_files_of_the_cache(runs, tmp_path):
    tensors = [torch.empty(1, 2, 8, 16) for _ in range(3)]
    disk_cache.use(str(tmp_path))
    try:
        attention_measure.times(tensors, False, ["cudnn"], None)
        (file,) = disk_cache.contents()["attention"]
    finally:
        disk_cache.use(None)
    assert file.parent == tmp_path / "attention"


def test_a_folder_that_cannot_be_written_is_no_error(runs, tmp_path):
    (tmp_path / "file").write_text("")
    tensors = [torch.empty(1, 2, 8, 16) for _ in range(3)]
    assert attention_measure.times(tensors, False, ["cudnn"], str(tmp_path / "file")) == {"cudnn": 11.0}


def test_a_kernel_that_fails_is_infinitely_slow_and_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(attention_measure, "_known", {})
    tensors = [torch.empty(1, 2, 8, 16) for _ in range(3)]
    with caplog.at_level(logging.WARNING, "dkfuse"):
        found = attention_measure.times(tensors, False, ["nothing of this name"], str(tmp_path))
    assert found == {"nothing of this name": float("inf")} and "nothing of this name failed" in caplog.text
    (file,) = (tmp_path / "attention").iterdir()
    assert file.read_bytes().endswith(b"{}")


def test_a_kernel_that_cannot_be_built_leaves_the_attention_to_torch(monkeypatch):
    use_rows(monkeypatch)
    install(monkeypatch, fa4="4.0.0b20")
    monkeypatch.setattr(attention_measure, "failure", lambda name, *_: "no compiler" if name == "fa4" else None)
    site = rewritten(on_gpu(LONG))
    assert (site.status, site.reason.code) == (
        Status.LEFT_TO_INDUCTOR,
        "failed",
    ) and "no compiler" in site.reason.message
    site = rewritten(on_gpu(LONG), attention="fa4")
    assert (site.status, site.reason.code) == (Status.REJECTED, "failed")
    site = rewritten(on_gpu(LONG, traced="flash"))  # the next best
    assert (site.status, site.kernel) == (Status.FUSED, "cudnn") and any(a.code == "failed" for a in site.attempts)


def test_a_trial_that_goes_wrong_is_told(caplog):
    q = torch.empty(1, 4, 8, 64, device="meta")
    assert attention_measure.failure("fa4", q, q, False) is None  # nothing to try it on
    few = [torch.zeros(1, 2, 8, 64)] * 3
    assert attention_measure._tried(few, False, "nothing of this name") is not None
    assert "nothing of this name cannot be used" in caplog.text


def test_a_trial_without_memory_says_nothing_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention_measure, "_call", call)
    assert attention_measure._tried([torch.zeros(1, 2, 8, 64)] * 3, False, "cudnn") is None
