"""What `DallePipeline` gives back, and how it lands on disk.

Owns: `DallePipelineOutput`, PNG metadata, file names, contact sheets. Does not own: how pictures are made (`pipeline`).
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dalle_torch.storage import atomic_file

Safety = Callable[[list[Image.Image], list[str]], Sequence[bool] | Sequence[Image.Image]]

METADATA_KEY = "dalle_torch"
"""PNG text chunk with everything needed to draw the picture again, as JSON."""
PARAMETERS_KEY = "parameters"
"""PNG text chunk with the same for human eyes, under the name that picture browsers look for."""

_MAX_SLUG = 60


@dataclass(kw_only=True)
class DallePipelineOutput:
    """Pictures and where they come from; every list holds one entry a picture, all pictures of the first prompt first.

    With re-ranking a prompt's pictures stand best first.
    """

    images: list[Image.Image]
    prompts: list[str]
    """The prompt of each picture, as it was given."""
    seeds: list[int]
    """The seed that draws this very picture when it is asked for alone (`num_images=1, seed=...`)."""
    tokens: Tensor
    """int64 [pictures, codes], row-major over the grid of codes; -1 where nothing has been drawn yet."""
    scores: list[float] | None = None
    """Cosine similarity of picture and prompt by the CLIP model of `rank_with`; None without one."""
    withheld: list[bool] = field(default_factory=list)
    """Whether the `safety` hook held the picture back; a black one stands in its place."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What all pictures were drawn with: sampling, model, its hash, version."""
    progress: float = 1.0
    """Share of the tokens that are drawn; 1 but for what `DallePipeline.stream` yields on the way."""

    def metadata(self, index: int) -> dict[str, Any]:
        """Everything that is known about picture `index`, ready for JSON."""
        about: dict[str, Any] = {"prompt": self.prompts[index], "seed": self.seeds[index]}
        if self.scores is not None:
            about["clip_score"] = self.scores[index]
        return about | self.settings

    def grid(self, columns: int | None = None) -> Image.Image:
        """All pictures side by side: one row a prompt where there are several, nearly square otherwise."""
        if columns is None and len(runs := list(_runs(self.prompts))) > 1 and len(set(runs)) == 1:
            columns = runs[0]
        return make_grid(self.images, columns=columns)

    def save(self, folder: str | Path, *, overwrite: bool = False, grid: bool = True) -> list[Path]:
        """Write every picture as `PROMPT-SEED.png`, and `grid.png` if there are several.

        Args:
            folder: is made if need be.
            overwrite: replace files of these names; otherwise a number is put behind the name.

        Returns:
            The files' paths, the grid's last.

        Raises:
            OSError: the folder cannot be written to.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths: list[Path] = []
        for index, image in enumerate(self.images):
            name = f"{slug(self.prompts[index])}-{self.seeds[index]}"
            paths.append(_free_path(folder, name, overwrite, taken=paths))
            write_png(paths[-1], image, self.metadata(index))
        if grid and len(self.images) > 1:
            paths.append(_free_path(folder, "grid", overwrite, taken=paths))
            about = {"prompts": list(dict.fromkeys(self.prompts)), "seeds": self.seeds} | self.settings
            write_png(paths[-1], self.grid(), about)
        return paths


def apply_safety(output: DallePipelineOutput, safety: Safety) -> DallePipelineOutput:
    """What a safety hook lets through.

    Args:
        safety: called with all pictures and their prompts; returns one result for each picture: False to hold it back
            (a black picture takes its place), True to show it, or a picture to show instead.

    Raises:
        ValueError: another number of results than pictures.
    """
    verdict = list(safety(list(output.images), list(output.prompts)))
    if len(verdict) != len(output.images):
        raise ValueError(f"safety gave {len(verdict)} results for {len(output.images)} pictures: it must give one each")
    shown = [
        result if isinstance(result, Image.Image) else image if result else Image.new("RGB", image.size)
        for image, result in zip(output.images, verdict, strict=True)
    ]
    withheld = [new is not old for new, old in zip(shown, output.images, strict=True)]
    return replace(output, images=shown, withheld=withheld)


def write_png(path: str | Path, image: Image.Image, metadata: Mapping[str, Any]) -> None:
    """Write a PNG with `metadata` in its text chunks (`METADATA_KEY`, `PARAMETERS_KEY`); whole or not at all."""
    chunks = PngInfo()
    chunks.add_itxt(METADATA_KEY, json.dumps(metadata))
    # Half a UTF-16 pair, which no file can hold, may come in with a prompt; JSON escapes it.
    chunks.add_itxt(PARAMETERS_KEY, _readable(metadata).encode(errors="replace").decode())
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `write_png` stored.

    Raises:
        OSError: there is no such picture.
        ValueError: the picture carries no such metadata.
    """
    with Image.open(path) as image:
        image.load()
        text = image.info.get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{path} was not drawn here: it has no text chunk {METADATA_KEY!r}")
    return json.loads(text)


def slug(prompt: str) -> str:
    """A short file name out of a prompt: lower case letters and digits of any script, with hyphens between words."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    name = ""
    for word in words:
        if len(name) + len(word) >= _MAX_SLUG:
            break
        name = f"{name}-{word}" if name else word
    # File systems count bytes: 255 of them, some of which the seed and the suffix need.
    name = (name or "".join(words)[:_MAX_SLUG]).encode()[: 3 * _MAX_SLUG].decode(errors="ignore")
    return name or "picture"


def make_grid(
    images: Sequence[Image.Image],
    *,
    columns: int | None = None,
    gap: int = 2,
    labels: Sequence[str] | None = None,
    frames: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """Pictures of one size on a white sheet, row by row.

    Args:
        columns: pictures in a row; None makes the sheet nearly square.
        gap: pixels between pictures.
        labels: a line of text below each picture, wrapped to its width.
        frames: a colour around each picture, by name.
        scale: how many times each picture is enlarged, pixel by pixel.

    Raises:
        ValueError: no pictures, or `columns` below 1.
    """
    if not images:
        raise ValueError("a grid needs at least one picture")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1")
    columns = min(columns, len(images))
    width, height = (scale * side for side in images[0].size)
    border = 3 if frames else 0
    font = ImageFont.load_default(size=11)
    texts = [_wrap(label, font, width) for label in labels] if labels else []
    text_height = 14 * max((text.count("\n") + 1 for text in texts), default=0)
    cell = (width + 2 * border + gap, height + 2 * border + text_height + gap)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell[0] - gap, rows * cell[1] - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x, y = index % columns * cell[0], index // columns * cell[1]
        if frames:
            draw.rectangle((x, y, x + width + 2 * border - 1, y + height + 2 * border - 1), fill=frames[index])
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x + border, y + border))
        if texts:
            draw.multiline_text((x + border, y + height + 2 * border), texts[index], fill="black", font=font, spacing=2)
    return sheet


def _readable(metadata: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in metadata.items() if name != "prompt"}
    line = ", ".join(f"{name.replace('_', ' ').capitalize()}: {value}" for name, value in rest.items())
    return f"{metadata['prompt']}\n{line}" if "prompt" in metadata else line


def _runs(items: Sequence[str]) -> Iterator[int]:
    """Lengths of the runs of equal neighbours."""
    length = 0
    for index, item in enumerate(items):
        length += 1
        if index + 1 == len(items) or items[index + 1] != item:
            yield length
            length = 0


def _free_path(folder: Path, name: str, overwrite: bool, taken: Sequence[Path]) -> Path:
    path, number = folder / f"{name}.png", 2
    # Two equal prompts in one call must not replace each other even where older files may be replaced.
    while path in taken or (not overwrite and path.exists()):
        path, number = folder / f"{name}-{number}.png", number + 1
    return path


def _wrap(text: str, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
