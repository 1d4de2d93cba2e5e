"""Captioned shapes as input of `encode`, drawn when their turn comes.

Owns: which scenes make which shard. Does not own: what they look like (`synthetic`), encoding (`encode`).
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
from PIL import Image

from dalle_torch.config import ShapesDataConfig
from dalle_torch.data.captions import KeyWatch
from dalle_torch.data.sources import Part, RawSample, Skip
from dalle_torch.shapes.drawing import render
from dalle_torch.shapes.sampling import sample_scenes

_AT_ONCE = 64
"""Scenes that are drawn together."""


@dataclass
class ScenesPart:
    """Scenes `first` to `first + count` of the sequence that `config.seed` names; see `sources.Part`.

    None shows a held-out pair. What captions leave open is drawn at random.
    """

    name: str
    config: ShapesDataConfig
    first: int
    count: int
    position: float = 0.0
    keys: KeyWatch = field(default_factory=lambda: KeyWatch(None))

    @property
    def source(self) -> str:
        return f"captioned shapes {self.first} to {self.first + self.count}"

    @property
    def origin(self) -> str:
        made_with = {key: value for key, value in asdict(self.config).items() if key not in ("scenes", "blank")}
        return f"{self.source} of {hashlib.sha256(repr(sorted(made_with.items())).encode()).hexdigest()[:16]}"

    @property
    def size(self) -> int:
        return self.count

    @property
    def weight(self) -> float:
        return float(self.count)

    def samples(self) -> Iterator[RawSample | Skip]:
        options = self.config
        for start in range(self.first, self.first + self.count, _AT_ONCE):
            number = min(_AT_ONCE, self.first + self.count - start)
            scenes = sample_scenes(
                number,
                options.seed,
                start=start,
                single=options.single,
                leave_out=options.leave_out,
                open_shapes=options.open_shapes,
            )
            pictures = render(scenes, options.seed, start=start)
            for index, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
                yield RawSample(f"{start + index:08d}", _png(picture), scene.caption, {"source": "captioned shapes"})
            self.position = float(start + number - self.first)


def scene_parts(config: ShapesDataConfig, scenes_a_shard: int = 4000) -> list[Part]:
    """All scenes of a pass, in shards."""
    return [
        ScenesPart(f"shapes-{index:05d}", config, first, min(scenes_a_shard, config.scenes - first))
        for index, first in enumerate(range(0, config.scenes, scenes_a_shard))
    ]


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Compression would take longer than drawing.
    Image.fromarray(picture).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
