"""Attentions that the seam leaves alone, because of what they are or because of an option."""

from __future__ import annotations

import pytest
import torch

from dkfuse import Settings, Status
from dkfuse.errors import SettingsError

from .attentions import BF16, install, on_cpu, on_gpu, rewritten, sdpa, targets, use_rows

FA4 = "4.0.0b20"
LONG = (1, 24, 4096, 128)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    use_rows(monkeypatch)
    install(monkeypatch)


# -- refusals ----------------------------------------------------------------------------------------------------------


REFUSED = {
    "causal": (lambda: on_gpu((1, 4, 64, 64), (1, 4, 128, 64), causal=True), "causal"),
    "fp32": (lambda: on_gpu((1, 4, 64, 64), traced="efficient", dtype=torch.float32), "dtype"),
    "head_dim": (lambda: on_gpu((1, 4, 64, 264), traced="efficient"), "head_dim"),
    "head_dim of no whole vectors": (lambda: on_gpu((1, 4, 64, 60), traced="efficient"), "alignment"),
    "batches": (lambda: on_gpu((2, 4, 64, 64), (1, 4, 64, 64)), "broadcast"),
    "inner stride": (lambda: on_gpu((1, 4, 64, 64), view=lambda q: q.transpose(2, 3)), "alignment"),
    "repeated heads": (
        lambda: on_gpu((1, 1, 64, 64), (1, 4, 64, 64), view=lambda q: q.expand(1, 4, 64, 64)),
        "alignment",
    ),
    "odd start": (lambda: on_gpu((1, 4, 64, 72), (1, 4, 64, 64), view=lambda q: q.narrow(3, 3, 64)), "alignment"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kernel", ["fa4", "fa3", "sage"])
def test_a_forced_kernel_refuses_what_it_does_not_take(monkeypatch, name, kernel):
    install(monkeypatch, fa4=FA4, fa3="3.0", sage="2.2")
    make, code = REFUSED[name]
    module = make()
    before = targets(module)
    site = rewritten(module, attention=kernel)
    assert (site.status, site.kernel, site.reason.code) == (Status.REJECTED, None, code), site.reason
    assert kernel in site.reason.message and site.reason.stage == "kernel"
    assert [t for t in targets(module) if "getitem" not in t] == [t for t in before if "getitem" not in t]


def test_masks_and_old_architectures_are_refused(monkeypatch):
    install(monkeypatch, fa4=FA4, fa3="3.0")
    x, mask = torch.randn(1, 16, 8, 64, dtype=BF16), torch.zeros(1, 1, 16, 16, dtype=BF16)
    for kernel in ("fa4", "fa3", "flash", "efficient"):
        site = rewritten(on_cpu(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), x, x, x, mask), attention=kernel)
        assert (site.status, site.reason.code) == (Status.REJECTED, "mask")
        assert site.shapes["mask"] == [1, 1, 16, 16]
    assert rewritten(on_cpu(sdpa, x, x, x), attention="fa3", target="sm80").reason.code == "arch"
    assert rewritten(on_cpu(sdpa, x, x, x), attention="fa3", target="sm100").reason.code == "arch"
    assert rewritten(on_gpu((1, 4, 64, 160)), attention="fa4", target="sm100").reason.code == "head_dim"
    assert rewritten(on_gpu((1, 4, 64, 160)), attention="fa4", target="sm90").kernel == "fa4"


@pytest.mark.parametrize("option", ["auto", "fa4", "cudnn"])
def test_dropout_and_other_results_are_refused(monkeypatch, option):
    install(monkeypatch, fa4=FA4)
    dropped = rewritten(on_gpu(LONG, traced="flash", dropout=0.25), attention=option)
    assert (dropped.status, dropped.reason.code) == (Status.REJECTED, "dropout") and "0.25" in dropped.reason.message
    for traced in ("flash", "cudnn"):
        module = on_gpu(LONG, traced=traced, reads=1)
        read = rewritten(module, attention=option)
        assert (read.status, read.reason.code, read.reason.stage) == (Status.REJECTED, "escapes", "semantics")
        assert f"aten._scaled_dot_product_{traced}_attention.default" in targets(module)


# -- options -----------------------------------------------------------------------------------------------------------


def test_torch_keeps_it_by_request(monkeypatch):
    install(monkeypatch, fa4=FA4)
    for settings in ({"attention": "sdpa"}, {"rules": ("norm_modulate",)}, {"rules": ("-attention",)}):
        site = rewritten(on_gpu(LONG), **settings)
        assert (site.status, site.reason.code) == (Status.LEFT_TO_INDUCTOR, "disabled")
    assert rewritten(on_gpu(LONG), attention="cudnn").reason.code == "chosen"
    assert rewritten(on_gpu(LONG), rules=("attention",)).kernel == "fa4"


def test_untested_and_lossy_kernels_only_by_request(monkeypatch):
    install(monkeypatch, fa4="5.1", fa3="3.0", sage="2.2")
    assert rewritten(on_gpu(LONG)).status is Status.LEFT_TO_INDUCTOR
    for kernel in ("fa4", "fa3", "sage"):
        assert rewritten(on_gpu(LONG), attention=kernel).kernel == kernel


def test_a_missing_kernel_is_a_clear_error(monkeypatch):
    for kernel in ("fa4", "fa3", "sage"):
        settings = Settings.read({"dkfuse.attention": kernel}, {})
        with pytest.raises(SettingsError, match=f"attention='{kernel}'.*pip install .*attn?"):
            settings.check_names((), ())
    for kernel in ("auto", "sdpa", "cudnn", "flash"):
        Settings.read({}, {"DKFUSE_ATTENTION": kernel}).check_names((), ())
    install(monkeypatch, fa4=FA4)
    Settings(attention="fa4").check_names((), ())


def test_values_that_are_not_allowed():
    with pytest.raises(SettingsError, match=r"dkfuse\.attention='fa5'.*auto, torch, sdpa, fa4"):
        Settings.read({"dkfuse.attention": "fa5"}, {})
    assert Settings.read({}, {"DKFUSE_ATTENTION": "FA4"}).attention == "fa4"
