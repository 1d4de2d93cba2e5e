"""A run that is killed again and again ends as one that never was: weights, optimizer, order of the data, bit for bit.

Children are forked from this process, which has everything imported, and killed by a real SIGKILL at random moments,
many of them in the middle of a save.
"""

import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from dalle_torch.checkpoint.sharded import CheckpointFolder
from dalle_torch.training.run import train_run
from tests.tiny_run import OPTIMIZERS, run_config, write_source

KILLS = 20
STEPS = 60
MOST_SPANS = 5  # a run that gets nowhere in five times what an unbroken one takes for all is stuck


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


def _start(work: Callable[[], object]) -> multiprocessing.Process:
    def child() -> None:
        # tqdm's own is shared with this process, and one that is killed with it would keep it for ever.
        tqdm.set_lock(threading.RLock())
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def _final(folder: Path, step: int = STEPS) -> tuple[dict[str, torch.Tensor], dict]:
    newest = CheckpointFolder(str(folder / "checkpoints")).newest()
    assert newest is not None and newest.step == step
    return newest.read(), newest.meta


def _losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize("optimizer", ["shampoo", "adamw"])
def test_killed_at_random_moments_a_run_ends_as_an_unbroken_one(tmp_path: Path, source: Path, optimizer: str) -> None:
    options = {
        "optimizer": OPTIMIZERS[optimizer] | {"schedule": "plateau", "plateau": {"patience": 0}},
        "training": {"steps": STEPS, "eval_every": 7, "save_every": 1, "accumulation_steps": 1},
        "checkpoint": {"asynchronous": optimizer == "adamw"},
    }
    config = run_config(tmp_path / "run.yaml", source, **options)
    started = time.monotonic()
    whole = _start(lambda: train_run(config, tmp_path / "whole"))
    whole.join()
    assert whole.exitcode == 0
    span = time.monotonic() - started

    rng = random.Random(optimizer)
    broken, reached = tmp_path / "broken", [0]
    least = shortest = 0.25 * span / KILLS
    while True:
        process = _start(lambda: train_run(config, broken))
        process.join(timeout=least + rng.uniform(0.05, 2.5 * span / KILLS))
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        process.kill()
        process.join()
        newest = CheckpointFolder(str(broken / "checkpoints")).newest()
        reached.append(newest.step if newest else 0)
        # Where the steps are fast, starting and the first save take longer than any share of the run: more time, then.
        least = shortest if reached[-1] > reached[-2] else 1.5 * least
        if least > MOST_SPANS * span:
            pytest.fail(f"the run makes no progress between kills: {reached}")
    assert reached == sorted(reached), "a checkpoint was lost"
    assert len(reached) > 3, "the run was over before it was killed"

    expected, expected_meta = _final(tmp_path / "whole")
    found, found_meta = _final(broken)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for key in ("data", "plateau", "optimizer", "step"):
        assert found_meta[key] == expected_meta[key], key
    assert _losses(broken) == _losses(tmp_path / "whole")
