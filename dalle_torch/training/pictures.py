"""What a run draws on its way: sheets to look at, and pictures that are scored.

Owns: when they are due, which process draws, what is loaded for it. Does not own: drawing (`samples`), scoring
(`scores`).
"""

from collections.abc import Mapping
from pathlib import Path

from dalle_torch.config import PicturesConfig, RunConfig
from dalle_torch.log import get_logger
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.parallel.engine import Engine
from dalle_torch.storage.embedded import located_vqgan
from dalle_torch.tracking.base import Tracker
from dalle_torch.training.samples import Drawer, Sampler
from dalle_torch.training.scores import PromptScores, load_judges
from dalle_torch.training.setup import Run

logger = get_logger(__name__)


class Pictures:
    """Draws what is due.

    Args:
        sampler, scores: None where the configuration has none, and in processes that do not draw.
    """

    def __init__(self, engine: Engine, sampler: Sampler | None = None, scores: PromptScores | None = None) -> None:
        self.engine, self.sampler, self.scores = engine, sampler, scores
        self._judges_are_told = False

    def due(self, config: RunConfig, step: int) -> bool:
        """Whether something is drawn after `step` updates; the same in every process."""
        return config.model.vqgan is not None and any(_due(section, step) for section in _sections(config).values())

    def draw(self, config: RunConfig, step: int, tracker: Tracker) -> None:
        """Draw what is due. Every process comes here, those that do not draw to wait for the one that does."""
        first = self.engine.host_index == 0
        if self.sampler is not None and _due(config.samples, step):
            images, prompts = self.sampler.draw(step, write=first)
            tracker.images("samples", images, prompts, step)
        if self.scores is not None and _due(config.scores, step):
            self._score(self.scores, step, tracker)
        self.engine.barrier()

    def _score(self, scores: PromptScores, step: int, tracker: Tracker) -> None:
        scored = scores.look(step)
        if scored is None or scores.judges is None:
            return
        if not self._judges_are_told:
            tracker.event("judges", scores.judges.to_json(), step)
            self._judges_are_told = True
        tracker.log(scored.figures, step)
        tracker.images("ranked", scored.images, scored.captions, step)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in scored.figures.items())
        logger.info("step %d  %s", step, figures)


def prepare_pictures(run: Run, folder: Path) -> Pictures:
    """What the configuration asks for; on torch_xla in every process, since a model lies on the devices of all and all
    take part, else in the first one.

    Args:
        folder: for the sheets.

    Raises:
        OSError: VQGAN or judge are not there.
        ValueError: they do not fit, or parameters are spread.
    """
    config, engine = run.config, run.engine
    # Where only the interval is missing, it can be set while the run goes.
    wanted = [name for name, section in _sections(config).items() if section.prompts]
    if config.model.vqgan is None or not wanted:
        return Pictures(engine)
    everywhere = engine.name == "xla"
    if not everywhere and engine.host_count > 1 and config.runtime.parallel == "fsdp":
        raise ValueError(
            f"{' and '.join(f'{name}.prompts' for name in wanted)}: one process draws, and needs whole parameters, "
            f"which runtime.parallel=fsdp has not: take ddp, or leave the prompts out and draw from an exported "
            f"checkpoint"
        )
    if engine.host_index and not everywhere:
        return Pictures(engine)
    device = None if everywhere else engine.device
    vqgan = VQGAN.from_pretrained(located_vqgan(config.model.vqgan), trust_pickle=config.model.trust_pickle).eval()
    if device is not None:
        vqgan.to(device)
    drawer = Drawer(run.state.model, run.processor, vqgan)
    sampler = Sampler(config.samples, drawer, folder) if config.samples.prompts else None
    scores = None
    if config.scores.prompts:
        judges = load_judges(config.scores, device, drawer.picture_size) if engine.host_index == 0 else None
        scores = PromptScores(config.scores, drawer, judges, folder)
    return Pictures(engine, sampler, scores)


def _sections(config: RunConfig) -> Mapping[str, PicturesConfig]:
    return {"samples": config.samples, "scores": config.scores}


def _due(section: PicturesConfig, step: int) -> bool:
    return bool(section.prompts) and section.every is not None and step % section.every == 0
