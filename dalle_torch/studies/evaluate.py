"""What a model is worth, by one protocol: loss, FID and KID, agreement with captions, diversity, its VQGAN.

Owns: the order of the measurements, the result, its page. Does not own: the figures (`evaluation`), the pictures
(`drawings`, `reference`).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dalle_torch.data.captioned import CaptionedData
from dalle_torch.evaluation.base import CHUNK, FeatureExtractor, TextImageScorer
from dalle_torch.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance, too_few
from dalle_torch.evaluation.diversity import diversity
from dalle_torch.evaluation.protocol import PROTOCOL, environment, write_result
from dalle_torch.evaluation.retrieval import CANDIDATES, retrieval_accuracy
from dalle_torch.log import progress
from dalle_torch.models.packing import can_pack
from dalle_torch.pipeline import DallePipeline
from dalle_torch.reports.html import Page
from dalle_torch.studies.drawings import Drawings, Setting, draw, origin_of
from dalle_torch.studies.reference import Reference, about_data, about_judges, measure_reference

RESULT, PAGE = "evaluation.json", "report.html"
_SHOWN = 32


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is drawn, and how much.

    Attributes:
        limit: samples of the data; their captions are the prompts. None: all.
        num_images: pictures of each prompt; two or more have a diversity.
        seed: of the first picture.
        batch_size: pictures drawn at once; it makes no difference to the figures.
    """

    limit: int | None = 1000
    num_images: int = 1
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if (self.limit is not None and self.limit < 2) or self.num_images < 1:
            raise ValueError(f"limit={self.limit} must be at least 2, and num_images={self.num_images} at least 1")


def evaluate(
    pipe: DallePipeline,
    data: CaptionedData,
    extractor: FeatureExtractor,
    scorer: TextImageScorer,
    setting: Setting,
    options: EvaluationOptions,
    folder: Path,
) -> dict[str, Any]:
    """Measure a model and write `evaluation.json` and `report.html` into `folder`; pictures are kept there too.

    Returns:
        The result. What may differ from one run to the next is in its "run" alone.

    Raises:
        ImportError: torchmetrics is not installed.
        OSError, ValueError: as data, judges and pictures.
    """
    started = time.monotonic()
    origin = origin_of(pipe)
    reference = measure_reference(pipe, data, extractor, scorer, options.limit)
    read = time.monotonic()
    if can_pack(pipe.model):
        pipe.pack()
    (drawings,) = draw(
        pipe, reference.captions, [setting], folder / "drawings",
        num_images=options.num_images, seed=options.seed, batch_size=options.batch_size,
        origin=origin,
    )  # fmt: skip
    drawn = time.monotonic()
    scores, notices = score_drawings(drawings, reference.features, extractor, scorer)
    scores |= {"evaluation_loss": reference.loss, "text_image_score_of_data": reference.score}
    judges, warnings = about_judges(extractor, scorer)
    warnings += about_data(data)
    result: dict[str, Any] = {
        "model": origin | {"source": str(pipe.source or "unnamed")},
        "data": data.describe() | {"samples": len(reference.captions), "sha256": reference.sha256},
        "setting": asdict(setting),
        "pictures": {"count": len(drawings), "of_each_prompt": options.num_images, "seed": options.seed},
        "judges": judges,
        "scores": scores,
        "vqgan": _reconstruction(reference),
        "notices": warnings + notices,
    }
    result["run"] = {
        "environment": environment(),
        "seconds": {
            "reading": round(read - started, 1),
            "drawing": round(drawn - read, 1),
            "scoring": round(time.monotonic() - drawn, 1),
        },
    }
    write_result(folder / RESULT, result)
    _page(result, reference, drawings).save(folder / PAGE)
    return result


def score_drawings(
    drawings: Drawings, reference: FeatureStatistics, extractor: FeatureExtractor, scorer: TextImageScorer
) -> tuple[dict[str, float | None], list[str]]:
    """All figures of drawn pictures, and what has to be said of them.

    Args:
        reference: features of the pictures they are compared with.
    """
    features = FeatureStatistics(extractor.dimensions)
    total, groups = 0.0, _Groups(drawings.num_images)
    # A chunk of whole prompts, so that features are at hand for diversity; judges cut it up as they like.
    size = CHUNK * drawings.num_images
    for images, prompts in progress(
        drawings.chunks(size), total=-(-len(drawings) // size), desc="scoring", unit="batch"
    ):
        found = extractor.features(images)
        features.update(found)
        groups.add(found)
        total += sum(scorer.score(images, prompts))
    if not math.isfinite(total):
        raise ValueError(f"{scorer.judge.name} ({scorer.judge.source}) gave scores that are no numbers: its weights "
                         "are damaged, or its dtype is too narrow; the pictures are kept")  # fmt: skip
    mean, deviation = kernel_distance(features, reference)
    different = len(set(drawings.prompts)) > 1
    scores: dict[str, float | None] = {
        "fid": frechet_distance(features, reference),
        "kid": mean,
        "kid_deviation": deviation,
        "text_image_score": total / len(drawings),
        "retrieval_accuracy": retrieval_accuracy(scorer, drawings, drawings.prompts) if different else None,
        "diversity": groups.diversity() if drawings.num_images > 1 else None,
    }
    return scores, [reason for reason in (too_few(features), too_few(reference)) if reason]


class _Groups:
    """The mean diversity of prompts, without keeping features."""

    def __init__(self, size: int) -> None:
        self.size, self.total, self.count = size, 0.0, 0

    def add(self, features: Tensor) -> None:
        if self.size > 1:
            for group in features.split(self.size):
                self.total += diversity([group])
                self.count += 1

    def diversity(self) -> float:
        return self.total / self.count


def _reconstruction(reference: Reference) -> dict[str, Any]:
    """Of the VQGAN: of codes alone, no more than how they use the codebook."""
    assert reference.reconstruction is not None
    if reference.reconstructed is None:
        return reference.reconstruction.codebook()
    fid = frechet_distance(reference.reconstructed, reference.features)
    return reference.reconstruction.result() | {"fid": fid}


EXPLAINED = {
    "evaluation_loss": "cross entropy of the image tokens, nats a token; less is better",
    "fid": "Fréchet distance of features; less is better",
    "kid": "kernel distance of features; less is better, around 0 for equal distributions",
    "kid_deviation": "of the kernel distance over its subsets",
    "text_image_score": "agreement of picture and prompt; more is better",
    "text_image_score_of_data": "the same of the data's own pictures",
    "retrieval_accuracy": f"share of pictures that find their prompt among {CANDIDATES}; more is better",
    "diversity": "mean distance of features of pictures of one prompt; more is wilder",
}
"""What each score is."""


def score_rows(scores: dict[str, float | None]) -> list[tuple[str, float | None, str]]:
    """Name, value and meaning of each score, in the order of `EXPLAINED`."""
    return [(name, scores[name], meaning) for name, meaning in EXPLAINED.items() if scores.get(name) is not None]


def _page(result: dict[str, Any], reference: Reference, drawings: Drawings) -> Page:
    page = Page(f"Evaluation of {result['model']['source']}", f"protocol {PROTOCOL}")
    for notice in result["notices"]:
        page.notice(notice)
    page.heading("Scores")
    page.table(["score", "value", "meaning"], score_rows(result["scores"]))
    page.heading("The VQGAN")
    page.table(["figure", "value"], list(result["vqgan"].items()))
    page.heading("Drawn")
    _gallery(page, drawings[:_SHOWN], drawings.prompts[:_SHOWN])
    page.heading("Data" if result["data"]["kind"] != "codes" else "Data, as the VQGAN decodes them")
    _gallery(page, reference.shown, reference.captions[: len(reference.shown)])
    if reference.shown_reconstructed:
        page.heading("The same after VQGAN")
        _gallery(page, reference.shown_reconstructed, reference.captions[: len(reference.shown_reconstructed)])
    page.heading("How it was measured")
    page.facts({name: result[name] for name in ("model", "data", "setting", "pictures", "judges", "run")})
    return page


def _gallery(page: Page, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
    page.gallery(images, captions, width=max(96, min(160, images[0].width)))
