"""How well a picture shows a text, by CLIP (arXiv 2103.00020).

Owns: `TwoTowerScorer`, and `ClipScorer` for models of transformers. Does not own: the order that scores give
(`pipeline.ranking`), scores of data sets (`data.scoring`).
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from dalle_torch.evaluation.base import CHUNK, Judge
from dalle_torch.storage import WEIGHT_FORMATS, resolve_model, sha256_of

_T = TypeVar("_T")


class TwoTowerScorer:
    """Cosine similarities of what a text tower and an image tower say.

    Args:
        judge: how it is named in results.
        filled: fill each batch up to `base.CHUNK`, so that scores are the same to the last digit whatever is scored
            together; ranking a few pictures does without.
    """

    def __init__(self, judge: Judge, filled: bool) -> None:
        self.judge, self.filled = judge, filled

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Cosine similarity of each picture with the prompt beside it; one float a picture, in [-1, 1]."""
        texts, rows = self._unique_texts(prompts)
        return (texts[rows] * self.image_features(images)).sum(dim=-1).tolist()

    def similarities(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Cosine similarity of every picture with every prompt, float32 [images, prompts]."""
        texts, rows = self._unique_texts(prompts)
        return (self.image_features(images) @ texts.T)[:, rows].cpu()

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Of length 1, float32 [prompts, D]."""
        return self._unit_features(self._texts, prompts)

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Of length 1, float32 [images, D]."""
        return self._unit_features(self._images, images)

    def _unique_texts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.text_features(list(unique))
        return texts, torch.tensor([unique[prompt] for prompt in prompts], device=texts.device)

    def _unit_features(self, tower: Callable[[list[_T]], Tensor], items: Sequence[_T]) -> Tensor:
        parts = []
        for first in range(0, len(items), CHUNK):
            chunk = list(items[first : first + CHUNK])
            filled = [*chunk, *([chunk[-1]] * (CHUNK - len(chunk) if self.filled else 0))]
            parts.append(torch.nn.functional.normalize(tower(filled).float(), dim=-1)[: len(chunk)])
        return torch.cat(parts)

    def _texts(self, prompts: list[str]) -> Tensor:
        """[prompts, D] of any length."""
        raise NotImplementedError

    def _images(self, images: list[Image.Image]) -> Tensor:
        """[images, D] of any length."""
        raise NotImplementedError


class ClipScorer(TwoTowerScorer):
    """Cosine similarities by any two-tower model of transformers: CLIP, SigLIP, ChineseCLIP, ALIGN, ...

    Args:
        model: has `get_text_features` and `get_image_features`.
        processor: its processor, for text and images.
        judge: how it is named in results; None: an unnamed object.
        filled: see `TwoTowerScorer`.

    Raises:
        ValueError: the model has no such towers.
    """

    def __init__(self, model: Any, processor: Any, judge: Judge | None = None, filled: bool = False) -> None:
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise ValueError(
                f"rank_with needs a model with a text and an image tower such as CLIP, got {type(model).__name__}"
            )
        super().__init__(judge or Judge(name="clip", source=type(model).__name__, sha256=None, standard=False), filled)
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, filled: bool = False, **hub_options: Any
    ) -> "ClipScorer":
        """Load model and processor.

        Args:
            source: hub id, folder, wandb artifact or URL; its weights are safetensors, since others are pickles.
            filled: see `TwoTowerScorer`.
            hub_options: of `storage.resolve_model`.

        Raises:
            OSError: the source, or safetensors in it, is not there or cannot be reached.
            ValueError: it is no model of two towers, or one that transformers does not know.
        """
        from transformers import AutoModel, AutoProcessor

        folder = resolve_model(source, weight_formats=WEIGHT_FORMATS[:2], **hub_options)
        try:
            # Weights that were saved in half precision judge in float32 as all others do.
            model = AutoModel.from_pretrained(folder, use_safetensors=True).float()
            scorer = cls(model, AutoProcessor.from_pretrained(folder), filled=filled)
        except (OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{source} cannot rank, it is no CLIP of transformers, or damaged: {reason}") from error
        scorer.judge = Judge(name="clip", source=str(source), sha256=_hash(Path(folder)), standard=True)
        return scorer

    @torch.no_grad()
    def _texts(self, prompts: list[str]) -> Tensor:
        # Towers such as SigLIP's are trained on texts padded to the full length; CLIP's do not mind.
        length = getattr(getattr(self.model.config, "text_config", None), "max_position_embeddings", None)
        padding: dict[str, Any] = {"padding": "max_length", "max_length": length} if length else {"padding": True}
        inputs = self.processor(text=prompts, return_tensors="pt", truncation=True, **padding)
        return _projected(self.model.get_text_features(**inputs.to(self.model.device)))

    @torch.no_grad()
    def _images(self, images: list[Image.Image]) -> Tensor:
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        return _projected(self.model.get_image_features(pixel_values=inputs["pixel_values"].to(self.model.dtype)))


def _hash(folder: Path) -> str:
    """Of all weights in a folder, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(sha256_of(path).encode())
    return total.hexdigest()


def _projected(features: Any) -> Tensor:
    # transformers 5 returns the tower's whole output, transformers 4 the projected features alone.
    return features if isinstance(features, Tensor) else features.pooler_output
