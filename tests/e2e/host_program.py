"""`dalle-torch` on a host of `test_train_hosts`: the real command line, which notes what is trained on and with what
weights it ends, and fails once where it is told to.

    FAULTS='1:2:raise 1:5:kill' python -m tests.e2e.host_program train ...

A fault is the number of a host, the updates done before, and what happens then. Notes go to the working directory.
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle_torch.training.loop import Trainer


def noting(folder: Path, update: Callable[..., Any] = Trainer._update) -> Callable[..., Any]:
    """`Trainer._update`, which writes down the rows it is given."""

    def noted(trainer: Trainer, taken: list[dict[str, Any]]) -> Any:
        rows = [row for batch in taken for row in batch["labels"].tolist()]
        with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": trainer.state.step, "rows": rows}) + "\n")
        fail_where_told(folder, trainer.engine.host_index, trainer.state.step)
        return update(trainer, taken)

    return noted


def fail_where_told(folder: Path, host: int, step: int) -> None:
    for fault in os.environ.get("FAULTS", "").split():
        where, when, how = fault.split(":")
        mark = folder / f"failed-{when}"
        if (int(where), int(when)) != (host, step) or mark.exists():
            continue
        mark.touch()
        # Time for the others to come to where they wait for this one.
        time.sleep(0.5)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(f"the disk of host {host} is gone")


def noting_the_end(folder: Path, train: Callable[..., str] = Trainer.train) -> Callable[..., str]:
    """`Trainer.train`, which writes down what the weights are afterwards."""

    def noted(trainer: Trainer) -> str:
        outcome = train(trainer)
        digest = hashlib.sha256()
        for value in trainer.state.model.state_dict().values():
            digest.update(value.contiguous().numpy().tobytes())
        (folder / "weights").write_text(digest.hexdigest())
        return outcome

    return noted


def main() -> int:
    folder = Path.cwd()
    with (folder / "pids").open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    Trainer._update = noting(folder)  # type: ignore[method-assign]
    Trainer.train = noting_the_end(folder)  # type: ignore[method-assign]
    from dalle_torch.cli.main import main as command

    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
