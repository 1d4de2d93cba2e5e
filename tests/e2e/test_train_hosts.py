"""`xla_dist.py -- dalle-torch train` on two hosts: processes that form one group, of which one fails, and once more.

Hosts are folders of this machine (`tests.unit.launch`); launcher, processes, their connection and signals are real.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from dalle_torch.checkpoint.sharded import CheckpointFolder
from dalle_torch.config import RunConfig
from dalle_torch.config_io import load_config
from dalle_torch.parallel.launched import PeersLostError
from dalle_torch.training.loop import Trainer
from dalle_torch.training.run import train_run
from launch.workers import PEERS_LOST
from tests.e2e.host_program import noting
from tests.tiny_run import OPTIMIZERS, write_run, write_source
from tests.unit.launch.conftest import REPOSITORY, Cloud, alive

PATIENCE = 300.0
"""Seconds for starts of two processes on a busy machine; a process that waits for others does so for 30 minutes."""
FAULTS = "1:2:raise 1:5:kill"
# Order and masks do not depend on the number of processes then; the last half of the run has Shampoo's roots in it.
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"shuffle_buffer": 0, "lanes": 2, "blank_caption_prob": 0.0},
    "model": {"options": {"dropout": 0.0}},
    "optimizer": OPTIMIZERS["shampoo"] | {"schedule": "constant"},
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Story:
    """What became of a run that failed twice under one launcher, and went on under the next."""

    cloud: Cloud
    bucket: Path
    first: "subprocess.CompletedProcess[str]"
    pids: list[int]
    """Of the training on both hosts, up to the first launcher's end."""
    last: "subprocess.CompletedProcess[str]"
    root: Path

    def host(self, index: int) -> Path:
        return self.cloud.home(index) / "dalle-torch"

    def rows(self, index: int) -> dict[int, list[list[int]]]:
        return rows(self.host(index))


def rows(folder: Path) -> dict[int, list[list[int]]]:
    """By the updates done before; of what was done twice the last."""
    return {row["step"]: row["rows"] for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines())}


def losses(folder: Path) -> dict[int, float]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in found if "loss" in row}


def in_two(config: RunConfig, outputs: list[Path]) -> None:
    """The same without a launcher: two children of this process, which has everything imported."""
    port = free_port()
    children = [
        multiprocessing.get_context("fork").Process(target=_child, args=(config, output, index, port))
        for index, output in enumerate(outputs)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE)
    assert [child.exitcode for child in children] == [0, 0]


def _child(config: RunConfig, output: Path, index: int, port: int) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    tqdm.set_lock(threading.RLock())
    here = {"RANK": index, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})
    train_run(config, output)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("hosts")
    source = write_source(root / "source")
    cloud = Cloud(root / "cloud")
    # Two addresses of this machine; the first is where processes meet.
    cloud.describe(networkEndpoints=[{"ipAddress": "127.0.0.1"}, {"ipAddress": "127.0.0.2"}])
    program = f'PYTHONPATH="{REPOSITORY}" exec "{sys.executable}" -m tests.e2e.host_program "$@"'
    cloud._program(root / "cloud" / "host-bin" / "dalle-torch", program)
    bucket = root / "bucket"
    write_run(root / "run.yaml", source, checkpoint={"folder": str(bucket)}, **SECTIONS)
    words = ["--restart-on-failure", "1", "--backoff", "0.1", "--master-port", str(free_port())]
    words += ["--env", f"FAULTS={FAULTS}", "--env", "OMP_NUM_THREADS=1", "--env", "USE_TORCH_XLA=0"]
    words += ["--", "dalle-torch", "train", "--config", str(root / "run.yaml"), "--output", "runs/mine"]
    try:
        first = _through(cloud, words)
        pids = [
            int(pid) for host in range(2) for pid in (cloud.home(host) / "dalle-torch" / "pids").read_text().split()
        ]
        yield Story(cloud, bucket, first, pids, _through(cloud, words), root)
    finally:
        cloud.close()


def _through(cloud: Cloud, words: list[str]) -> "subprocess.CompletedProcess[str]":
    launched = cloud.start(*words)
    out, err = launched.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(launched.args, launched.returncode, out, err)


def test_a_host_that_raises_stops_all_and_all_start_again(story: Story) -> None:
    said = story.first.stderr
    assert "worker 1 ended with status 1; its last lines" in said
    assert "    dalle-torch: error: the disk of host 1 is gone\n" in said
    assert "failure 1; 1 are allowed: starting again" in said and "attempt 2 on 2 hosts" in said
    # The other was waiting for it: it says so in one line, and is not taken for the cause.
    assert "dalle-torch: error: another process of this run has ended or cannot be reached" in story.cloud.log(0)
    assert "worker 0 ended with status 69; its last lines" not in said


def test_a_host_that_is_killed_ends_the_run_and_leaves_nothing_behind(story: Story) -> None:
    assert story.first.returncode == 137
    assert "worker 1 ended with status 137; its last lines" in story.first.stderr
    assert "--restart-on-failure 1 is used up" in story.first.stderr
    assert len(story.pids) == 4 and not any(map(alive, story.pids))


def test_the_same_command_goes_on_to_the_end(story: Story) -> None:
    assert story.last.returncode == 0, story.last.stderr
    assert sorted(losses(story.host(0) / "runs" / "mine")) == [1, 2, 3, 4, 5, 6]
    assert "going on from step 2" in story.cloud.log(0) and "going on from step 4" in story.cloud.log(0)
    # One folder of the run, and one of its checkpoints, with parts of both hosts.
    assert not (story.host(1) / "runs").exists()
    newest = CheckpointFolder(str(story.bucket)).newest()
    assert newest is not None and newest.step == 6 and len(newest.host_metas) == 2
    weights = [(story.host(index) / "weights").read_text() for index in range(2)]
    assert weights[0] == weights[1]


def test_each_update_has_the_rows_of_one_process_half_of_them_on_each_host(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(RunConfig, story.root / "run.yaml", ["checkpoint.folder=null"])
    monkeypatch.setattr(Trainer, "_update", noting(tmp_path))
    train_run(config, tmp_path / "one")
    one, hosts = rows(tmp_path), [story.rows(index) for index in range(2)]
    assert sorted(one) == sorted(hosts[0]) == sorted(hosts[1]) == list(range(6))
    for step, expected in one.items():
        assert [len(host[step]) for host in hosts] == [len(expected) // 2] * 2
        assert sorted(hosts[0][step] + hosts[1][step]) == sorted(expected)
    found, wanted = losses(story.host(0) / "runs" / "mine"), losses(tmp_path / "one")
    # Sums in another order.
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-4)


def test_it_ends_as_an_unbroken_run_bit_for_bit(story: Story, tmp_path: Path) -> None:
    whole = tmp_path / "bucket"
    in_two(
        load_config(RunConfig, story.root / "run.yaml", [f"checkpoint.folder={whole}"]),
        [tmp_path / "0", tmp_path / "1"],
    )
    expected, found = CheckpointFolder(str(whole)).newest(), CheckpointFolder(str(story.bucket)).newest()
    assert expected is not None and found is not None and expected.step == found.step == 6
    values, other = expected.read(), found.read()
    assert values.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in values.items())
    assert expected.meta["data"] == found.meta["data"]
    assert losses(tmp_path / "0") == losses(story.host(0) / "runs" / "mine")


def _refused(config: RunConfig, output: Path, index: int, port: int) -> None:
    try:
        _child(config, output, index, port)
    except ValueError as error:
        output.with_suffix(".said").write_text(str(error), encoding="utf-8")


def test_hosts_of_other_options_both_say_so_and_neither_waits(story: Story, tmp_path: Path) -> None:
    port = free_port()
    children = []
    for index, steps in enumerate((6, 7)):
        options = [f"training.steps={steps}", f"checkpoint.folder={tmp_path / 'bucket'}"]
        config = load_config(RunConfig, story.root / "run.yaml", options)
        words = (config, tmp_path / str(index), index, port)
        children.append(multiprocessing.get_context("fork").Process(target=_refused, args=words))
        children[-1].start()
    for child in children:
        child.join(PATIENCE)
    said = [(tmp_path / f"{index}.said").read_text(encoding="utf-8") for index in range(2)]
    assert said[0] == said[1]
    assert "do not agree: training.steps is 7 in process 1 and 6 in process 0" in said[0]


def test_the_launcher_knows_the_status_of_a_host_that_lost_another() -> None:
    assert PeersLostError.exit_status == PEERS_LOST
