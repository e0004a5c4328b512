"""Files that users ask for: whole or not at all, while other threads make files of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dkfuse.bench import session
from dkfuse.cli.exits import Failure
from dkfuse.files import write_whole


def test_no_other_thread_makes_files_that_all_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The umask is the process's: to ask for it is to change it."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
            write_whole(tmp_path / "file", "text")
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_bench_that_is_cut_short_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session._save(tmp_path / "six.json", "five models")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        session._save(tmp_path / "six.json", "six models")
    assert (tmp_path / "six.json").read_text() == "five models" and os.listdir(tmp_path) == ["six.json"]
    with pytest.raises(Failure, match="cannot write"):
        session._save(tmp_path / "missing" / "six.json", "six models")
