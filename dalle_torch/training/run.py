"""A run from its options and its folder to its end: the one way in for the command line, recipes and comparisons.

Owns: what is found in the folder and taken up again, who writes what. Does not own: making the parts (`setup`), the
loop (`loop`).
"""

import os
from contextlib import nullcontext
from dataclasses import asdict

from dalle_torch.checkpoint.sharded import Checkpoint, CheckpointFolder
from dalle_torch.config import MeshConfig, RunConfig
from dalle_torch.config_io import dump_config, load_config, save_config
from dalle_torch.log import get_logger, set_rank
from dalle_torch.parallel.engine import Engine, start_engine
from dalle_torch.parallel.launched import peers_watched
from dalle_torch.storage.places import Place
from dalle_torch.tracking import JsonLinesTracker, MultiTracker, NullTracker, Tracker, start_wandb
from dalle_torch.training.agreement import compare_checkpoints, compare_options
from dalle_torch.training.control import History, Mailbox
from dalle_torch.training.loop import Scorer, Trainer
from dalle_torch.training.pictures import prepare_pictures
from dalle_torch.training.run_folder import RunFolder, differences
from dalle_torch.training.setup import Run, prepare_run
from dalle_torch.training.state import set_random_states

logger = get_logger(__name__)


def train_run(config: RunConfig, output: str | os.PathLike[str], scorer: Scorer | None = None) -> str:
    """Train `config` in the folder `output`, from its newest checkpoint if there is one.

    Args:
        config: read from a file, or made in a program.
        output: of this machine; on a pod every host has one, and the first host's has the metrics.
        scorer: further figures at each evaluation.

    Returns:
        How the run ended, a key of `signals.EXIT_STATUS`.

    Raises:
        OSError: the folder cannot be written or is in use, or a source is not there.
        PeersLostError: another process of the run has ended or does not answer.
        ValueError: options, data, model and checkpoint do not fit each other, or processes do not agree on them.
        FloatingPointError: the loss is not a number.
    """
    with peers_watched():
        engine = start_engine(config.runtime, config.mesh)
        set_rank(engine.host_index)
        try:
            compare_options(engine, config)
            folder = RunFolder(output)
            # The other processes of this machine use the same folder, and write nothing into it.
            with folder.acquire() if engine.host_index == 0 else nullcontext():
                outcome = _train_in(config, engine, folder, scorer)
                # Who leaves first would break the connection of who still writes.
                engine.barrier()
                return outcome
        finally:
            engine.close()


def checkpoint_folder(config: RunConfig, engine: Engine, folder: RunFolder) -> CheckpointFolder:
    """Where the run's checkpoints are."""
    return CheckpointFolder(
        config.checkpoint.folder or str(folder.checkpoints),
        host_index=engine.host_index,
        host_count=engine.host_count,
        barrier=engine.barrier,
        gather=engine.gather,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
    )


def _train_in(config: RunConfig, engine: Engine, folder: RunFolder, scorer: Scorer | None) -> str:
    if engine.name != "xla" and config.mesh != MeshConfig():
        logger.info("the section mesh is for runtime.backend=xla, and not looked at here")
    checkpoints = checkpoint_folder(config, engine, folder)
    found = checkpoints.newest()
    step = 0 if found is None else found.step
    compare_checkpoints(engine, checkpoints.url, step)
    history = _history(engine, folder, found)
    # Once parameters were grouped by their decay they stay so.
    split = any(change.name == "optimizer.weight_decay" and (change.step or 0) < step for change in history)
    run = prepare_run(history.config_at(config, step), engine, split_decay=split)
    if found is not None:
        _go_on(run, found)
    # Before a tracker starts a run elsewhere: what cannot be drawn or scored is to leave none behind.
    pictures = prepare_pictures(run, folder.samples)
    tracker: Tracker = NullTracker()
    mirror = None
    if engine.host_index == 0:
        _note_differences(config, folder, history)
        save_config(config, folder.config)
        run.processor.save_pretrained(folder.processor)
        tracker = _tracker(config, folder, step)
        mirror = _mirror(config, history)
    mailbox = Mailbox(_mailboxes(config, folder))
    logger.info("%s", run.batches)
    return Trainer(run, checkpoints, tracker, mailbox, history, pictures, scorer, mirror).train()


def _mailboxes(config: RunConfig, folder: RunFolder) -> list[str]:
    """In the run's folder, and beside the checkpoints where those lie elsewhere: there too it can be adjusted."""
    remote = [f"{config.checkpoint.folder}/control"] if config.checkpoint.folder else []
    return [str(folder.control), *remote]


def _mirror(config: RunConfig, history: History) -> Place | None:
    """Beside checkpoints that lie elsewhere, what `dalle-torch adjust` reads of a run's folder."""
    if config.checkpoint.folder is None:
        return None
    place = Place(config.checkpoint.folder)
    place.write("config.yaml", dump_config(config).encode())
    place.write("history.jsonl", history.dump())
    return place


def _history(engine: Engine, folder: RunFolder, found: Checkpoint | None) -> History:
    """What was adjusted so far, as the first process knows it."""
    saved = [] if found is None else found.meta["history"]
    own = History(folder.history, saved) if engine.host_index == 0 else None
    everywhere = engine.gather(None if own is None else own.to_list())[0]
    return History(None, everywhere) if own is None else own


def _go_on(run: Run, found: Checkpoint) -> None:
    run.state.load(found)
    run.engine.place_state(run.state.optimizer)
    run.training.load_state_dict(found.meta["data"])
    hosts, index = found.host_metas, run.engine.host_index
    if len(hosts) == run.engine.host_count:
        set_random_states(hosts[index]["random"])
    elif run.state.model.config.dropout:
        logger.warning(
            "the checkpoint is of %d processes, and here are %d: dropout draws anew", len(hosts), run.engine.host_count
        )
    logger.info("going on from step %d, %s", found.step, found.url)


def _note_differences(config: RunConfig, folder: RunFolder, history: History) -> None:
    if not folder.config.is_file():
        return
    try:
        before = load_config(RunConfig, folder.config)
    except (OSError, ValueError) as error:
        # It is written anew; what the run was is in its checkpoints.
        logger.warning("what was changed since the run began cannot be told: %s", error)
        return
    adjusted = {change.name for change in history}
    for difference in differences(before, config):
        if difference.name in adjusted:
            logger.warning(
                "%s: it was adjusted while the run went, and that holds; dalle-torch adjust changes it", difference
            )
        else:
            logger.info("from here on other than before: %s", difference)


def _tracker(config: RunConfig, folder: RunFolder, step: int) -> Tracker:
    trackers: list[Tracker] = [JsonLinesTracker(folder.metrics, step)]
    if config.tracking.wandb != "off":
        trackers.append(start_wandb(config.tracking, folder.path, asdict(config), resumed=step > 0))
    return MultiTracker(trackers)
