"""The README.md of an exported model: what it was trained on and how, how the loss went, what it is for and what not.

Owns: its text. Does not own: where the numbers come from (`export`).

What a run knows is told; the rest has places to fill in, which say so.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import dalle_torch

_ROWS = 20
"""Of the table of the loss."""
_SECTIONS = ("training", "optimizer", "mesh", "runtime")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What of a card no run knows."""

    name: str = "DalleBart"
    license: str | None = None
    """Its identifier on the hub, such as "apache-2.0"; `None` leaves a place to fill in."""
    data: str | None = None
    """A paragraph about the data: where it comes from, how it was filtered, who may use it."""
    intended_use: str = (
        "Research on text-to-image models, and pictures for fun and for illustration that are looked at before they "
        "are used. Not for pictures that are to pass for photographs of real people or events, and not where a wrong "
        "or offensive picture does harm."
    )
    limits: str = (
        "The model draws what its captions and pictures taught it, with their mistakes: faces and people, text in "
        "pictures, counts and spatial relations often come out wrong, and prompts in other languages than that of the "
        "captions hardly work. Pictures are no sharper than its VQGAN can make them."
    )
    bias: str = (
        "Data collected from the web over-represents some groups, places and points of view, and shows others in "
        "stereotypes; the model repeats and can exaggerate this, and it can draw offensive pictures. Measure it for "
        "your use, and filter prompts and pictures where others will see them."
    )


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the run knows."""

    step: int
    parameters: int
    dtype: str
    model: Mapping[str, Any]
    """The model's configuration."""
    config: Mapping[str, Any]
    """The run's, `config.RunConfig` as nested dicts."""
    metrics: Sequence[Mapping[str, Any]] = ()
    history: Sequence[Mapping[str, Any]] = ()
    vqgan: bool = False
    """Whether one lies beside the model."""


def render(card: ModelCard, facts: Facts) -> str:
    """The whole card, as Markdown with the hub's header."""
    parts = [
        _header(card),
        f"# {_plain(card.name)}",
        _summary(facts),
        "## How to load it\n\n" + _loading(facts),
        "## Data\n\n" + _data(card, facts.config),
        "## How it was trained\n\n" + _settings(facts.config),
    ]
    if facts.history:
        parts.append("Settings were changed on the way:\n\n" + _rows(facts.history))
    parts.append("## Loss\n\n" + loss_table(facts.metrics))
    parts.append(f"## Intended use\n\n{card.intended_use}")
    parts.append(f"## Limits\n\n{card.limits}")
    parts.append(f"## Bias\n\n{card.bias}")
    licence = card.license or "*To be filled in: the licence of these weights, here and as `license` in the header.*"
    parts.append(f"## Licence\n\n{licence}")
    return "\n\n".join(parts) + "\n"


def read_metrics(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, by step; of steps that were done again the last. Damaged lines are left out."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            found[row["step"]] = found.get(row["step"], {}) | row
    return [found[step] for step in sorted(found)]


def loss_table(metrics: Sequence[Mapping[str, Any]]) -> str:
    """A table of at most 20 steps, evenly spread and the last one in it, with each kind of loss as a column."""
    names = [name for row in metrics for name, value in row.items() if "loss" in name and type(value) in (int, float)]
    columns = list(dict.fromkeys(names))[:6]
    rows = [row for row in metrics if any(name in row for name in columns)]
    if not rows:
        return "*The run has left no metrics.*"
    count = min(_ROWS, len(rows))
    chosen = sorted({round(i * (len(rows) - 1) / max(count - 1, 1)) for i in range(count)})
    # Evaluations are rarer than other lines: a row shows the last one up to its step.
    shown, last, given = [], -1, dict[str, Any]()
    for index in chosen:
        seen = {name: value for row in rows[last + 1 : index + 1] for name, value in row.items() if name in columns}
        given = {"step": rows[index]["step"]} | seen
        shown.append(given)
        last = index
    return _rows(shown, ["step", *columns])


def _header(card: ModelCard) -> str:
    lines = [f"license: {json.dumps(card.license)}"] if card.license else ["# license: to be filled in"]
    lines += ["pipeline_tag: text-to-image", "tags: [text-to-image, dallebart, dalle-torch]"]
    return "---\n" + "\n".join(lines) + "\n---"


def _summary(facts: Facts) -> str:
    model = facts.model
    layers = f"{model.get('encoder_layers')} + {model.get('decoder_layers')} layers, d_model {model.get('d_model')}"
    return (
        f"A DalleBart (DALL·E Mini's architecture) of {facts.parameters:,} parameters ({layers}), from text to "
        f"{model.get('image_length')} image tokens, saved as {facts.dtype} after {facts.step:,} updates with "
        f"dalle_torch {dalle_torch.__version__}."
    )


def _loading(facts: Facts) -> str:
    vqgan = facts.config.get("model", {}).get("vqgan")
    if facts.vqgan:
        name, note = "", "Its VQGAN lies in the folder `vqgan`."
    elif vqgan:
        name, note = f', vqgan="{_public(vqgan)}"', "The VQGAN is not in this folder."
    else:
        name, note = ', vqgan="..."', "The VQGAN is not in this folder: name the one that made the codes of the data."
    return (
        "```python\nfrom dalle_torch import DalleBart, DallePipeline\n\n"
        f'pipe = DallePipeline.from_pretrained("this/repository"{name})\n'
        'pipe("a prompt", num_images=4, seed=0).images[0].save("picture.png")\n'
        'model = DalleBart.from_pretrained("this/repository")  # the network alone\n```\n\n' + note
    )


def _data(card: ModelCard, config: Mapping[str, Any]) -> str:
    data = config.get("data", {})
    paragraphs = [
        card.data or "*To be filled in: where the pictures and captions come from, and how they were filtered.*"
    ]
    shards = [_public(name) for name in _strings(data.get("train"))]
    if shards:
        more = f" and {len(shards) - 8} more" if len(shards) > 8 else ""
        paragraphs.append("Trained on " + ", ".join(f"`{name}`" for name in shards[:8]) + more + ".")
    if evaluation := _strings(data.get("evaluation")):
        paragraphs.append("Evaluated on " + ", ".join(f"`{_public(name)}`" for name in evaluation[:8]) + ".")
    rest = {name: value for name, value in data.items() if name not in ("train", "evaluation")}
    if rest:
        paragraphs.append(_rows([{"option": name, "value": value} for name, value in rest.items()]))
    return "\n\n".join(paragraphs)


def _settings(config: Mapping[str, Any]) -> str:
    rows = [
        {"option": f"{section}.{name}", "value": value}
        for section in _SECTIONS
        for name, value in config.get(section, {}).items()
    ]
    start = config.get("model", {}).get("weights")
    before = f"Fine-tuned from `{_public(start)}`.\n\n" if start else ""
    return before + (_rows(rows) if rows else "*The run has left no settings.*")


def _rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(map(_plain, columns)) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(_plain(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """One cell of a table."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        value = _public(value)
    return " ".join(str(value).replace("|", "\\|").split())


def _public(name: Any) -> str:
    """A source without what is nobody's business: where it lies on a machine, or with which key it is fetched."""
    text = str(name)
    if "://" in text:
        address = urlsplit(text)
        return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"
    return PurePosixPath(text).name if text.startswith(("/", "~")) or Path(text).is_absolute() else text


def _strings(value: Any) -> list[str]:
    """The names in a string, a list, or a map of names to either."""
    if isinstance(value, Mapping):
        return [name for item in value.values() for name in _strings(item)]
    if isinstance(value, (list, tuple)):
        return [name for item in value for name in _strings(item)]
    return [value] if isinstance(value, str) else []
