"""What processes of a run compare before they train; here they are threads, which meet where processes would."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dalle_torch
from dalle_torch.config import RunConfig
from dalle_torch.training import agreement
from dalle_torch.training.agreement import compare_checkpoints, compare_options, compare_weights
from tests.tiny_run import run_config, write_source

COUNT = 3


class Peer:
    """As much of an engine as is asked for here."""

    host_count = COUNT

    def __init__(self, index: int, meeting: threading.Barrier, said: dict[int, Any]) -> None:
        self.host_index, self._meeting, self._said = index, meeting, said

    def gather(self, value: Any) -> list[Any]:
        self._said[self.host_index] = value
        self._meeting.wait(10)
        found = [self._said[index] for index in range(COUNT)]
        self._meeting.wait(10)
        return found


def together(work: Callable[[Peer], None]) -> list[str]:
    """What each of the peers raises; empty where it goes on."""
    meeting, said = threading.Barrier(COUNT), {}

    def one(index: int) -> str:
        try:
            work(Peer(index, meeting, said))
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(COUNT) as pool:
        return list(pool.map(one, range(COUNT)))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("agreement")
    return run_config(folder / "run.yaml", write_source(folder / "source"))


def test_equal_options_are_accepted_though_devices_differ(config: RunConfig) -> None:
    def compare(peer: Peer) -> None:
        device = "cpu" if peer.host_index else "auto"
        compare_options(peer, replace(config, runtime=replace(config.runtime, device=device)))

    assert together(compare) == [""] * COUNT


def test_another_option_is_named_with_both_values_in_every_process(config: RunConfig) -> None:
    def compare(peer: Peer) -> None:
        steps = 7 if peer.host_index == 2 else config.training.steps
        compare_options(peer, replace(config, training=replace(config.training, steps=steps)))

    said = together(compare)
    assert len(set(said)) == 1
    assert f"training.steps is 7 in process 2 and {config.training.steps} in process 0" in said[0]
    assert "give all of them the same file" in said[0]


def test_another_version_is_named(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = iter(["1.0", "1.0", "1.1"])
    lock = threading.Lock()

    def of_this_process() -> dict[str, str]:
        with lock:
            return {"dalle_torch": next(versions)}

    monkeypatch.setattr(agreement, "_versions", of_this_process)
    said = together(lambda peer: compare_options(peer, config))
    assert len(set(said)) == 1 and "dalle_torch is " in said[0] and "1.1" in said[0]


def test_this_process_names_its_versions() -> None:
    found = agreement._versions()
    assert found["dalle_torch"] == dalle_torch.__version__ and found["torch"] == torch.__version__.split("+")[0]


def test_a_shared_folder_and_the_same_step_are_accepted_and_nothing_is_left_there(tmp_path: Path) -> None:
    folder = tmp_path / "bucket"
    assert together(lambda peer: compare_checkpoints(peer, str(folder), 4)) == [""] * COUNT
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    said = together(lambda peer: compare_checkpoints(peer, str(tmp_path / f"of-{min(peer.host_index, 1)}"), 0))
    assert all("is not there for processes 1, 2: set checkpoint.folder to a folder or URL" in line for line in said)


def test_a_folder_that_cannot_be_made_is_named_everywhere(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = together(lambda peer: compare_checkpoints(peer, str(tmp_path / "file" / "bucket"), 0))
    assert len(set(said)) == 1 and "cannot be written" in said[0]


def test_other_steps_are_named(tmp_path: Path) -> None:
    said = together(lambda peer: compare_checkpoints(peer, "gs://bucket/run", 4 if peer.host_index == 1 else 6))
    assert len(set(said)) == 1
    assert said[0].startswith(
        "process 1 found the checkpoint of step 4 in gs://bucket/run, and process 0 that of step 6"
    )


def test_other_weights_are_refused() -> None:
    def compare(peer: Peer) -> None:
        model = nn.Linear(2, 2)
        nn.init.constant_(model.weight, 1.0 if peer.host_index < 2 else 2.0)
        nn.init.zeros_(model.bias)
        compare_weights(peer, model)

    said = together(compare)
    assert len(set(said)) == 1 and "the weights of process 2 differ from those of process 0" in said[0]
