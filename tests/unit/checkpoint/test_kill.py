"""A process that is killed while it saves leaves the checkpoints that it had committed, and nothing to stumble over."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest

from dalle_torch.checkpoint import CheckpointFolder
from tests.unit.checkpoint.states import equal, save_for_ever, state

KILLS = 15


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_any_moment(tmp_path: Path, asynchronous: bool) -> None:
    # Each of its processes is forked from one that has torch in it already.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.checkpoint.states"])
    moments = random.Random(int(asynchronous))
    folder, step, unfinished = CheckpointFolder(str(tmp_path)), 0, 0
    for _ in range(KILLS):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(tmp_path, step + 1, asynchronous, theirs))
        process.start()
        theirs.close()
        committed = [ours.recv() for _ in range(moments.randint(1, 3))]
        time.sleep(moments.random() * 0.03)  # somewhere in the next save or the one after
        process.kill()
        process.join()
        try:
            while True:
                committed.append(ours.recv())
        except EOFError:
            pass
        unfinished += any(path.name.startswith(".saving-") for path in tmp_path.iterdir())
        checkpoint = folder.newest()
        assert checkpoint is not None
        # The last one may have been committed without there having been the time to say so.
        assert committed[-1] <= checkpoint.step <= committed[-1] + 1
        assert checkpoint.meta == {"step": checkpoint.step}
        assert equal(checkpoint.read(), state(checkpoint.step))
        step = checkpoint.step
    assert unfinished > 0  # some were killed within a save
    folder.save(step + 1, state(step + 1), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{s:08d}" for s in folder.steps()]
    assert len(folder.steps()) == 2
