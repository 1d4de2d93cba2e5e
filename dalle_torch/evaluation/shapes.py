"""What the classifier of shapes says of pictures: agreement with captions, and features.

Owns: `ShapesScorer`, `ShapesFeatures`. Does not own: the network (`shapes.classifier`).

Neither is a standard score; results say so. They are there so that all that is measured with CLIP and Inception can be
tried, and tested, on a small model of shapes without any download.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_torch.evaluation.base import CHUNK, Judge
from dalle_torch.shapes.classifier import ShapesClassifier, agreement
from dalle_torch.shapes.grammar import IMAGE_SIZE, Scene, parse_caption
from dalle_torch.storage import sha256_of


class _Shapes:
    """The network of a folder, fed in chunks of one size."""

    def __init__(self, folder: str | os.PathLike[str], source: str | None = None) -> None:
        self.network = ShapesClassifier.load(folder)
        self._source = source or str(folder)
        self._sha256 = sha256_of(Path(folder) / "model.safetensors")

    @cached_property
    def judge(self) -> Judge:
        settings = {"size": IMAGE_SIZE, "resampling": "bicubic, antialiased, where the size differs"}
        return Judge(name="shapes", source=self._source, sha256=self._sha256, standard=False, settings=settings)

    @torch.no_grad()
    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        parts = []
        for first in range(0, len(images), CHUNK):
            pixels = [_pixels(image) for image in images[first : first + CHUNK]]
            filled = torch.stack([*pixels, *([pixels[-1]] * (CHUNK - len(pixels)))])
            parts.append(self.network.features(filled)[: len(pixels)])
        return torch.cat(parts) if parts else torch.empty(0, self.network.config.features)


class ShapesScorer(_Shapes):
    """Agreement by attributes: the mean probability, over what a caption names, that the picture shows it; in [0, 1].

    Args:
        folder: of `ShapesClassifier.save`.
        source: its name in results; None: the folder.

    Raises:
        OSError, ValueError: there is no such network, or it is damaged.
    """

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One number a picture; of the prompt beside it.

        Raises:
            ValueError: a prompt does not follow the grammar of `shapes.grammar`.
        """
        if not images:
            return []
        scenes = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        table = self._agreement(images, [_scene(prompt) for prompt in scenes])
        return table[torch.arange(len(images)), torch.tensor([scenes[prompt] for prompt in prompts])].tolist()

    def check(self, prompts: Sequence[str]) -> None:
        """Raises as `score` would for these prompts."""
        for prompt in prompts:
            _scene(prompt)

    def similarities(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Of every picture with every prompt, float32 [images, prompts]; raises as `score`."""
        return self._agreement(images, [_scene(prompt) for prompt in prompts])

    @torch.no_grad()
    def _agreement(self, images: Sequence[Image.Image], scenes: list[Scene]) -> Tensor:
        tables = []
        for features in self._features(images).split(CHUNK):
            filled = torch.cat([features, features[-1:].expand(CHUNK - len(features), -1)])
            shares = {name: logits.softmax(dim=1) for name, logits in self.network.logits(filled).items()}
            tables.append(agreement(shares, scenes)[: len(features)])
        return torch.cat(tables)


class ShapesFeatures(_Shapes):
    """The numbers by which the classifier tells pictures apart, float32 [images, 64].

    Args:
        folder: of `ShapesClassifier.save`.
        source: its name in results; None: the folder.

    Raises:
        OSError, ValueError: there is no such network, or it is damaged.
    """

    @property
    def dimensions(self) -> int:
        return self.network.config.features

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """float32 [images, dimensions]."""
        return self._features(images)


def _scene(prompt: str) -> Scene:
    try:
        return parse_caption(prompt)
    except ValueError as error:
        raise ValueError(
            f"the judge of shapes reads captions of shapes alone; a CLIP model reads any: {error}"
        ) from None


def _pixels(image: Image.Image) -> Tensor:
    """float32 [3, 64, 64] in [0, 1]."""
    picture = image.convert("RGB")
    if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
        picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)
