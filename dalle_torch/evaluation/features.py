"""Features of Inception v3, by which FID and KID are commonly computed.

Owns: finding the weights, the size pictures are brought to. Does not own: the network, which is torch-fidelity's
rebuilding of TensorFlow's of 2015, nor distances (`distances`).

How pictures are resized decides the figure (Parmar et al., arXiv 2104.11222): here always by Pillow's bicubic filter,
which smooths where it shrinks, to 299 x 299 bytes; the network then gets the size it wants and resizes nothing itself.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_torch.evaluation.base import CHUNK, Judge
from dalle_torch.storage import sha256_of

SIZE = 299
DIMENSIONS = 2048
RESAMPLING = f"Pillow bicubic, antialiased, to {SIZE} x {SIZE} bytes"

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
_HASH = WEIGHTS_FILE.removesuffix(".pth").rsplit("-", 1)[1]


class InceptionFeatures:
    """The 2048 numbers before Inception's last layer.

    Args:
        weights: a file of torch-fidelity's weights; None: from torch's cache, and into it by a download.
        device: where the network runs; None: the CPU.

    Raises:
        ImportError: torch-fidelity is not installed.
        OSError: the file is not there, or cannot be downloaded; says what to fetch and where to put it.
        ValueError: the file holds something else.
    """

    dimensions = DIMENSIONS

    def __init__(
        self, weights: str | os.PathLike[str] | None = None, *, device: torch.device | str | None = None
    ) -> None:
        network = _network_class()
        self._weights = _cached_weights() if weights is None else Path(weights).expanduser()
        self._source = "inception" if weights is None else str(weights)
        self._network = _load(network, self._weights).to(device or "cpu")
        self._device = torch.device(device or "cpu")

    @cached_property
    def judge(self) -> Judge:
        sha256 = sha256_of(self._weights)
        # torch-fidelity names the file by the hash of what everybody uses.
        standard = sha256.startswith(_HASH)
        settings = {"layer": str(DIMENSIONS), "size": SIZE, "resampling": RESAMPLING}
        return Judge(name="inception-v3", source=self._source, sha256=sha256, standard=standard, settings=settings)

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """float32 [images, 2048], on the CPU."""
        parts = []
        for first in range(0, len(images), CHUNK):
            pixels = [_pixels(image) for image in images[first : first + CHUNK]]
            filled = torch.stack([*pixels, *([pixels[-1]] * (CHUNK - len(pixels)))]).to(self._device)
            parts.append(self._network(filled)[0][: len(pixels)].float().cpu())
        return torch.cat(parts) if parts else torch.empty(0, DIMENSIONS)


def _network_class() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("FID by Inception needs torch-fidelity: pip install 'dalle-torch[eval]'") from error
    return FeatureExtractorInceptionV3


def _cached_weights() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=_HASH)
        except (OSError, URLError, RuntimeError) as error:
            raise OSError(
                f"Inception's weights are not in torch's cache and cannot be downloaded ({error}): fetch {WEIGHTS_URL} "
                f"where there is a network and put it at {path}, or name the file instead of 'inception'; 'shapes' "
                "needs no download"
            ) from error
    return path


def _load(network: Any, path: Path) -> Any:
    if not path.is_file():
        raise OSError(f"{path} is not there: it should be {WEIGHTS_FILE} of {WEIGHTS_URL}, or 'inception' or 'shapes'")
    try:
        # torch-fidelity would unpickle anything; what torch reads with weights alone allowed is harmless.
        torch.load(path, map_location="meta", weights_only=True)
        return network("inception-v3-compat", [str(DIMENSIONS)], feature_extractor_weights_path=str(path))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not hold Inception's weights as {WEIGHTS_URL} does: {reason}") from error


def _pixels(image: Image.Image) -> Tensor:
    """uint8 [3, 299, 299]."""
    picture = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
