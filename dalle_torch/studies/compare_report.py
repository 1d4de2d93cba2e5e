"""The result of a comparison for human eyes: curves as PNG, and one HTML page that opens offline.

Owns: what is on them. Does not own: how pages and charts look (`reports`), the figures (`compare_table`).
"""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from dalle_torch.log import get_logger
from dalle_torch.reports.charts import Curve, lines
from dalle_torch.reports.html import Page
from dalle_torch.storage import atomic_file
from dalle_torch.studies.compare_config import ComparisonConfig
from dalle_torch.studies.compare_measure import Measured, interpolate
from dalle_torch.studies.compare_table import COLUMNS, Comparison, Summary

logger = get_logger(__name__)

CHARTS = {"losses-steps.png": "updates", "losses-seconds.png": "seconds of training"}


def write_report(comparison: Comparison, config: ComparisonConfig, output: Path) -> None:
    """Write `report.html`, and the charts of `CHARTS` where matplotlib is there; a warning says where it is not.

    Raises:
        OSError: `output` cannot be written.
    """
    drawn: dict[str, bytes] = {}
    try:
        drawn = charts(comparison)
    except ImportError as error:
        logger.warning("no pictures of the losses: %s", error)
    for name, data in drawn.items():
        with atomic_file(output / name) as file:
            file.write_bytes(data)
    page(comparison, config, drawn).save(output / "report.html")


def charts(comparison: Comparison) -> dict[str, bytes]:
    """PNG files by name: the evaluation loss over updates and over seconds, the mean over seeds in their band.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found = {}
    for (name, axis), along in zip(CHARTS.items(), (_by_step, _by_second), strict=True):
        curves = {row.name: curve for row in comparison.rows if (curve := _curve(row, along)) is not None}
        found[name] = lines(curves, x=axis, y="evaluation loss, nats a token", title=comparison.title, marked=True)
    return found


def page(comparison: Comparison, config: ComparisonConfig, drawn: dict[str, bytes]) -> Page:
    """All of it on one page."""
    seeds = ", ".join(map(str, config.seeds))
    made = Page(comparison.title, f"{len(comparison.rows)} rows, seeds {seeds}; lower losses are better")
    if comparison.missing:
        made.notice(f"{comparison.missing} runs are not finished: the same command goes on with them.")
    made.paragraph(
        f"The loss is the cross entropy in nats a token on data that no row trained on, after all updates and as the "
        f"mean over seeds. A model that has learnt nothing but how frequent each image token is has "
        f"{comparison.chance:.4f}. Losses at equal seconds are those after {comparison.seconds or 0:.0f} s, when the "
        f"fastest row is done: slower rows are then on their way, with a learning rate that has yet to fall."
    )
    made.table(list(COLUMNS.values()), [list(row.cells().values()) for row in comparison.rows])
    for data, what in zip(drawn.values(), CHARTS.values(), strict=False):
        made.png(data, f"evaluation loss over {what}")
    tried = [row for row in comparison.rows if len(row.rates) > 1]
    if tried:
        made.heading("Learning rates")
        made.paragraph("Losses of the first seed with each; the best went on with the others.")
        made.table(["row", "lr", "loss"], [[row.name, rate, loss] for row in tried for rate, loss in row.rates.items()])
    troubles = [f"{row.name}: {what}" for row in comparison.rows for what in row.trouble]
    made.heading("Noticed")
    for trouble in troubles or ["No run diverged, ended at chance or had a spike in its losses."]:
        made.paragraph(trouble)
    made.heading("Settings")
    made.facts({"all rows": config.run, "data": str(config.data)} | {row.name: row.set for row in config.rows})
    first = comparison.rows[0].results[0]
    made.facts({name: first.fields.get(name) for name in ("versions", "device", "machine", "threads")})
    return made


def _by_step(measured: Measured) -> list[float]:
    return [float(step) for step in measured.steps]


def _by_second(measured: Measured) -> list[float]:
    return measured.seconds


def _curve(row: Summary, along: Callable[[Measured], list[float]]) -> Curve | None:
    """The mean and the band of a row's runs, at the places of the shortest of them."""
    runs = [(along(run.measured), run.measured.losses) for run in row.results if run.measured.losses]
    if not runs:
        return None
    places = min((xs for xs, _ in runs), key=lambda xs: xs[-1])
    kept, values = [], []
    for place in places:
        at = [interpolate(xs, ys, place) for xs, ys in runs]
        known = [value for value in at if value is not None]
        if len(known) == len(runs):
            kept.append(place)
            values.append(known)
    if not kept:
        return None
    return Curve(kept, [mean(at) for at in values], [min(at) for at in values], [max(at) for at in values])
