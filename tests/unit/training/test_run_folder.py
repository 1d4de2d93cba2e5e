"""One process works in a run's folder, whatever happened to the last one."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dalle_torch.config import ModelConfig, OptimizerConfig, ShampooConfig
from dalle_torch.training.run_folder import RunFolder, RunFolderError, differences
from tests.unit.training.run_configs import run_config


@contextmanager
def other_process(folder: Path, fork: bool = False) -> Iterator[subprocess.Popen]:
    """A process that has the folder until its stdin is closed, with a forked child that sleeps on if `fork`."""
    code = f"""
        import os, sys, time
        from dalle_torch.training.run_folder import RunFolder
        lock = RunFolder({str(folder)!r}).acquire()
        child = os.fork() if {fork} else 1
        if not child:
            print(os.getpid(), flush=True)
            time.sleep(60)
            os._exit(0)
        if not {fork}:
            print(0, flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()


def test_the_folder_is_made_with_what_every_run_has(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "mega")
    with folder.acquire():
        assert {path.name for path in folder.path.iterdir()} == {"run.lock", "samples", "checkpoints", "control"}
        holder = folder.holder()
        assert holder is not None and holder.pid == os.getpid()
    assert folder.holder() is None
    assert RunFolder(tmp_path / "nowhere").holder() is None


def test_a_second_process_is_refused_in_one_line_and_comes_in_afterwards(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with other_process(folder.path) as process:
        for _ in range(2):
            with pytest.raises(RunFolderError, match=f"in use by process {process.pid} on .*, since .* adjust .* stop"):
                folder.acquire()
        holder = folder.holder()
        assert holder is not None and holder.pid == process.pid
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert folder.holder() is None
        folder.acquire().release()


def test_workers_that_outlive_a_killed_process_do_not_keep_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with other_process(folder.path, fork=True) as process:
        with pytest.raises(RunFolderError, match="in use"):
            folder.acquire()
        process.send_signal(signal.SIGKILL)
        process.wait()
        folder.acquire().release()


def test_asking_for_the_holder_does_not_keep_a_run_out(tmp_path: Path) -> None:
    """A process that asks all the time, while another one starts again and again."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    code = f"""
        from dalle_torch.training.run_folder import RunFolder
        folder = RunFolder({str(folder.path)!r})
        print(flush=True)
        while True:
            folder.holder()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        for _ in range(20):
            folder.acquire().release()
    finally:
        process.kill()
        process.communicate()


def test_a_lock_file_without_sense_is_still_a_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.acquire():
        folder.lock.write_text("?")
        with pytest.raises(RunFolderError, match="process unknown on unknown"):
            folder.acquire()


def test_what_cannot_be_a_run_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="file cannot be the folder of a run .*: name one that can be made"):
        RunFolder(tmp_path / "file").acquire()
    with pytest.raises(RunFolderError, match="cannot be the folder of a run"):
        RunFolder("/proc/run").acquire()


def test_differences_are_named_with_both_values() -> None:
    old = run_config("shampoo")
    assert differences(old, old) == []
    new = replace(
        old,
        optimizer=OptimizerConfig(name="shampoo", lr=2e-4, weight_decay=0.1, shampoo=ShampooConfig(block_size=64)),
        model=ModelConfig(config="configs/model/shapes.json", vqgan="shapes", options={"d_model": 8}),
    )
    found = {difference.name: (difference.old, difference.new) for difference in differences(old, new)}
    assert list(found) == ["model.options.d_model", "optimizer.lr", "optimizer.shampoo"]
    assert found["model.options.d_model"] == (None, 8) and found["optimizer.lr"] == (1e-4, 2e-4)
    assert found["optimizer.shampoo"][0] is None and found["optimizer.shampoo"][1]["block_size"] == 64
    smaller = replace(new, optimizer=replace(new.optimizer, shampoo=ShampooConfig(block_size=32)))
    assert [str(difference) for difference in differences(new, smaller)] == ["optimizer.shampoo.block_size: 64 -> 32"]
