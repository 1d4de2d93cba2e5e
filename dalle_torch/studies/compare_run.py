"""One run of a comparison, as a process of its own: `python -m dalle_torch.studies.compare_run RUN`.

It trains what `RUN/planned.yaml` says in the folder RUN and leaves `RUN/result.json`. It ends in order, with a
checkpoint, when its standard input ends: whoever started it holds the other end, and may have been killed.

Owns: the process, the result. Does not own: the run (`training.run`), which runs there are (`compare`).
"""

import json
import os
import platform
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import transformers

from dalle_torch import __version__
from dalle_torch.config import RunConfig
from dalle_torch.config_io import load_config
from dalle_torch.log import get_logger
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.parallel.runtime import pick_device
from dalle_torch.storage import atomic_file
from dalle_torch.studies.compare_measure import read_metrics
from dalle_torch.training.run import train_run
from dalle_torch.training.run_folder import RunFolder
from dalle_torch.training.setup import model_config
from dalle_torch.training.signals import EXIT_STATUS

logger = get_logger(__name__)

PLANNED = "planned.yaml"
RESULT = "result.json"


def main(folder: Path) -> int:
    """Train, and write the result if the run came to an end; returns the exit status of the process."""
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = load_config(RunConfig, folder / PLANNED)
    memory = _peak_memory()
    error = None
    try:
        outcome = train_run(config, folder)
    except FloatingPointError as problem:
        # A finding about the row, and not a failure of the comparison.
        outcome, error = "finished", " ".join(str(problem).split())
        logger.warning("%s", error)
    if outcome != "finished":
        return EXIT_STATUS[outcome] or EXIT_STATUS["terminated"]
    result = describe_run(config, folder, error) | {"memory_at_start": memory, "threads": threads}
    with atomic_file(folder / RESULT) as file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def describe_run(config: RunConfig, folder: Path, error: str | None) -> dict[str, Any]:
    """All that a run left, in a form for JSON: see `docs/comparisons.md`."""
    on_cpu = _device(config).type == "cpu"
    with torch.device("meta"):
        parameters = DalleBart(model_config(config.model)).num_parameters()
    return {
        "parameters": parameters,
        "error": error,
        "measured": read_metrics(RunFolder(folder).metrics, processor_time=on_cpu).to_json(),
        "peak_memory": _peak_memory() if on_cpu else _peak_device_memory(),
        "versions": {
            "dalle_torch": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": str(_device(config)),
        "machine": platform.machine(),
    }


def _device(config: RunConfig) -> torch.device:
    return pick_device(config.runtime.device)


def _peak_memory() -> int:
    """Bytes that this process held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_device_memory() -> int | None:
    """Bytes of an NVIDIA GPU; None: not known."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
