"""The loop around `train_step`: batches in, metrics and checkpoints out, until the steps are done or Ctrl-C.

Owns: when things happen. Does not own: an update (`step`), what a checkpoint holds (`state`), data, evaluation.
"""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from dalle_torch.config import OptimizerConfig, TrainingConfig
from dalle_torch.log import get_logger, progress
from dalle_torch.optim.schedules import learning_rate, observe
from dalle_torch.training.state import TrainState, checkpoints
from dalle_torch.training.step import Batch, forward_pass, train_step

logger = get_logger(__name__)

BatchSource = Callable[[int], Batch]
"""Index of a batch, counted from 0 over the whole run -> the batch; pure, so that a resumed run sees the same data."""
Evaluation = Callable[[TrainState], Mapping[str, float]]
METRICS_FILE = "metrics.jsonl"
EVALUATION_LOSS = "eval_loss"
"""What an evaluation calls the loss that the schedule "plateau" goes by."""


def train(
    state: TrainState,
    batches: BatchSource,
    optimizer: OptimizerConfig,
    config: TrainingConfig,
    folder: Path,
    evaluate: Evaluation | None = None,
) -> TrainState:
    """Train until `config.steps` updates are done, from the newest checkpoint in `folder` if there is one.

    `folder` gets checkpoints and `metrics.jsonl`. Ctrl-C ends the run after the update at hand, with a checkpoint; a
    second one ends it at once.

    Raises:
        CheckpointError: the checkpoint in `folder` is of another model or optimizer.
        FloatingPointError: the loss is not a number; the last checkpoint stays as it is.
        ValueError: the schedule "plateau" has no evaluation's loss to go by.
    """
    if optimizer.schedule == "plateau" and evaluate is None:
        raise ValueError("optimizer.schedule=plateau needs evaluations, and there are none here: take another one")
    folder.mkdir(parents=True, exist_ok=True)
    if saved := checkpoints(folder):
        state.load(saved[-1])
        logger.info("resumed from %s", saved[-1])
    state.model.train()
    forward = forward_pass(state.model, config)
    log = _Log(folder / METRICS_FILE, samples_a_step=config.batch_size * config.accumulation_steps)
    with _interruptible() as interrupted, progress(total=config.steps, desc="training", unit="step") as bar:
        bar.update(state.step)
        while state.step < config.steps and not interrupted.is_set():
            first = state.step * config.accumulation_steps
            lr = learning_rate(optimizer, state.step, config.steps, state.plateau)
            metrics = train_step(
                state.model,
                state.optimizer,
                [batches(first + i) for i in range(config.accumulation_steps)],
                lr=lr,
                max_grad_norm=optimizer.max_grad_norm,
                forward=forward,
            )
            state.step += 1
            bar.update()
            last = state.step == config.steps
            if state.step % config.log_every == 0 or last:
                bar.set_postfix(loss=log.write(state.step, {"lr": lr} | {k: float(v) for k, v in metrics.items()}))
            if evaluate is not None and (state.step % config.eval_every == 0 or last):
                found = _evaluated(state, evaluate)
                log.write(state.step, found)
                # One that is due to the end alone would not take place in a longer run.
                if optimizer.schedule == "plateau" and state.step % config.eval_every == 0:
                    state.plateau = observe(optimizer, state.plateau, state.step, _loss_of(found))
            if state.step % config.save_every == 0 and not last:
                state.save(folder, config.keep)
    if interrupted.is_set():
        logger.warning("interrupted after step %d of %d; the same command goes on from there", state.step, config.steps)
    state.save(folder, config.keep)
    state.model.eval()
    return state


class _Log:
    """Metrics as JSON lines, with the speed since the last line of training."""

    def __init__(self, path: Path, samples_a_step: int) -> None:
        self.path = path
        self.samples = samples_a_step
        self.mark: tuple[int, float] | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> float | None:
        """Append one line; returns the loss. Raises FloatingPointError if that is not finite."""
        row: dict[str, float] = {"step": step} | {name: float(f"{value:.6g}") for name, value in metrics.items()}
        now = time.monotonic()
        if "loss" in metrics:
            if self.mark:
                row["samples_per_second"] = round((step - self.mark[0]) * self.samples / (now - self.mark[1]), 1)
            self.mark = (step, now)
        else:
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
            self.mark = None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        loss = metrics.get("loss")
        if loss is not None and not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(f"the loss is {loss} at step {step}: lower optimizer.lr or max_grad_norm")
        return loss


def _evaluated(state: TrainState, evaluate: Evaluation) -> Mapping[str, float]:
    state.model.eval()
    with torch.no_grad():
        metrics = evaluate(state)
    state.model.train()
    return metrics


def _loss_of(evaluation: Mapping[str, float]) -> float:
    if EVALUATION_LOSS not in evaluation:
        found = ", ".join(evaluation) or "nothing"
        raise ValueError(f"optimizer.schedule=plateau needs {EVALUATION_LOSS} of the evaluation, which found {found}")
    return evaluation[EVALUATION_LOSS]


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets instead of stopping the program, once; off the main thread it is never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    before = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before if callable(before) else signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
