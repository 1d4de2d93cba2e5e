"""Processes beside each other: real ones, of a program that does next to nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dalle_torch.studies import compare_pool
from dalle_torch.studies.compare_pool import last_line, run_all
from dalle_torch.training.run_folder import RunFolder

STAND_IN = "tests.unit.studies.stand_in_run"


def folders(tmp_path: Path, *names: str) -> list[Path]:
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    asked = folders(tmp_path, "a", "fails", "b")
    done: list[Path] = []
    failed = run_all(asked, 2, done.append, STAND_IN)
    assert failed == {asked[1]: "ValueError: no good"}
    assert sorted(done) == [asked[0], asked[2]]
    assert (tmp_path / "b" / "ended").is_file()


def test_an_interruption_waits_until_all_have_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = folders(tmp_path, "waits-1", "waits-2", "never")
    real = time.sleep

    def interrupt(seconds: float) -> None:
        real(seconds)
        if all((folder / "pid").exists() for folder in asked[:2]) and not (tmp_path / "told").exists():
            (tmp_path / "told").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr(compare_pool.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all(asked, 2, lambda folder: None, STAND_IN)
    assert (asked[0] / "saved").exists() and (asked[1] / "saved").exists() and not (asked[2] / "pid").exists()


def test_a_process_outlives_no_killed_parent(tmp_path: Path) -> None:
    (folder,) = folders(tmp_path, "waits")
    program = (
        "import sys; from pathlib import Path; from dalle_torch.studies.compare_pool import run_all;"
        f"run_all([Path(sys.argv[1])], 1, print, {STAND_IN!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(folder)])
    limit = time.monotonic() + 60
    while not (folder / "pid").exists():
        assert time.monotonic() < limit and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while not (folder / "saved").exists():
        assert time.monotonic() < limit, "the process goes on without its parent"
        time.sleep(0.05)


def test_a_folder_that_another_process_keeps_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = folders(tmp_path, "a")
    monkeypatch.setattr(compare_pool, "_PATIENCE", 0.1)
    with RunFolder(folder).acquire(), pytest.raises(OSError, match=f"in use by process {os.getpid()}"):
        run_all([folder], 1, lambda done: None, STAND_IN)
    assert run_all([folder], 1, lambda done: None, STAND_IN) == {}


def test_the_last_line_is_the_last_that_says_something(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("one\ntwo\n\n  \n")
    assert last_line(tmp_path / "log") == "two"
    assert last_line(tmp_path / "none") == ""
