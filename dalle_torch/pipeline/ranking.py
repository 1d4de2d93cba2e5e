"""Which picture shows its prompt best, by CLIP (arXiv 2103.00020), as the first DALL·E was ranked (arXiv 2102.12092).

Owns: scores of (picture, prompt) and the order they give. Does not own: scores of data sets (`evaluation`).
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle_torch.pipeline.output import DallePipelineOutput
from dalle_torch.storage import WEIGHT_FORMATS, resolve_model


class ClipRanker:
    """Cosine similarities by any two-tower model of transformers: CLIP, SigLIP, ChineseCLIP, ALIGN, ...

    Args:
        model: has `get_text_features` and `get_image_features`.
        processor: its processor, for text and images.

    Raises:
        ValueError: the model has no such towers.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise ValueError(
                f"rank_with needs a model with a text and an image tower such as CLIP, got {type(model).__name__}"
            )
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **hub_options: Any) -> "ClipRanker":
        """Load model and processor.

        Args:
            source: hub id, folder, wandb artifact or URL; its weights are safetensors, since others are pickles.
            hub_options: of `storage.resolve_model`.

        Raises:
            OSError: the source, or safetensors in it, is not there or cannot be reached.
            ValueError: it is no model of two towers, or one that transformers does not know.
        """
        from transformers import AutoModel, AutoProcessor

        folder = resolve_model(source, weight_formats=WEIGHT_FORMATS[:2], **hub_options)
        try:
            model = AutoModel.from_pretrained(folder, use_safetensors=True)
            return cls(model, AutoProcessor.from_pretrained(folder))
        except (OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{source} cannot rank, it is no CLIP of transformers, or damaged: {reason}") from error

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], batch_size: int = 32) -> list[float]:
        """Cosine similarity of each picture with the prompt beside it; one float a picture, in [-1, 1]."""
        unique = list(dict.fromkeys(prompts))
        texts = torch.cat([self._texts(unique[i : i + batch_size]) for i in range(0, len(unique), batch_size)])
        pictures = torch.cat([self._images(images[i : i + batch_size]) for i in range(0, len(images), batch_size)])
        rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=texts.device)
        return (texts[rows] * pictures).sum(dim=-1).tolist()

    def _texts(self, prompts: list[str]) -> Tensor:
        # Towers such as SigLIP's are trained on texts padded to the full length; CLIP's do not mind.
        length = getattr(getattr(self.model.config, "text_config", None), "max_position_embeddings", None)
        padding: dict[str, Any] = {"padding": "max_length", "max_length": length} if length else {"padding": True}
        inputs = self.processor(text=prompts, return_tensors="pt", truncation=True, **padding)
        return _unit(self.model.get_text_features(**inputs.to(self.model.device)))

    def _images(self, images: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        return _unit(self.model.get_image_features(pixel_values=inputs["pixel_values"].to(self.model.dtype)))


def rank(
    output: DallePipelineOutput, ranker: ClipRanker, num_images: int, num_best: int | None = None
) -> DallePipelineOutput:
    """Each prompt's `num_images` pictures best first, cut to `num_best`, with their scores."""
    scores = ranker.score(output.images, output.prompts)
    order = [
        row
        for first in range(0, len(scores), num_images)
        for row in sorted(range(first, first + num_images), key=lambda row: -scores[row])[:num_best]
    ]
    return replace(
        output,
        images=[output.images[row] for row in order],
        prompts=[output.prompts[row] for row in order],
        seeds=[output.seeds[row] for row in order],
        tokens=output.tokens[order],
        scores=[scores[row] for row in order],
        withheld=[output.withheld[row] for row in order],
    )


def _unit(features: Any) -> Tensor:
    # transformers 5 returns the tower's whole output, transformers 4 the projected features alone.
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)
