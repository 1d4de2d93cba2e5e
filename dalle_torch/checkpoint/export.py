"""A checkpoint of a run as a Hugging Face folder: weights, configuration, tokenizer, model card, and a VQGAN if wanted.

Owns: where the pieces are found, what goes into the folder, the check of what was written. Does not own: the card's
text (`model_card`), uploading (`cli`).

A run's folder has `config.yaml`, `metrics.jsonl`, `processor/` and, unless its configuration puts them elsewhere,
`checkpoints/`. In a checkpoint the weights are `model/NAME`, and `meta` has the step, the run's configuration as
`config`, the model's as `model`, and what was changed on the way as `history`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle_torch.checkpoint.model_card import Facts, ModelCard, read_metrics, render
from dalle_torch.checkpoint.reading import Checkpoint
from dalle_torch.checkpoint.sharded import CheckpointFolder
from dalle_torch.checkpoint.store import Store
from dalle_torch.config import RunConfig
from dalle_torch.config_io import load_config
from dalle_torch.storage import CheckpointError, atomic_folder

if TYPE_CHECKING:
    from dalle_torch.models.dalle_bart import DalleBart
    from dalle_torch.text import DalleBartProcessor

WEIGHTS = "model/"
"""Before the names of weights in a checkpoint."""
CONFIG_FILE, METRICS_FILE, PROCESSOR_FOLDER, CHECKPOINTS = "config.yaml", "metrics.jsonl", "processor", "checkpoints"
_ONE = re.compile(r"step-(\d{8,})(-\d+)?")

Source = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint, and the folder of its run where that is on this machine."""

    checkpoint: Checkpoint
    run: Path | None


def find_checkpoint(source: Source, step: int | None = None) -> Found:
    """The checkpoint that `source` means.

    Args:
        source: the folder of a run, one of checkpoints, or a checkpoint; folders or, of the latter two, URLs.
        step: which one of several; `None` is the newest that is whole.

    Raises:
        FileNotFoundError: there is no checkpoint, or none of that step; those that there are are named.
        CheckpointError: the one asked for is damaged.
    """
    name = os.fspath(source).rstrip("/")
    if _ONE.fullmatch(name.rsplit("/", 1)[-1]):
        place, _, last = name.rpartition("/")
        checkpoint = _one(Store(place or "."), last)
        if step is not None and checkpoint.step != step:
            raise FileNotFoundError(f"{name} is of step {checkpoint.step}, not {step}")
        return Found(checkpoint=checkpoint, run=_run_above(place or "."))
    run, folder = _run_of(name)
    checkpoints = CheckpointFolder(folder)
    if step is None:
        newest = checkpoints.newest()
        if newest is None:
            raise FileNotFoundError(f"{name} has no checkpoint that is whole: name a run's folder or a checkpoint")
        return Found(checkpoint=newest, run=run)
    if step not in checkpoints.steps():
        there = ", ".join(map(str, checkpoints.steps())) or "none"
        raise FileNotFoundError(f"{name} has no checkpoint of step {step}; there are: {there}")
    return Found(checkpoint=checkpoints.open(step), run=run)


def export_model(
    source: Source,
    output: Source,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    processor: Source | None = None,
    vqgan: Source | None = None,
    card: ModelCard | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Checkpoint:
    """Write a checkpoint's model as a folder that `DalleBart.from_pretrained` and `DallePipeline` load.

    Args:
        source, step: as `find_checkpoint`.
        output: appears whole or not at all.
        dtype: of the weights; `None` leaves it as it is.
        processor: folder, hub id, artifact or URL of the tokenizer and what goes with it; `None` takes the run's own.
        vqgan: source of the VQGAN that is put beside it, in `vqgan`; `None` leaves it out.
        card: what the model card says that the run does not know.
        overwrite: replace what is in `output`.
        max_shard_size: of a file of weights.

    Returns:
        The checkpoint that was exported.

    Raises:
        FileExistsError: `output` is there, and not empty.
        FileNotFoundError: no such checkpoint, or no tokenizer; the message says what to give.
        CheckpointError: the checkpoint is damaged, or holds no model of its configuration.
        ValueError: tokenizer or VQGAN do not go with the model.
        OSError: something cannot be read or written.
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
        raise FileExistsError(f"{target} is not empty: give another folder, or --overwrite to replace all of it")
    found = find_checkpoint(source, step)
    if found.run is not None and target.resolve() in (found.run.resolve(), *found.run.resolve().parents):
        raise ValueError(f"{target} holds the run itself: write to another folder")
    meta = found.checkpoint.meta
    prepared = _processor(processor, found)
    model = _model(found.checkpoint, dtype)
    # Which text the model has seen is for the processor to say.
    model.config.normalize_text = prepared.normalizer is not None
    if len(prepared.tokenizer) > model.config.encoder_vocab_size:
        raise ValueError(
            f"the tokenizer has {len(prepared.tokenizer)} tokens and the model knows "
            f"{model.config.encoder_vocab_size}: they do not belong together"
        )
    facts = Facts(
        step=found.checkpoint.step,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        model=model.config.to_dict(),
        config=meta.get("config", {}),
        metrics=_metrics(found.run),
        history=meta.get("history") or (),
        vqgan=vqgan is not None,
    )
    with atomic_folder(target) as place:
        model.save_pretrained(place, max_shard_size=max_shard_size)
        check_written(place, model.state_dict())
        prepared.save_pretrained(place)
        if vqgan is not None:
            _add_vqgan(vqgan, place / "vqgan", model)
        (place / "README.md").write_text(render(card or ModelCard(), facts), encoding="utf-8")
    return found.checkpoint


def check_written(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare every tensor of the safetensors files in `folder`, bit by bit.

    Raises:
        CheckpointError: one is missing or differs.
    """
    from safetensors import safe_open

    missing, wrong = dict.fromkeys(tensors), []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                missing.pop(name, None)
                if name not in tensors or not _same(file.get_tensor(name), tensors[name]):
                    wrong.append(name)
    if missing or wrong:
        raise CheckpointError(f"{len(missing) + len(wrong)} tensors were not written as they are: {[*missing, *wrong]}")


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, so that numbers that are none are equal too."""
    return a.shape == b.shape and a.dtype == b.dtype and a.nbytes == b.nbytes and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _model(checkpoint: Checkpoint, dtype: torch.dtype | None) -> "DalleBart":
    """The network with the checkpoint's weights."""
    from dalle_torch.models.configuration import DalleBartConfig, told_of
    from dalle_torch.models.dalle_bart import DalleBart

    values = checkpoint.meta.get("model")
    if not isinstance(values, dict):
        raise CheckpointError(f"{checkpoint.url} has no configuration of a model")
    with told_of(checkpoint.url):
        config = DalleBartConfig.from_dict(dict(values))
    with torch.device("meta"):
        model = DalleBart(config)
    names = {name.removeprefix(WEIGHTS): name for name in checkpoint.shapes if name.startswith(WEIGHTS)}
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in names]
    problems += [f"{name} is unknown" for name in names if name not in own]
    problems += [
        f"{name} has shape {list(checkpoint.shapes[names[name]])}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in names and checkpoint.shapes[names[name]] != tuple(tensor.shape)
    ]
    if problems:
        raise CheckpointError(f"{checkpoint.url} does not hold the model of its configuration: {'; '.join(problems)}")
    weights = {}
    for name, saved in names.items():  # one at a time, so that no second model is in memory in its old dtype
        tensor = checkpoint.read([saved])[saved]
        weights[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _processor(source: Source | None, found: Found) -> "DalleBartProcessor":
    from dalle_torch.text import DalleBartProcessor

    if source is not None:
        return DalleBartProcessor.from_pretrained(source)
    if found.run is not None and (found.run / PROCESSOR_FOLDER).is_dir():
        return DalleBartProcessor.from_pretrained(found.run / PROCESSOR_FOLDER)
    model = found.checkpoint.meta.get("config", {}).get("model", {})
    named = model.get("tokenizer") or model.get("weights") or model.get("config")
    if named is None:
        raise FileNotFoundError(f"{found.checkpoint.url}: its run's tokenizer is not here: name one with --tokenizer")
    try:
        return DalleBartProcessor.from_pretrained(named)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the tokenizer of the run, {named}, cannot be had: name another source of it with --tokenizer ({error})"
        ) from error


def _add_vqgan(source: Source, folder: Path, model: "DalleBart") -> None:
    from dalle_torch.models.vqgan import VQGAN

    vqgan = VQGAN.from_pretrained(source)
    codes, tokens = vqgan.config.image_length, model.config.image_length
    if codes != tokens or vqgan.config.n_embed > model.config.image_vocab_size:
        raise ValueError(
            f"the VQGAN {source} has pictures of {codes} of {vqgan.config.n_embed} codes, and the model draws {tokens} "
            f"of {model.config.image_vocab_size}: they do not belong together"
        )
    vqgan.config.name_or_path = ""
    vqgan.save_pretrained(folder)


def _run_of(name: str) -> tuple[Path | None, str]:
    """The run's folder if there is one, and that of its checkpoints."""
    if "://" in name:
        return None, name
    path = Path(name).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{name} is not there: name the folder of a run, or a checkpoint")
    if (path / CONFIG_FILE).is_file():
        config = load_config(RunConfig, path / CONFIG_FILE)
        return path, config.checkpoint.folder or str(path / CHECKPOINTS)
    if (path / CHECKPOINTS).is_dir():
        return path, str(path / CHECKPOINTS)
    return _run_above(name), name


def _run_above(folder: str) -> Path | None:
    """The run whose folder of checkpoints this is, if it looks like one."""
    if "://" in folder:
        return None
    above = Path(folder).expanduser().absolute().parent
    return above if (above / CONFIG_FILE).is_file() or (above / PROCESSOR_FOLDER).is_dir() else None


def _one(store: Store, name: str) -> Checkpoint:
    if not store.exists(name):
        raise FileNotFoundError(f"{store.url}/{name} is not there: name the folder of a run, or a checkpoint")
    return Checkpoint(store, name)


def _metrics(run: Path | None) -> list[dict[str, Any]]:
    if run is None or not (run / METRICS_FILE).is_file():
        return []
    with (run / METRICS_FILE).open(encoding="utf-8", errors="replace") as lines:
        return read_metrics(lines)
