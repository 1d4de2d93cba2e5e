"""Pictures that are drawn once and kept: a study that is broken off, or asks for more, draws only what is missing.

Owns: portions of pictures on disk, what they depend on. Does not own: drawing (`pipeline`), scores (`evaluation`).

A portion holds the pictures of `PORTION` prompts under one setting, in one file that is whole or absent. All settings
are drawn portion by portion, so that each prompt goes through the encoder once.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dalle_torch.data.text import TextEncoder
from dalle_torch.log import get_logger, progress
from dalle_torch.models.drawing_inputs import EncoderCache
from dalle_torch.pipeline import DallePipeline
from dalle_torch.storage import atomic_file

logger = get_logger(__name__)

PORTION = 32
"""Prompts in a file."""
LEAST_BATCH = 8
"""Pictures that a CPU draws together at the least. Products of one or two rows add up in another order than those of
more, and now and then a last digit decides which token is drawn."""

_DIGEST = "sha256"
_NO_MATTER = ("transformers_version", "_name_or_path", "dtype", "architectures", "drawing_condition_scale",
              "drawing_temperature", "use_cache", "gradient_checkpointing", "use_scan")  # fmt: skip
"""Of a configuration: what changes no picture, or is told apart elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How tokens are chosen; see `DrawingOptions`."""

    condition_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __str__(self) -> str:
        text = f"scale {self.condition_scale:g}, temperature {self.temperature:g}"
        text += f", top-k {self.top_k}" if self.top_k else ""
        return text + (f", top-p {self.top_p:g}" if self.top_p else "")


class Drawings(Sequence[Image.Image]):
    """The pictures of all prompts under one setting, read from disk as they are asked for: all of the first prompt
    first."""

    def __init__(self, folder: Path, prompts: Sequence[str], num_images: int) -> None:
        self.folder, self.num_images = folder, num_images
        self.prompts = [prompt for prompt in prompts for _ in range(num_images)]
        """The prompt of each picture."""
        self._loaded: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        portion, row = divmod(index, PORTION * self.num_images)
        if self._loaded is None or self._loaded[0] != portion:
            with safe_open(portion_file(self.folder, portion), "pt") as file:
                if row:
                    # Asked for here and there, not one after the other.
                    return Image.fromarray(file.get_slice("pictures")[row].numpy())
                self._loaded = (portion, file.get_tensor("pictures").numpy())
        return Image.fromarray(self._loaded[1][row])

    def chunks(self, size: int) -> Iterator[tuple[list[Image.Image], list[str]]]:
        """Pictures and their prompts, `size` at a time."""
        for first in range(0, len(self), size):
            yield self[first : first + size], self.prompts[first : first + size]


def portion_file(folder: Path, portion: int) -> Path:
    return folder / f"{portion:06d}.safetensors"


def draw(
    pipe: DallePipeline,
    prompts: Sequence[str],
    settings: Sequence[Setting],
    folder: Path,
    *,
    num_images: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    origin: dict[str, Any] | None = None,
) -> list[Drawings]:
    """Draw what is not there yet.

    Args:
        prompts: the pictures of prompt i have the seeds from `seed + i * num_images` on.
        folder: of all drawings of the study; those of other models, settings or prompts there are left alone.
        num_images: of each prompt.
        batch_size: pictures drawn at once; on the CPU it makes no difference to them, and is `LEAST_BATCH` or more.
        origin: what `origin_of` said of the pipeline before it was packed; None: it was not, or was read from weights.

    Returns:
        The pictures under each setting.

    Raises:
        OSError: the folder cannot be written.
        ValueError: a setting is out of range.
    """
    origin = origin or origin_of(pipe)
    folders = [folder / _digest(origin, prompts, setting, num_images, seed) for setting in settings]
    missing = _missing(folders, len(prompts), num_images)
    if pipe.device.type == "cpu" and batch_size is not None:
        batch_size = max(batch_size, LEAST_BATCH)
    for place, setting in zip(folders, settings, strict=True):
        about = {"origin": origin, "setting": asdict(setting), "num_images": num_images, "seed": seed}
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "about.json").is_file():
            with atomic_file(place / "about.json") as path:
                path.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    pipe.encoder_cache = EncoderCache(2 * PORTION)
    try:
        for portion, number in progress(missing, desc="drawing", unit="portion"):
            first = portion * PORTION
            some = list(prompts[first : first + PORTION])
            seeds = [seed + (first + row) * num_images for row in range(len(some))]
            output = pipe(
                some, num_images=num_images, seed=seeds, batch_size=batch_size, progress=False,
                **asdict(settings[number]),
            )  # fmt: skip
            pictures = torch.from_numpy(np.stack([np.asarray(image) for image in output.images]))
            tensors = {"pictures": pictures, "codes": output.tokens.int()}
            with atomic_file(portion_file(folders[number], portion)) as path:
                path.write_bytes(save(tensors, metadata={_DIGEST: _content_hash(tensors)}))
    finally:
        pipe.encoder_cache = None
    return [Drawings(place, prompts, num_images) for place in folders]


def origin_of(pipe: DallePipeline) -> dict[str, Any]:
    """What decides a picture beside its prompt, setting and seed."""
    config = {name: value for name, value in pipe.model.config.to_dict().items() if name not in _NO_MATTER}
    return {
        "model": pipe.model_hash or module_hash(pipe.model),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "text": TextEncoder(pipe.processor).fingerprint,
        "vqgan": module_hash(pipe.vqgan),
        "dtype": str(pipe.model.dtype).removeprefix("torch."),
        "device": pipe.device.type,
    }


def module_hash(module: nn.Module) -> str:
    """Of the values of all parameters and buffers, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{total.hexdigest()}"


def _digest(origin: dict[str, Any], prompts: Sequence[str], setting: Setting, num_images: int, seed: int) -> str:
    parts = [origin, list(prompts), asdict(setting), num_images, seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _missing(folders: Sequence[Path], prompts: int, num_images: int) -> list[tuple[int, int]]:
    """(portion, index of the folder) of all that is to be drawn, portion by portion."""
    missing, damaged = [], []
    for portion in range(-(-prompts // PORTION)):
        pictures = min(PORTION, prompts - portion * PORTION) * num_images
        for number, folder in enumerate(folders):
            path = portion_file(folder, portion)
            if not path.is_file():
                missing.append((portion, number))
            elif not _is_whole(path, pictures):
                missing.append((portion, number))
                damaged.append(path)
    if damaged:
        logger.warning(
            "%d of the files with pictures that were kept are damaged, the first is %s: their pictures are drawn again",
            len(damaged), damaged[0],
        )  # fmt: skip
    return missing


def _is_whole(path: Path, pictures: int) -> bool:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("pictures", "codes")}
            found = (file.metadata() or {}).get(_DIGEST)
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        logger.debug("%s: %s", path, error)
        return False
    return len(tensors["pictures"]) == pictures and found == _content_hash(tensors)


def _content_hash(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {list(tensor.shape)}".encode())
        total.update(np.ascontiguousarray(tensor.numpy()).data)
    return total.hexdigest()
