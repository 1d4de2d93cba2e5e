"""What drawn pictures are compared with: the pictures of a data set, and what the model makes of them.

Owns: one pass over the data: features, reconstruction by the VQGAN, the evaluation loss. Does not own: the data
(`data.captioned`), statistics (`evaluation`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_torch.data.captioned import Captioned, CaptionedData
from dalle_torch.data.text import TextEncoder
from dalle_torch.evaluation.base import CHUNK, FeatureExtractor, TextImageScorer
from dalle_torch.evaluation.distances import FeatureStatistics
from dalle_torch.evaluation.reconstruction import ReconstructionStatistics
from dalle_torch.log import progress
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.pipeline import DallePipeline

SAMPLES_SHOWN = 16


@dataclass
class Reference:
    """A data set, measured.

    Attributes:
        captions: of its samples, the prompts that are drawn.
        features: of its pictures, or of what the VQGAN makes of its codes.
        reconstructed: features of the reconstructions, and their errors; None where the data are codes.
        loss: mean cross entropy of the image tokens under the model.
        score: mean agreement of pictures and captions.
        shown: some of the pictures.
    """

    captions: list[str]
    features: FeatureStatistics
    reconstruction: ReconstructionStatistics | None
    reconstructed: FeatureStatistics | None
    loss: float
    score: float
    shown: list[Image.Image] = field(default_factory=list)
    shown_reconstructed: list[Image.Image] = field(default_factory=list)


@torch.no_grad()
def measure_reference(
    pipe: DallePipeline,
    data: CaptionedData,
    extractor: FeatureExtractor,
    scorer: TextImageScorer,
    limit: int | None,
    *,
    with_model: bool = True,
) -> Reference:
    """Go through the first `limit` samples once.

    Args:
        pipe: its model is not packed yet.
        with_model: the loss and the reconstruction too, which a study of settings does not need.

    Raises:
        OSError, ValueError: as `CaptionedData.samples`, and as the judges.
    """
    text = TextEncoder(pipe.processor)
    features = FeatureStatistics(extractor.dimensions)
    with_pictures = data.kind != "codes"
    reconstruction = ReconstructionStatistics(pipe.vqgan.config.n_embed) if with_model and with_pictures else None
    reconstructed = FeatureStatistics(extractor.dimensions) if reconstruction is not None else None
    found = Reference([], features, reconstruction, reconstructed, 0.0, 0.0)
    losses = scores = 0.0
    for samples in progress(_chunks(data, limit), total=limit and -(-limit // CHUNK), desc="reading", unit="batch"):
        captions = [sample.caption for sample in samples]
        codes, again = _codes(pipe.vqgan, samples, decoded=reconstruction is not None or not with_pictures)
        pictures = again if not with_pictures else [_picture(sample) for sample in samples]
        features.update(extractor.features(pictures))
        scores += sum(scorer.score(pictures, captions))
        found.captions += captions
        room = SAMPLES_SHOWN - len(found.shown)
        found.shown += pictures[:room]
        if with_model:
            losses += float(sample_losses(pipe, text, captions, codes).sum())
        if reconstruction is not None and reconstructed is not None:
            reconstruction.update(_stacked(pictures), _stacked(again), codes)
            reconstructed.update(extractor.features(again))
            found.shown_reconstructed += again[:room]
    found.loss, found.score = losses / len(found.captions), scores / len(found.captions)
    return found


def sample_losses(pipe: DallePipeline, text: TextEncoder, captions: list[str], codes: Tensor) -> Tensor:
    """Cross entropy of each sample's image tokens, float64 [B]; the batch is filled up, so that rounding is its own."""
    ids, mask = (torch.from_numpy(array).long() for array in text.pad(text(captions)))
    device, count = pipe.device, len(captions)
    ids, mask, labels = (_filled(rows).to(device) for rows in (ids, mask, codes))
    logits = pipe.model(input_ids=ids, attention_mask=mask, labels=labels).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)
    return losses[:count].double().mean(dim=1).cpu()


def _chunks(data: CaptionedData, limit: int | None) -> Iterator[tuple[Captioned, ...]]:
    samples = data.samples(limit)
    while chunk := tuple(islice(samples, CHUNK)):
        yield chunk


def _picture(sample: Captioned) -> Image.Image:
    assert sample.picture is not None
    return Image.fromarray(sample.picture)


def _codes(vqgan: VQGAN, samples: tuple[Captioned, ...], decoded: bool) -> tuple[Tensor, list[Image.Image]]:
    """The codes of samples, int64 [B, L] on the CPU, and the pictures that they make."""
    device = next(vqgan.parameters()).device
    if samples[0].codes is not None:
        codes = torch.from_numpy(np.stack([sample.codes for sample in samples if sample.codes is not None]))
    else:
        pixels = vqgan.images_to_pixels([_picture(sample) for sample in samples])
        codes = vqgan.encode(_filled(pixels).to(device)).cpu()[: len(samples)]
    if not decoded:
        return codes, []
    return codes, vqgan.pixels_to_images(vqgan.decode(_filled(codes).to(device)))[: len(samples)]


def _filled(rows: Tensor) -> Tensor:
    """`CHUNK` rows, the last one again where they are fewer: rounding depends on the size of a batch."""
    return torch.cat([rows, rows[-1:].expand(CHUNK - len(rows), *rows.shape[1:])])


def _stacked(pictures: list[Image.Image]) -> Tensor:
    """uint8 [B, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def about_judges(extractor: FeatureExtractor, scorer: TextImageScorer) -> tuple[dict[str, Any], list[str]]:
    """Who judges, and what has to be said of it."""
    judges = {"features": extractor.judge.to_json(), "scorer": scorer.judge.to_json()}
    notices = [
        f"{what} by {judge['name']} ({judge['source']}) is not the standard one: compare it only with figures of the "
        "same judge"
        for what, judge in (("FID and KID", judges["features"]), ("the text-image score", judges["scorer"]))
        if not judge["standard"]
    ]
    return judges, notices
