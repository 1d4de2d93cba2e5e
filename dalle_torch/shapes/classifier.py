"""A small network that says what a picture of shapes shows: the judge of this project's own small model.

It is to `evaluation` what CLIP and Inception are for photographs: its probabilities are the agreement of picture and
caption, and its features are what the Fréchet distance compares. It is not the standard of anything; unlike `checker`,
which says right or wrong, it says how much, and it looks at a whole picture at once.

Owns: the network, its labels, its files. Does not own: how it is trained (`training.shapes_judge`), scores
(`evaluation.shapes`).

A scene in labels: a layout (one of nine places, two parts beside or above each other, or none of these), a background,
and for the first and the second part a colour, a shape (the irregular one is a class of its own) and a size. The first
part of two is the left or the upper one, whatever the caption names first. `IGNORED` is what does not apply.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dalle_torch.shapes.grammar import BACKGROUNDS, COLORS, OPEN_SHAPE, PLACES, SHAPES, SIZES, Part, Scene
from dalle_torch.storage import atomic_folder

IGNORED: Final = -100
"""The label of what cannot be said, as torch's cross entropy has it."""

CLASSES: Final[Mapping[str, tuple[str, ...]]] = {
    "layout": (*PLACES, "beside", "stacked", "none"),
    "background": tuple(BACKGROUNDS),
    **{
        f"{name}_{slot}": classes
        for slot in range(2)
        for name, classes in (("color", tuple(COLORS)), ("shape", (*SHAPES, OPEN_SHAPE)), ("size", tuple(SIZES)))
    },
}
"""The heads of the network and what each chooses from."""

BROKEN: Final = {name: classes.index("none") if name == "layout" else IGNORED for name, classes in CLASSES.items()}
"""The labels of a picture that shows no scene at all."""

_TYPE = "shapes_classifier"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Sizes of the network.

    Attributes:
        channels: of the four convolutions, each of which halves the picture's side.
        features: numbers that stand for a picture.
    """

    channels: tuple[int, ...] = (24, 48, 64, 64)
    features: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if len(self.channels) != 4 or min(*self.channels, self.features) < 1:
            raise ValueError(f"channels={self.channels} must be four numbers, and features={self.features} at least 1")


class ShapesClassifier(nn.Module):
    """Pictures of 64 x 64 to features, and those to the classes of every head."""

    def __init__(self, config: ClassifierConfig | None = None) -> None:
        super().__init__()
        self.config = config or ClassifierConfig()
        layers: list[nn.Module] = []
        before = 3
        for width in self.config.channels:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * before, self.config.features), nn.ReLU())
        self.register_buffer("feature_scale", torch.ones(()))
        self.heads = nn.ModuleDict({name: nn.Linear(self.config.features, len(c)) for name, c in CLASSES.items()})

    feature_scale: Tensor

    def features(self, pixels: Tensor) -> Tensor:
        """float32 [B, 3, 64, 64] in [0, 1] to [B, features], whose mean square is 1 over pictures of shapes."""
        return self.trunk(2 * pixels - 1) / self.feature_scale

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """What `features` gave to the logits of each head, [B, classes]."""
        return {name: head(features * self.feature_scale) for name, head in self.heads.items()}

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """The logits of each head, [B, classes], of pixels as `features` takes them."""
        return self.logits(self.features(pixels))

    @torch.no_grad()
    def scale_features(self, pixels: Tensor) -> None:
        """Bring the mean square of the features to 1 over these pictures; logits stay as they are."""
        self.feature_scale.fill_(1.0)
        self.feature_scale.copy_(self.features(pixels).square().mean().sqrt().clamp(min=1e-6))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write configuration and weights; a folder that was there is replaced, whole or not at all."""
        with atomic_folder(folder) as target:
            about = {"type": _TYPE} | asdict(self.config)
            (target / _CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            # safetensors' own writer would make a file that nobody else may read.
            tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
            (target / _WEIGHTS).write_bytes(save(tensors))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ShapesClassifier":
        """The network of a folder that `save` wrote, ready to judge.

        Raises:
            OSError: a file is missing.
            ValueError: it is another network, or damaged.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            if about.pop("type", None) != _TYPE:
                raise ValueError("it is another network's")
            network = cls(ClassifierConfig(**about))
            network.load_state_dict(load_file(folder / _WEIGHTS))
        except OSError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{folder} holds no classifier of shapes, or a damaged one: {reason}") from error
        return network.eval()


def is_classifier(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it holds a classifier of shapes."""
    try:
        about = json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and about.get("type") == _TYPE


def labels_of(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """What each head should say of each scene, int64 [scenes]; `IGNORED` is what the caption leaves open."""
    rows = [{name: _index(name, value) for name, value in named_attributes(scene).items()} for scene in scenes]
    return {name: torch.tensor([row.get(name, IGNORED) for row in rows]) for name in CLASSES}


def named_attributes(scene: Scene) -> dict[str, str]:
    """What a caption says, by head. A single part without a place has no entry "layout"."""
    found: dict[str, str] = {}
    parts: tuple[Part, ...] = scene.parts
    if scene.relation is None:
        if scene.place is not None:
            found["layout"] = scene.place
    else:
        found["layout"] = "beside" if scene.relation in ("to the left of", "to the right of") else "stacked"
        if scene.relation in ("to the right of", "below"):
            parts = parts[::-1]
    if scene.background is not None:
        found["background"] = scene.background
    for slot, part in enumerate(parts):
        found[f"color_{slot}"] = part.color
        found[f"shape_{slot}"] = part.shape or OPEN_SHAPE
        # How large an irregular shape is does not show: it may fill little of its bounding box.
        if part.size is not None and part.shape is not None:
            found[f"size_{slot}"] = part.size
    return found


def agreement(probabilities: Mapping[str, Tensor], scenes: Sequence[Scene]) -> Tensor:
    """How much of each caption each picture shows: the mean over the attributes that the caption names.

    Args:
        probabilities: of each head, [pictures, classes].

    Returns:
        float32 [pictures, scenes] in [0, 1].
    """
    columns = []
    for scene in scenes:
        said = named_attributes(scene)
        shares = [probabilities[name][:, _index(name, value)] for name, value in said.items()]
        if "layout" not in said:
            shares.append(probabilities["layout"][:, : len(PLACES)].sum(dim=1))
        columns.append(torch.stack(shares).mean(dim=0))
    return torch.stack(columns, dim=1)


def _index(name: str, value: str) -> int:
    return CLASSES[name].index(value)
