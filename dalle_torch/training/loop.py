"""The loop of a run: batches in, metrics, pictures and checkpoints out, until the steps are done or someone stops it.

Owns: when things happen. Does not own: an update (`step`), what a checkpoint holds (`state`), which settings may change
while it runs (`control`), what is logged where (`tracking`).

Every process goes through the same steps. Before each update they tell each other whether one was asked to stop, and
the first one passes on what was adjusted, so that all do the same at the same step.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dalle_torch.checkpoint.sharded import CheckpointFolder
from dalle_torch.config import RunConfig
from dalle_torch.data.loader import TokenBatch, merge_states
from dalle_torch.log import get_logger, progress
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.optim.adjust import adjust, counters
from dalle_torch.optim.schedules import learning_rate, observe
from dalle_torch.storage.places import Place
from dalle_torch.tracking.base import Tracker
from dalle_torch.training.control import Change, History, Mailbox, Orders, apply, take_orders
from dalle_torch.training.evaluation import EVALUATION_LOSS, evaluation_losses
from dalle_torch.training.observation import Observer, norms
from dalle_torch.training.pictures import Pictures
from dalle_torch.training.setup import Run
from dalle_torch.training.signals import StopRequest, stop_requests
from dalle_torch.training.speed import Stopwatch, flops_of_sample, line_of, peak_flops
from dalle_torch.training.state import random_states
from dalle_torch.training.step import Batch, TrainStep

logger = get_logger(__name__)

Scorer = Callable[[DalleBart, int], Mapping[str, float]]
"""Further figures of a model after so many updates, found at each evaluation by the first process."""


class Trainer:
    """Trains a run from where its state is.

    Args:
        run: all that is driven.
        checkpoints: where state goes.
        tracker: where figures go; of the first process.
        mailbox: requests to adjust settings; of the first process.
        history: what was adjusted when, the same in every process.
        pictures: draws and scores now and then.
        scorer: see `Scorer`.
        mirror: gets the history too, of the first process; None: it is in the run's folder alone.
    """

    def __init__(
        self,
        run: Run,
        checkpoints: CheckpointFolder,
        tracker: Tracker,
        mailbox: Mailbox,
        history: History,
        pictures: Pictures | None = None,
        scorer: Scorer | None = None,
        mirror: Place | None = None,
    ) -> None:
        self.run, self.checkpoints, self.tracker = run, checkpoints, tracker
        self.mailbox, self.history, self.scorer, self.mirror = mailbox, history, scorer, mirror
        self.state, self.engine = run.state, run.engine
        self.pictures = pictures or Pictures(self.engine)
        self._observer = Observer()
        # What a run goes on from is saved already.
        self._saved_step: int | None = self.state.step or None
        self._bar_is_shown = False
        self._watch = make_stopwatch(run)
        self._step = TrainStep(self.engine, self.state.model, run.network, self.state.optimizer, run.config.training)

    @property
    def config(self) -> RunConfig:
        """The options as they hold now."""
        return self.run.config

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.engine.host_index == 0

    def train(self) -> str:
        """Train until the steps are done, or until Ctrl-C, SIGTERM, a preemption or an adjustment stops the run.

        Whatever ends it in order leaves a checkpoint; a second Ctrl-C does not.

        Returns:
            How it ended, a key of `signals.EXIT_STATUS`.

        Raises:
            FloatingPointError: the loss is not a number; the last checkpoint stays as it is.
            OSError, ValueError: data or checkpoints fail; see there.
        """
        status = "failed"
        with stop_requests(watch_preemption=self.engine.name == "xla") as request:
            try:
                outcome = self._train(request)
                status = "finished" if outcome == "finished" else "stopped"
            except KeyboardInterrupt:
                status = "stopped"
                raise
            finally:
                self.tracker.finish(status)
        return outcome

    def _train(self, request: StopRequest) -> str:
        if self.state.step >= self.config.training.steps:
            logger.warning(
                "nothing is left to do: step %d is reached, and training.steps=%d; set it higher to go on",
                self.state.step, self.config.training.steps,
            )  # fmt: skip
        batches = iter(self.run.training)
        self._watch.restart(self.state.step)
        with progress(total=self.config.training.steps, desc="training", unit="step") as bar:
            bar.update(self.state.step)
            self._bar_is_shown = not bar.disable
            while self.state.step < self.config.training.steps:
                data = self.config.data
                outcome = self._follow_orders(request)
                if outcome is not None:
                    break
                if self.config.data != data:
                    batches = self._with_new_data(batches)
                taken = self._take(batches, request)
                if not taken:
                    outcome = request.reason or "terminated"
                    break
                metrics = self._update(taken)
                bar.update()
                self._after_update(metrics, bar)
            else:
                outcome = "finished"
        if self._saved_step != self.state.step:
            self._save(asynchronous=False)
        self.checkpoints.wait()
        if outcome != "finished":
            logger.warning(
                "%s after step %d of %d; the same command goes on from there",
                outcome, self.state.step, self.config.training.steps,
            )  # fmt: skip
        return outcome

    def _take(self, batches: Iterator[TokenBatch], request: StopRequest) -> list[Batch]:
        """The batches of an update; none where the processes that read them were told to end as this one was."""
        taken: list[Batch] = []
        try:
            with self._watch.waiting_for_data():
                for _ in range(self.config.training.accumulation_steps):
                    taken.append(next(batches).inputs)
        except ChildProcessError:
            # What was taken and not trained on would be missing after a restart; and others would wait for this one.
            if request.reason is None or taken or self.engine.host_count > 1:
                raise
        return taken

    def _update(self, taken: list[Batch]) -> dict[str, Any]:
        config, step = self.config, self.state.step
        every = config.training.histogram_every
        metrics = self._step(
            taken,
            lr=learning_rate(config.optimizer, step, config.training.steps, self.state.plateau),
            max_grad_norm=config.optimizer.max_grad_norm,
            observe=self._observer if every is not None and (step + 1) % every == 0 else None,
        )
        self.state.step += 1
        return metrics

    def _after_update(self, metrics: Mapping[str, Any], bar: Any) -> None:
        config, step = self.config, self.state.step
        last = step == config.training.steps
        if step % config.training.log_every == 0 or last:
            bar.set_postfix(loss=self._log(metrics))
        if histograms := self._observer.take():
            self._watch_paused(lambda: self._log_histograms(histograms))
        if step % config.training.eval_every == 0 or last:
            self._watch_paused(self._evaluate)
        if self.pictures.due(config, step):
            self._watch_paused(lambda: self.pictures.draw(config, step, self.tracker))
        if step % config.training.save_every == 0 or last:
            self._watch_paused(lambda: self._save(config.checkpoint.asynchronous and not last))

    def _watch_paused(self, work: Callable[[], None]) -> None:
        # What the device has yet to do of the updates is time of theirs.
        self.engine.wait()
        with self._watch.paused():
            work()

    def _log(self, metrics: Mapping[str, Any]) -> float:
        step, steps = self.state.step, self.config.training.steps
        loss = float(metrics["loss"])
        row = {"loss": loss, "grad_norm": float(metrics["grad_norm"])}
        row["lr"] = learning_rate(self.config.optimizer, step - 1, steps, self.state.plateau)
        row |= counters(self.state.optimizer) | self._watch.look(step, steps)
        # More digits than a measurement has are noise to a reader.
        self.tracker.log({name: float(f"{value:.7g}") for name, value in row.items()}, step)
        if not self._bar_is_shown:
            logger.info("%s", line_of(row, step, steps))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {step}: lower optimizer.lr or optimizer.max_grad_norm; the newest "
                f"checkpoint is of step {max(self.checkpoints.steps(), default=0)}"
            )
        return loss

    def _log_histograms(self, histograms: Mapping[str, Any]) -> None:
        self.tracker.histograms(histograms, self.state.step)
        self.tracker.log(norms(dict(histograms)), self.state.step)

    def _evaluate(self) -> None:
        config, step = self.config, self.state.step
        found = evaluation_losses(
            self.engine, self.run.network, self.run.evaluation, config.training.precision, config.training.eval_batches
        )
        if self.scorer is not None and self.first:
            found |= self.scorer(self.state.model, step)
        if found:
            self.tracker.log(found, step)
        # One that is due to the end alone would not take place in a longer run.
        if EVALUATION_LOSS in found and step % config.training.eval_every == 0:
            self.state.plateau = observe(config.optimizer, self.state.plateau, step, found[EVALUATION_LOSS])

    def _save(self, asynchronous: bool) -> None:
        start = time.monotonic()
        self._refuse_broken_weights()
        meta = self.state.meta() | {
            "config": asdict(self.config),
            "data": merge_states(self.engine.gather(self.run.training.state_dict())),
            "history": self.history.to_list(),
        }
        step = self.state.step
        self.checkpoints.save(
            step,
            self.state.tensors(),
            meta,
            {"random": random_states()},
            stacks=self.state.stacks(),
            asynchronous=asynchronous,
        )
        self._saved_step = step
        self.tracker.event("saved", {"seconds": round(time.monotonic() - start, 3)}, step)

    def _refuse_broken_weights(self) -> None:
        """Weights that are no numbers must not take the place of good ones; losses may be looked at less often."""
        step = self.state.step
        # On a mesh one more small graph is compiled, with the first save; a save waits for the devices anyway.
        if any(self.engine.gather(not self.state.is_finite())):
            raise FloatingPointError(
                f"the weights are not finite at step {step} and are not saved: lower optimizer.lr or "
                f"optimizer.max_grad_norm; the newest checkpoint is of step {max(self.checkpoints.steps(), default=0)}"
            )

    def _follow_orders(self, request: StopRequest) -> str | None:
        """Do what this and the other processes were told since the last update; returns how the run is to end."""
        step = self.state.step
        own = take_orders(self.mailbox, self.history, self.config, step) if self.first else Orders()
        said = self.engine.gather((request.reason, own.to_json() if self.first else None))
        orders = own if self.first else Orders.from_json(said[0][1])
        if orders.changes:
            self._apply(orders.changes)
        if orders.save and not orders.stop:
            self._watch_paused(lambda: self._save(asynchronous=False))
        own.confirm(self.mailbox, step)
        reason = next((reason for reason, _ in said if reason is not None), None)
        return reason or ("stopped" if orders.stop else None)

    def _apply(self, changes: list[Change]) -> None:
        before, config = self.config, apply(self.config, changes)
        self.run.config = config
        for change in changes:
            logger.info("%s", change)
            self.tracker.event("adjusted", change.to_json(), self.state.step)
        if self.mirror is not None:
            try:
                self.mirror.write("history.jsonl", self.history.dump())
            except OSError as error:
                logger.warning("%s: the history could not be written there: %s", self.mirror, error)
        if config.optimizer != before.optimizer and not adjust(self.state.optimizer, config.optimizer):
            self.state.optimizer = self.run.new_optimizer(self.state.optimizer)
            self._step.optimizer = self.state.optimizer

    def _with_new_data(self, batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
        """The batches from here on with the options of the data as they are now."""
        close = getattr(batches, "close", None)
        if close is not None:
            close()
        self.run.with_data(self.config.data)
        return iter(self.run.training)


def make_stopwatch(run: Run) -> Stopwatch:
    """For the figures of `run`."""
    model, training, engine = run.state.model.config, run.config.training, run.engine
    kind = os.environ.get("TPU_ACCELERATOR_TYPE", "")
    peak = peak_flops(engine.device, engine.mesh.devices, training.precision, training.peak_tflops, kind)
    tokens = model.max_text_length + model.image_length
    return Stopwatch(run.batches.per_update, tokens, flops_of_sample(model), peak)
