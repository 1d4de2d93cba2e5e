"""Which way of choosing tokens is best: distance from real pictures against agreement with the prompt.

Owns: the grid of settings, the front, table and charts. Does not own: the figures (`evaluation`), the pictures
(`drawings`).

Super conditioning trades the one for the other, so that no single setting is the best; those that no other one beats in
both are the Pareto front (as in the curves of FID and CLIP score by which guidance is compared, arXiv 2112.10741).
"""

import csv
import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from dalle_torch.data.captioned import CaptionedData
from dalle_torch.evaluation.base import FeatureExtractor, TextImageScorer
from dalle_torch.evaluation.protocol import PROTOCOL, environment, write_result
from dalle_torch.log import get_logger
from dalle_torch.models.packing import can_pack
from dalle_torch.pipeline import DallePipeline
from dalle_torch.reports import charts
from dalle_torch.reports.html import Page
from dalle_torch.storage import atomic_file
from dalle_torch.studies.drawings import Drawings, Setting, draw, origin_of
from dalle_torch.studies.evaluate import EXPLAINED, EvaluationOptions, score_drawings
from dalle_torch.studies.reference import about_data, about_judges, measure_reference

logger = get_logger(__name__)

SCORES = ("fid", "kid", "text_image_score", "retrieval_accuracy", "diversity")
_SHOWN_PROMPTS = 8


def settings_of(
    scales: Sequence[float], temperatures: Sequence[float], top_ks: Sequence[int | None], top_p: float | None = None
) -> list[Setting]:
    """Every combination, once each, in the order given.

    Raises:
        ValueError: a value that no model could be given.
    """
    from dalle_torch.models.sampling import SamplingOptions

    settings = [
        Setting(condition_scale=scale, temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature, top_k, scale in product(temperatures, top_ks, scales)
    ]
    for setting in settings:
        SamplingOptions(**asdict(setting))
    return list(dict.fromkeys(settings))


def pareto(
    pipe: DallePipeline,
    data: CaptionedData,
    extractor: FeatureExtractor,
    scorer: TextImageScorer,
    settings: Sequence[Setting],
    options: EvaluationOptions,
    folder: Path,
) -> dict[str, Any]:
    """Measure all settings; writes `pareto.json`, `pareto.csv`, `pareto.png` and `pareto.html` into `folder`.

    Scores of a setting are kept too: with more settings only the new ones are drawn and scored.

    Returns:
        The result; what may differ from one run to the next is in its "run" alone.

    Raises:
        ImportError: matplotlib is not installed; nothing was drawn then.
        OSError, ValueError: as data, judges and pictures.
    """
    charts.scatter({}, x="", y="")  # Without it hours of drawing would end in an error.
    started = time.monotonic()
    origin = origin_of(pipe)
    reference = measure_reference(pipe, data, extractor, scorer, options.limit, with_model=False)
    if can_pack(pipe.model):
        pipe.pack()
    drawn = draw(
        pipe, reference.captions, settings, folder / "drawings",
        num_images=options.num_images, seed=options.seed, batch_size=options.batch_size,
        origin=origin,
    )  # fmt: skip
    judges, notices = about_judges(extractor, scorer)
    notices += about_data(data)
    rows: list[dict[str, Any]] = []
    for setting, drawings in zip(settings, drawn, strict=True):
        key = json.dumps([PROTOCOL, judges, reference.sha256], sort_keys=True)
        scores, said = _scored(drawings, key, reference.features, extractor, scorer)
        notices += [notice for notice in said if notice not in notices]
        rows.append(asdict(setting) | scores)
    for row, best in zip(rows, front([(row["fid"], row["text_image_score"]) for row in rows]), strict=True):
        row["pareto"] = best
    result: dict[str, Any] = {
        "model": origin | {"source": str(pipe.source or "unnamed")},
        "data": data.describe()
        | {"samples": len(reference.captions), "sha256": reference.sha256, "text_image_score": reference.score},
        "pictures": {"of_a_setting": len(drawn[0]), "of_each_prompt": options.num_images, "seed": options.seed},
        "judges": judges,
        "settings": rows,
        "notices": notices,
        "run": {"environment": environment(), "seconds": round(time.monotonic() - started, 1)},
    }
    write_result(folder / "pareto.json", result)
    _write(folder / "pareto.csv", _csv(rows).encode())
    chart = _chart(rows, judges)
    _write(folder / "pareto.png", chart)
    _page(result, settings, drawn, chart).save(folder / "pareto.html")
    return result


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point has a distance as small and an agreement as high, one of them better."""
    return [
        not any(other[0] <= point[0] and other[1] >= point[1] and other != point for other in points)
        for point in points
    ]


def _scored(
    drawings: Drawings, key: str, reference: Any, extractor: FeatureExtractor, scorer: TextImageScorer
) -> tuple[dict[str, Any], list[str]]:
    """The scores of one setting, from its folder if the same judges have seen the same data."""
    path = drawings.folder / "scores.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept["scores"], kept["notices"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    scores, notices = score_drawings(drawings, reference, extractor, scorer)
    text = json.dumps({"key": key, "scores": scores, "notices": notices}, allow_nan=False)
    _write(path, text.encode())
    return scores, notices


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _chart(rows: Sequence[dict[str, Any]], judges: dict[str, Any]) -> bytes:
    """Agreement over distance: a line through the scales of each temperature and top-k."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    labels: dict[str, list[str]] = {}
    for row in rows:
        setting = Setting(**{name: row[name] for name in ("condition_scale", "temperature", "top_k", "top_p")})
        name = str(setting).partition(", ")[2]
        points.setdefault(name, ([], []))
        points[name][0].append(row["fid"])
        points[name][1].append(row["text_image_score"])
        labels.setdefault(name, []).append(f"{row['condition_scale']:g}")
    best = sorted((row["fid"], row["text_image_score"]) for row in rows if row["pareto"])
    joined = dict.fromkeys(points, True)
    points["Pareto front"] = ([x for x, _ in best], [y for _, y in best])
    return charts.scatter(
        points, x=f"FID ({judges['features']['name']} features), less is better",
        y=f"text-image score ({judges['scorer']['name']}), more is better",
        title="Super conditioning: the number at each point is the scale", labels=labels, joined=joined,
        log_x=max(row["fid"] for row in rows) > 20 * min(row["fid"] for row in rows),
        hollow=("Pareto front",),
    )  # fmt: skip


def _page(result: dict[str, Any], settings: Sequence[Setting], drawn: Sequence[Drawings], chart: bytes) -> Page:
    count = result["pictures"]["of_a_setting"]
    page = Page(f"Super conditioning of {result['model']['source']}", f"{count:,} pictures of each setting")
    for notice in result["notices"]:
        page.notice(notice)
    page.png(chart, "text-image score over FID")
    rows = result["settings"]
    if rows[0]["diversity"] is not None:
        curves = {
            name: charts.Curve([row["condition_scale"] for row in rows], [row[name] for row in rows])
            for name in ("text_image_score", "diversity")
        }
        if len({(row["temperature"], row["top_k"]) for row in rows}) == 1:
            top = {name: max(curve.y) or 1.0 for name, curve in curves.items()}
            relative = {n: charts.Curve(c.x, [y / top[n] for y in c.y]) for n, c in curves.items()}
            page.png(charts.lines(relative, x="condition scale", y="share of its largest value", marked=True))
    page.heading("Settings")
    names = ["condition_scale", "temperature", "top_k", "top_p", *SCORES, "pareto"]
    page.table(names, [[row[name] for name in names] for row in rows])
    page.facts({name: EXPLAINED[name] for name in SCORES})
    for setting, drawings in zip(settings, drawn, strict=True):
        page.heading(str(setting))
        shown = _SHOWN_PROMPTS * drawings.num_images
        page.gallery(drawings[:shown], drawings.prompts[:shown], width=96)
    page.heading("How it was measured")
    page.facts({name: result[name] for name in ("model", "data", "pictures", "judges", "run")})
    return page


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
