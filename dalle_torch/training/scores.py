"""Scores of fixed prompts while a model trains.

Owns: drawing, scoring and ranking them with the weights as they are; the figures and the ranked sheet. Does not own:
when (`pictures`), the judges (`evaluation`), the order (`pipeline.ranking`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle_torch.config import ScoresConfig
from dalle_torch.evaluation.base import FeatureExtractor, TextImageScorer
from dalle_torch.evaluation.diversity import diversity
from dalle_torch.evaluation.loading import load_features, load_scorer
from dalle_torch.log import get_logger
from dalle_torch.pipeline.output import make_grid, write_png
from dalle_torch.pipeline.ranking import rank
from dalle_torch.training.samples import Drawer, undisturbed

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Who judges the pictures of a run."""

    scorer: TextImageScorer
    extractor: FeatureExtractor | None = None

    def to_json(self) -> dict[str, Any]:
        extractor = None if self.extractor is None else self.extractor.judge.to_json()
        return {"scorer": self.scorer.judge.to_json(), "features": extractor}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What one look at the prompts gave.

    Attributes:
        figures: `score`, the mean over all pictures; `score_best`, the mean over each prompt's best one; `diversity`,
            where there is who measures it.
        images: of one prompt after the other, each prompt's best first.
        captions: score and prompt of each picture.
    """

    figures: dict[str, float]
    images: list[Image.Image]
    captions: list[str]


class PromptScores:
    """Draws the same prompts with the same seeds each time, and has them scored.

    Args:
        judges: None in a process that only takes part in the drawing.
        folder: for `scores-XXXXXXXX.png`, one row a prompt, best first.
    """

    def __init__(self, config: ScoresConfig, drawer: Drawer, judges: Judges | None, folder: Path) -> None:
        self.config, self.judges, self.folder = config, judges, folder
        self._drawer = drawer

    def look(self, step: int) -> Scored | None:
        """Draw with the weights after `step` updates; None in a process without judges.

        Raises:
            ValueError: a score is not finite.
            OSError: the sheet cannot be written.
        """
        config, judges = self.config, self.judges
        output = self._drawer.draw(config)
        if judges is None:
            return None
        output = rank(output, judges.scorer, config.images)
        scores = output.scores
        assert scores is not None, "ranking gives them"
        best = scores[:: config.images]
        figures = {"score": sum(scores) / len(scores), "score_best": sum(best) / len(best)}
        if judges.extractor is not None:
            figures["diversity"] = diversity(judges.extractor.features(output.images).split(config.images))
        captions = [f"{score:.3f} {prompt}" for score, prompt in zip(scores, output.prompts, strict=True)]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_png(
            self.folder / f"scores-{step:08d}.png",
            make_grid(output.images, columns=config.images, labels=captions),
            {"step": step} | asdict(config) | figures | {"scores": scores, "seeds": output.seeds} | judges.to_json(),
        )
        return Scored(figures=figures, images=output.images, captions=captions)


def load_judges(config: ScoresConfig, device: torch.device | None, picture_size: int) -> Judges:
    """The judges of a run, once they have shown on a grey picture that they can judge its prompts.

    Args:
        device: for networks that are worth one; None: the CPU.
        picture_size: pixels of a side.

    Raises:
        OSError: a judge or its library is not there, or cannot be reached.
        ValueError: what is there cannot score, or not these prompts.
    """
    assert config.scorer is not None, "the configuration refuses prompts without one"
    with undisturbed(device or torch.device("cpu")):
        with _naming("scorer", config.scorer):
            scorer = load_scorer(config.scorer, device=device)
        extractor = None
        if config.features is not None:
            with _naming("features", config.features):
                extractor = load_features(config.features, device=device)
        grey = Image.new("RGB", (picture_size, picture_size), "gray")
        try:
            found = scorer.similarities([grey], config.prompts)
        except ValueError as error:
            raise ValueError(f"scores.prompts cannot be scored by scores.scorer={config.scorer}: {error}") from error
    if not found.isfinite().all():
        raise ValueError(f"scores.scorer={config.scorer} gives scores that are no numbers: its weights are damaged")
    judges = Judges(scorer=scorer, extractor=extractor)
    for judge in (scorer.judge, extractor.judge if extractor else None):
        if judge is not None and not judge.standard:
            logger.warning(
                "figures by %s (%s) are not the standard ones: compare them only with figures of the same judge",
                judge.name, judge.source,
            )  # fmt: skip
    return judges


@contextmanager
def _naming(option: str, source: str) -> Iterator[None]:
    """Errors say by which option they came."""
    try:
        yield
    except (ImportError, OSError) as error:
        raise OSError(f"scores.{option}={source}: {error}") from error
    except ValueError as error:
        raise ValueError(f"scores.{option}={source}: {error}") from error
