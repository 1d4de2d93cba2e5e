"""Metrics in wandb, online or offline, over all processes that a run is made of.

Owns: the only use of wandb beside the download of artifacts (`storage.remote`). Does not own: that failures do not stop
a run (`multi`).

wandb drops what is logged at a step of its own behind the last one, which a resumed run would do. So its steps are left
alone, and "step" is a metric like the others which `define_metric` makes the axis of them all.
"""

import json
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dalle_torch.config import TrackingConfig
from dalle_torch.log import get_logger, process_rank
from dalle_torch.storage.atomic import atomic_file
from dalle_torch.tracking.base import Histogram, NullTracker, Tracker

if TYPE_CHECKING:
    from PIL.Image import Image

logger = get_logger(__name__)

RECORD = "wandb.json"
START_SECONDS = 60.0
FINISH_SECONDS = 120.0


def start_wandb(config: TrackingConfig, folder: Path, settings: Mapping[str, Any], resumed: bool = False) -> Tracker:
    """The run in wandb that belongs to the run in `folder`: a new one, or the one that `wandb.json` there names.

    A server that does not answer is no error: the run is kept offline in `folder/wandb`, for `wandb sync`. Of a resumed
    run nothing is; it goes on without wandb.

    Args:
        config: off gives a tracker that does nothing, and so does every process but the first.
        settings: the whole configuration of the run, for wandb to show.
        resumed: the run goes on from a checkpoint, so it worked before.

    Raises:
        ValueError: wandb is asked for and not installed.
        PermissionError: it is asked for online and knows no account.
    """
    if config.wandb == "off" or process_rank() != 0:
        return NullTracker()
    try:
        return WandbTracker(_start(config, folder, settings))
    except Exception as error:
        if not resumed:
            raise
        logger.warning("the run goes on without wandb: %s", _line(error))
        return NullTracker()


class WandbTracker:
    """Sends everything to `run`, a run that wandb has started."""

    def __init__(self, run: Any, finish_seconds: float = FINISH_SECONDS) -> None:
        self.run = run
        self.finish_seconds = finish_seconds
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._log(metrics, step)

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        import wandb

        rows: dict[str, Any] = {}
        for name, value in values.items():
            rows[f"histogram/{name}"] = wandb.Histogram(np_histogram=(list(value.counts), list(value.edges)))
            rows[f"norm/{name}"] = value.norm
        self._log(rows, step)

    def images(self, name: str, images: Sequence["Image"], captions: Sequence[str], step: int) -> None:
        import wandb

        pictures = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
        self._log({name: pictures}, step)

    def event(self, kind: str, fields: Mapping[str, Any], step: int) -> None:
        simple = {
            f"event/{kind}/{name}": value if isinstance(value, int | float | str) else json.dumps(value, default=str)
            for name, value in fields.items()
        }
        self._log(simple or {f"event/{kind}": 1}, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], pictures: Sequence[Path]) -> None:
        import wandb

        table = wandb.Table(columns=["picture", *columns])
        for row, picture in zip(rows, pictures, strict=True):
            table.add_data(wandb.Image(str(picture)), *row)
        self._log({name: table}, 0)

    def finish(self, status: str) -> None:
        """Wait for what is on its way, `finish_seconds` at most."""
        self.run.summary["status"] = status
        # wandb has a limit of its own, and a thread is left behind where even that does not hold.
        failures: list[Exception] = []
        thread = threading.Thread(target=self._finish, args=(status, failures), daemon=True, name="wandb-finish")
        thread.start()
        thread.join(self.finish_seconds + 10)
        if thread.is_alive():
            raise TimeoutError(f"wandb did not finish in {self.finish_seconds:g} s: `wandb sync` sends what is missing")
        if failures:
            raise failures[0]

    def _finish(self, status: str, failures: list[Exception]) -> None:
        try:
            self.run.finish(exit_code=1 if status == "failed" else 0)
        except Exception as error:
            failures.append(error)

    def _log(self, row: Mapping[str, Any], step: int) -> None:
        self.run.log(dict(row) | {"step": step})


def log_table(
    tracker: Tracker, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], pictures: Sequence[Path]
) -> None:
    """Send a table with a picture's file in front of each row, if `tracker` is a run in wandb."""
    if isinstance(tracker, WandbTracker):
        tracker.table(name, columns, rows, pictures)


def _start(config: TrackingConfig, folder: Path, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"tracking.wandb={config.wandb} and wandb is not installed: pip install 'dalle-torch[train]', or set "
            f"tracking.wandb=off"
        ) from error
    run_id = _run_id(config, folder)
    try:
        run = _init(wandb, config, config.wandb, folder, settings, run_id)
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        raise PermissionError(
            f"tracking.wandb={config.wandb}: wandb refuses ({_line(error)}): run `wandb login`, set WANDB_API_KEY, or "
            f"set tracking.wandb to offline or off"
        ) from error
    except Exception as error:
        if config.wandb == "offline":
            raise
        logger.warning(
            "wandb cannot be reached (%s): this run is kept in %s, and `wandb sync` sends it", _line(error),
            folder / "wandb",
        )  # fmt: skip
        # Its process still holds the run that it could not start, and would refuse its id.
        wandb.teardown()
        run = _init(wandb, config, "offline", folder, settings, run_id)
    return run


def _init(
    wandb: Any,
    config: TrackingConfig,
    mode: Literal["off", "online", "offline"],
    folder: Path,
    settings: Mapping[str, Any],
    run_id: str,
) -> Any:
    return wandb.init(
        mode=mode,
        dir=str(folder),
        project=config.project,
        entity=config.entity,
        name=config.name,
        group=config.group,
        tags=list(config.tags),
        id=run_id,
        # Offline there is nothing to ask whether the run is there; `wandb sync` adds to it by its id.
        resume="allow" if mode == "online" else None,
        config=dict(settings),
        settings=wandb.Settings(
            init_timeout=START_SECONDS,
            login_timeout=START_SECONDS,
            # Progress bars and messages are the terminal's own.
            console="off",
            **({"finish_timeout": FINISH_SECONDS} if "finish_timeout" in wandb.Settings.model_fields else {}),
        ),
    )


def _run_id(config: TrackingConfig, folder: Path) -> str:
    """The id in `wandb.json`, or a new one where there is none or it is of another project."""
    wanted = {"project": config.project, "entity": config.entity}
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if {name: found[name] for name in wanted} == wanted and re.fullmatch(r"[\w-]{1,128}", found["id"]):
            return found["id"]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged, a new run is made in wandb: %s", folder / RECORD, _line(error))
    run_id = secrets.token_hex(4)
    with atomic_file(folder / RECORD) as place:
        place.write_text(json.dumps({"id": run_id} | wanted) + "\n", encoding="utf-8")
    return run_id


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
