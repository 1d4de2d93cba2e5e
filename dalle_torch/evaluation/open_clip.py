"""How well a picture shows a text, by a model of open_clip.

Owns: its architecture and file by name, its features. Does not own: cosine similarities (`clip`).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle_torch.evaluation.base import CHUNK, Judge
from dalle_torch.evaluation.clip import TwoTowerScorer
from dalle_torch.storage import sha256_of


class OpenClipScorer(TwoTowerScorer):
    """Cosine similarities by a model of open_clip.

    Args:
        model: has `encode_text` and `encode_image`.
        preprocess: a picture to a tensor.
        tokenizer: texts to ids.
        judge: how it is named in results.
        filled: see `TwoTowerScorer`.
    """

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, judge: Judge, filled: bool = True) -> None:
        super().__init__(judge, filled)
        self.model, self.preprocess, self.tokenizer = model.eval(), preprocess, tokenizer

    @classmethod
    def from_name(cls, name: str, *, filled: bool = True, device: torch.device | str | None = None) -> "OpenClipScorer":
        """Load a model.

        Args:
            name: "ARCHITECTURE:FILE", such as "ViT-B-32:weights/vit-b-32.safetensors".
            filled: see `TwoTowerScorer`.

        Raises:
            ImportError: open_clip is not installed.
            OSError: the file is not there.
            ValueError: there is no such architecture, or the file is of another one.
        """
        try:
            import open_clip
        except ImportError as error:
            raise ImportError("models of open_clip need it: pip install 'dalle-torch[eval]'") from error
        architecture, _, file = name.partition(":")
        if architecture not in open_clip.list_models():
            raise ValueError(
                f"open_clip has no architecture {architecture!r}: write open_clip:ARCHITECTURE:FILE, with one of "
                "open_clip.list_models()"
            )
        path = Path(file).expanduser()
        if not file or not path.is_file():
            raise OSError(
                f"open_clip:{name}: there is no file of weights {file or '(none is named)'}; fetch open_clip_model."
                "safetensors of the model from the hub and name it after the architecture"
            )
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=os.fspath(path), device=device or "cpu", weights_only=True
            )
            tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} holds no weights of {architecture}, or damaged ones: {reason}") from error
        settings = {"transform": str(preprocess)}
        judge = Judge(name="open_clip", source=name, sha256=sha256_of(path), standard=True, settings=settings)
        return cls(model, preprocess, tokenizer, judge, filled)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def _texts(self, prompts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(prompts)).to(self.device))

    @torch.no_grad()
    def _images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in images[:CHUNK]])
        return self.model.encode_image(pixels.to(self.device))
