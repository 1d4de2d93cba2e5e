"""Judges by name: the embedded ones, CLIP models, Inception.

Owns: which name means which judge. Does not own: the judges.
"""

import os
from typing import Any

import torch

from dalle_torch.evaluation.base import FeatureExtractor, TextImageScorer
from dalle_torch.shapes.classifier import is_classifier
from dalle_torch.storage.embedded import EMBEDDED

OPEN_CLIP = "open_clip:"
INCEPTION = "inception"
_JUDGE = "judge"
"""The folder inside a model of shapes that has its classifier."""


def load_scorer(
    source: str | os.PathLike[str],
    *,
    filled: bool = True,
    device: torch.device | str | None = None,
    **hub_options: Any,
) -> TextImageScorer:
    """Who says how well a picture shows a text.

    Args:
        source: "shapes", the judge of the embedded model, or a folder with such a judge; a CLIP model of transformers
            (hub id, folder, artifact, URL); or "open_clip:ARCHITECTURE:FILE" for a file of open_clip.
        filled: scores are the same to the last digit whatever is scored together (see `ClipScorer`).
        device: for CLIP models; the judge of shapes is too small to be worth one.
        hub_options: of `storage.resolve_model`.

    Raises:
        ImportError: open_clip is not installed.
        OSError: weights are not there or cannot be reached.
        ValueError: what is there cannot score.
    """
    folder = shapes_judge(source)
    if folder is not None:
        from dalle_torch.evaluation.shapes import ShapesScorer

        return ShapesScorer(folder, str(source))
    name = str(source)
    if name.startswith(OPEN_CLIP):
        from dalle_torch.evaluation.open_clip import OpenClipScorer

        return OpenClipScorer.from_name(name.removeprefix(OPEN_CLIP), filled=filled, device=device)
    if "/" not in name and not os.path.exists(os.path.expanduser(name)):
        raise ValueError(
            f"there is no judge {name!r}: take shapes, a CLIP model's hub id (such as openai/clip-vit-large-patch14), "
            "its folder, or open_clip:ARCHITECTURE:FILE"
        )
    from dalle_torch.evaluation.clip import ClipScorer

    scorer = ClipScorer.from_pretrained(source, filled=filled, **hub_options)
    if device is not None:
        scorer.model.to(device)
    return scorer


def load_features(source: str | os.PathLike[str], *, device: torch.device | str | None = None) -> FeatureExtractor:
    """Who turns pictures into the numbers that FID and KID compare.

    Args:
        source: "shapes", or a folder with a judge of shapes; "inception", by the weights of torch-fidelity in torch's
            cache, else downloaded into it; or a file of those weights.

    Raises:
        ImportError: torch-fidelity is not installed.
        OSError: weights are not there or cannot be reached; says what to fetch and where to put it.
        ValueError: the file holds something else.
    """
    folder = shapes_judge(source)
    if folder is not None:
        from dalle_torch.evaluation.shapes import ShapesFeatures

        return ShapesFeatures(folder, str(source))
    from dalle_torch.evaluation.features import InceptionFeatures

    return InceptionFeatures(None if str(source) == INCEPTION else source, device=device)


def shapes_judge(source: str | os.PathLike[str]) -> str | None:
    """The folder of the classifier that `source` means: a name, its own folder, or that of a model with one."""
    name = str(source)
    folder = str(EMBEDDED[name]) if name in EMBEDDED else name
    for candidate in (os.path.join(folder, _JUDGE), folder):
        if is_classifier(candidate):
            return candidate
    return None
