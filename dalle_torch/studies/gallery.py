"""Pictures of thousands of prompts: drawn in portions, ranked, written as they are finished, shown in a gallery.

Owns: portions, names of files, what settings decide a picture, the pages, wandb's table. Does not own: prompts
(`prompts`), lines and what is kept of them (`results`), drawing and ranking (`pipeline`).

Memory holds the pictures of one portion, and a line for every picture.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from dalle_torch.config import TrackingConfig
from dalle_torch.evaluation.base import TextImageScorer
from dalle_torch.log import get_logger, progress
from dalle_torch.pipeline import DallePipeline
from dalle_torch.pipeline.batching import automatic_batch_size
from dalle_torch.pipeline.drawing import DrawingOptions
from dalle_torch.pipeline.output import DallePipelineOutput, slug, write_png
from dalle_torch.pipeline.ranking import check_prompts
from dalle_torch.reports.html import Page
from dalle_torch.studies.drawings import origin_of
from dalle_torch.studies.prompts import Request
from dalle_torch.studies.results import Key, Results, Row
from dalle_torch.tracking import NullTracker, Tracker, start_wandb
from dalle_torch.tracking.wandb import log_table

logger = get_logger(__name__)

PICTURES_A_PAGE = 600
PICTURES = "pictures"


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What `make_gallery` made."""

    pictures: int
    drawn: int
    """Of them, now; the others were there."""
    pages: list[Path]


def make_gallery(
    pipe: DallePipeline,
    requests: Sequence[Request],
    folder: Path,
    *,
    scorer: TextImageScorer | None = None,
    num_images: int = 1,
    num_best: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    overwrite: bool = False,
    tracking: TrackingConfig | None = None,
    about: Mapping[str, Any] | None = None,
    **drawing: Any,
) -> Gallery:
    """Draw what is not in `folder` yet, then write the gallery's pages.

    Interrupted or killed at any moment, the same call goes on with what was not finished.

    Args:
        requests: prompts, one that is asked for twice is drawn once.
        folder: gets `pictures/`, `results.jsonl`, `gallery.html` and, where one page would be too long for a browser,
            `gallery-2.html` and so on.
        scorer: who puts each prompt's pictures in order, best first; None leaves them in the order of their seeds.
        num_images, num_best: pictures drawn of each prompt, and how many of them are kept.
        seed: of the first picture of prompts that have no seed of their own.
        batch_size: pictures drawn at once; it makes no difference to them.
        overwrite: draw all again.
        tracking: a run in wandb that gets a table of all pictures.
        about: more that decides pictures, such as the hash of a picture that is drawn on; goes into settings.
        **drawing: further options of a call of the pipeline.

    Raises:
        OSError: the folder cannot be written.
        ValueError: an option is out of range, a score is not a number, the scorer cannot read a prompt, or the folder
            holds pictures of other settings.
    """
    if num_best is not None and (scorer is None or not 1 <= num_best <= num_images):
        needs = "" if scorer else ", and needs a scorer"
        raise ValueError(f"num_best={num_best} must lie between 1 and num_images={num_images}{needs}")
    if not requests:
        raise ValueError("no prompts: a gallery needs at least one")
    keys = list(dict.fromkeys((one.prompt, seed if one.seed is None else one.seed) for one in requests))
    DrawingOptions(num_images=num_images, seed=tuple(seed for _, seed in keys), batch_size=batch_size)
    check_prompts(scorer, [prompt for prompt, _ in keys])
    settings = settings_of(pipe, scorer, num_images, num_best, drawing) | dict(about or {})
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder, settings, num_best or num_images, overwrite=overwrite)
    for leftover in (folder / PICTURES).glob(".tmp-*.png"):
        leftover.unlink()
    tracker: Tracker = NullTracker()
    status = "failed"
    try:
        missing = [key for key in keys if key not in results.finished]
        if len(missing) < len(keys):
            logger.info("%d of %d prompts are drawn already", len(keys) - len(missing), len(keys))
        tracker = start_wandb(tracking, folder, settings) if tracking is not None else tracker
        options = drawing | {"num_images": num_images, "batch_size": batch_size}
        _draw(pipe, missing, results, scorer, num_best, options)
        rows = {key: results.finished[key] for key in keys}
        pages = write_pages(folder, rows, settings, scorer)
        status = "finished"
        _try(lambda: _log(tracker, folder, rows))
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        results.close()
        _try(lambda: tracker.finish(status))
    total = sum(map(len, rows.values()))
    return Gallery(pictures=total, drawn=len(missing) * results.pictures, pages=pages)


def settings_of(
    pipe: DallePipeline,
    scorer: TextImageScorer | None,
    num_images: int,
    num_best: int | None,
    drawing: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides which pictures are kept of a prompt and a seed, and their scores."""
    given = {name: drawing.get(name) for name in ("condition_scale", "top_k", "top_p", "temperature")}
    return {
        **pipe.with_recommended(given),
        "num_images": num_images,
        "num_best": num_best,
        "tile": drawing.get("tile"),
        "keep_rows": drawing.get("keep_rows"),
        **origin_of(pipe),
        "judge": None if scorer is None else scorer.judge.to_json(),
    }


def file_name(prompt: str, seed: int) -> str:
    """The file of a picture in the folder: readable, and of this prompt and seed alone."""
    # Long prompts that begin alike have the same readable part.
    digest = hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()[:10]
    return f"{PICTURES}/{slug(prompt)}-{digest}-{seed}.png"


def _draw(
    pipe: DallePipeline,
    keys: Sequence[Key],
    results: Results,
    scorer: TextImageScorer | None,
    num_best: int | None,
    options: dict[str, Any],
) -> None:
    num_images = options["num_images"]
    scale = pipe.with_recommended({"condition_scale": options.get("condition_scale")})["condition_scale"]
    together = options["batch_size"] or automatic_batch_size(pipe.model, guided=scale != 1)
    size = max(1, together // num_images)
    with progress(total=len(keys) * num_images, desc="drawing", unit="picture") as bar, _one_by_one(pipe):
        for first in range(0, len(keys), size):
            some = keys[first : first + size]
            output = pipe(
                [prompt for prompt, _ in some], seed=[seed for _, seed in some], rank_with=scorer, num_best=num_best,
                progress=False, **options,
            )  # fmt: skip
            output.settings["model_hash"] = pipe.model_hash
            for number, key in enumerate(some):
                results.add(key, _write(output, key, number * results.pictures, results))
            bar.update(len(some) * num_images)


@contextmanager
def _one_by_one(pipe: DallePipeline) -> Iterator[None]:
    """Portions are others after an interruption, and no picture may depend on them."""
    before, pipe.decoded_at_once = pipe.decoded_at_once, 1
    try:
        yield
    finally:
        pipe.decoded_at_once = before


def _write(output: DallePipelineOutput, key: Key, first: int, results: Results) -> list[Row]:
    """Write the pictures of one prompt, which begin at `first`; their lines."""
    rows = []
    for rank in range(1, results.pictures + 1):
        index = first + rank - 1
        file = file_name(output.prompts[index], output.seeds[index])
        write_png(results.folder / file, output.images[index], output.metadata(index))
        score = None if output.scores is None else output.scores[index]
        rows.append({"prompt": key[0], "seed": output.seeds[index], "first_seed": key[1], "file": file,
                     "score": score, "rank": rank})  # fmt: skip
    return rows


def write_pages(
    folder: Path, rows: Mapping[Key, Sequence[Row]], settings: Mapping[str, Any], scorer: TextImageScorer | None
) -> list[Path]:
    """`gallery.html` and the pages after it; pages of a longer gallery that was there before go.

    Raises:
        OSError: the folder cannot be written.
    """
    keys = list(rows)
    size = max(1, PICTURES_A_PAGE // max(len(rows[keys[0]]), 1))
    parts = [keys[first : first + size] for first in range(0, len(keys), size)]
    names = ["gallery.html", *(f"gallery-{number}.html" for number in range(2, len(parts) + 1))]
    with Image.open(folder / rows[keys[0]][0]["file"]) as image:
        width = min(max(image.width, 128), 256)
    links = [(str(number), name) for number, name in enumerate(names, start=1)]
    for number, (name, part) in enumerate(zip(names, parts, strict=True), start=1):
        here = f", page {number} of {len(parts)}" if len(parts) > 1 else ""
        page = Page("Gallery", f"{len(keys):,} prompts, {sum(map(len, rows.values())):,} pictures{here}")
        if scorer is not None and not scorer.judge.standard:
            page.notice(f"Scores are of the judge {scorer.judge.name!r}: not a standard CLIP score.")
        if len(parts) > 1:
            page.links(links, current=name)
        for key in part:
            page.heading(key[0] or "(the empty prompt)")
            addresses = [quote(row["file"]) for row in rows[key]]
            captions = [_caption(row) for row in rows[key]]
            page.gallery(addresses, captions, alts=[row["prompt"] for row in rows[key]], width=width)
        if len(parts) > 1:
            page.links(links, current=name)
        if number == 1:
            page.heading("Settings")
            page.facts(settings)
        page.save(folder / name)
    for path in folder.glob("gallery-*.html"):
        if re.fullmatch(r"gallery-\d+\.html", path.name) and path.name not in names:
            path.unlink()
    return [folder / name for name in names]


def _caption(row: Row) -> str:
    score = "" if row["score"] is None else f"{row['rank']}. score {row['score']:.4f}, "
    return f"{score}seed {row['seed']}"


def _try(send: Callable[[], None]) -> None:
    """What is written here is whole whether or not wandb gets it."""
    try:
        send()
    except Exception as error:
        logger.warning("wandb did not get all: %s: %s", type(error).__name__, " ".join(str(error).split()))


def _log(tracker: Tracker, folder: Path, rows: Mapping[Key, Sequence[Row]]) -> None:
    columns = ["prompt", "seed", "rank", "score"]
    lines = [row for part in rows.values() for row in part]
    cells = [[row[name] for name in columns] for row in lines]
    log_table(tracker, "gallery", columns, cells, [folder / row["file"] for row in lines])
