"""Turn a checkpoint of any known format into a clean folder of safetensors.

Owns: the options of the command, what goes into the folder, the table, the check by reloading. Does not own: reading
formats (`models.loading`, `models.convert`).
A DalleBart that has a VQGAN in its subfolder `vqgan` keeps it: which pictures the tokens stand for is learnt with it.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_torch.cli._push import push

if TYPE_CHECKING:
    from torch import Tensor

    from dalle_torch.models.loading import CheckpointModel

DTYPES = ("auto", "float32", "bfloat16", "float16")
MODEL_TYPES = ("auto", "dallebart", "vqgan")

KEPT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "enwiki-words-frequency.txt", "generation_config.json", "processor_config.json", "README.md",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What is copied from beside the weights."""

VQGAN_FOLDER = "vqgan"

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *[KMGT]B")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder, a hub id, or a wandb artifact")
    parser.add_argument("dest", metavar="DEST", help="folder to write; it appears whole or not at all")
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="auto", help="auto: what the files say")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: its own, which vqgan/ keeps anyway")
    parser.add_argument("--config", metavar="FILE", help="a config.json to use instead of the source's")
    parser.add_argument("--trust-pickle", action="store_true", help="read .pt and .ckpt files, which can run any code")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--subfolder", help="folder inside the source")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights")
    parser.add_argument("--overwrite", action="store_true", help="replace DEST and everything in it")
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the folder to this repository on the hub")


def run(args: argparse.Namespace) -> int:
    dest = Path(args.dest).expanduser()
    _check_dest(dest, args.source, args.overwrite)
    _check_shard_size(args.max_shard_size)
    from transformers.utils import logging

    from dalle_torch.storage import sha256_of

    if not sys.stderr.isatty():
        logging.disable_progress_bar()

    with _new_folder(dest) as temporary:
        _convert_all(args, temporary)
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            print(f"{sha256_of(path)}  {path.relative_to(temporary).as_posix()}")
    print(f"{dest}: written, reloaded, and every tensor equal")
    if args.push_to_hub:
        push(dest, args.push_to_hub, "Upload weights as safetensors")
    return 0


def _convert_all(args: argparse.Namespace, dest: Path) -> None:
    """Into the empty folder `dest`: the model, and the VQGAN beside a DalleBart."""
    from dalle_torch.models.loading import find_folder

    classes = _classes(args.model_type)
    formats = [form for model_class in classes for form in model_class.foreign_formats]
    options = {"revision": args.revision, "subfolder": args.subfolder or None}
    folder = find_folder(args.source, formats, args.trust_pickle, **options)
    model_class = classes[0] if len(classes) == 1 else _pick_class(classes, folder, args.source)
    config = None if args.config is None else _read_config(model_class, args.config)
    _convert(model_class, folder, dest, args, dtype=args.dtype, config=config)
    # Of a source elsewhere, this file has come with the model's own small ones.
    if model_class.config_class.model_type == "dallebart" and (folder / VQGAN_FOLDER / "config.json").is_file():
        (vqgan_class,) = _classes("vqgan")
        options["subfolder"] = "/".join(filter(None, [args.subfolder, VQGAN_FOLDER]))
        folder = find_folder(args.source, vqgan_class.foreign_formats, args.trust_pickle, **options)
        print(f"{VQGAN_FOLDER}:")
        _convert(vqgan_class, folder, dest / VQGAN_FOLDER, args)


def _convert(
    model_class: "type[CheckpointModel]", folder: Path, dest: Path, args: argparse.Namespace, **options: Any
) -> None:
    """Load one model from `folder`, save it in `dest` with what belongs to it, compare, and print its tensors."""
    model = model_class.from_pretrained(folder, trust_pickle=args.trust_pickle, **options)
    tensors = _digests(model.state_dict())
    model.config.name_or_path = ""
    model.save_pretrained(dest, max_shard_size=args.max_shard_size)
    # Two whole models at a time would double the memory.
    del model
    _copy_files(folder, dest)
    _verify(model_class, dest, tensors)
    _print_tensors(tensors)


def _check_dest(dest: Path, source: str, overwrite: bool) -> None:
    if dest.exists() and not dest.is_dir():
        raise FileExistsError(f"DEST {dest} is a file: name a folder")
    place, origin = dest.resolve(), Path(source).expanduser().resolve()
    if origin.is_dir() and place in (origin, origin / VQGAN_FOLDER, *origin.parents) and place.exists():
        raise ValueError(f"DEST {dest} holds SOURCE {source}: write to another folder")
    if dest.is_dir() and any(dest.iterdir()) and not overwrite:
        raise FileExistsError(f"DEST {dest} is not empty: give another folder, or --overwrite to replace all of it")


def _check_shard_size(size: str) -> None:
    found = _SIZE.fullmatch(size.strip().upper())
    if not found or not float(found[1]):
        raise ValueError(f"--max-shard-size {size} is no size: give a number and its unit, KB, MB, GB or TB, as in 5GB")


@contextmanager
def _new_folder(dest: Path) -> Iterator[Path]:
    """`atomic_folder`, made before the work so that it is not in vain; of a failure no folder above it is left either.

    Raises:
        OSError: nothing can be written there.
    """
    from dalle_torch.storage import atomic_folder

    missing = [path for path in dest.resolve().parents if not path.exists()]
    try:
        with ExitStack() as stack:
            try:
                temporary = stack.enter_context(atomic_folder(dest))
            except OSError as error:
                raise type(error)(f"cannot write to DEST {dest}: {error.strerror or error}") from error
            yield temporary
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


def _classes(model_type: str) -> "list[type[CheckpointModel]]":
    found: list[type[CheckpointModel]] = []
    if model_type in ("auto", "dallebart"):
        from dalle_torch.models.dalle_bart import DalleBart

        found.append(DalleBart)
    if model_type in ("auto", "vqgan"):
        from dalle_torch.models.vqgan import VQGAN

        found.append(VQGAN)
    return found


def _pick_class(classes: "list[type[CheckpointModel]]", folder: Path, source: str) -> "type[CheckpointModel]":
    """By the type or keys of `config.json`; where there is none, by the format of the weights."""
    values = _read_json(folder / "config.json")
    known = {model_class.config_class.model_type: model_class for model_class in classes}
    if "model_type" in values:
        if values["model_type"] not in known:
            raise ValueError(f"{source} holds a model of type {values['model_type']!r}, not one of {', '.join(known)}")
        return known[values["model_type"]]
    if values:
        keys = [set(values) & set(model_class.config_class.__annotations__) for model_class in classes]
        return classes[max(range(len(classes)), key=lambda i: len(keys[i]))]
    fitting = [item for item in classes if any(form.is_in(folder) for form in item.foreign_formats)]
    if len(fitting) != 1:
        held = "either a DalleBart or a VQGAN" if fitting else "neither a config.json nor weights of a known format"
        raise ValueError(f"{source} holds {held}: choose one with --model-type")
    return fitting[0]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none or it is damaged, which loading then reports."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_config(model_class: "type[CheckpointModel]", name: str) -> Any:
    from dalle_torch.models.configuration import told_of

    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--config {name}: there is no such file")
    values = _read_json(path)
    if not values:
        raise ValueError(f"--config {name} is no JSON object of options")
    with told_of(f"--config {name}"):
        return model_class.config_class.from_dict(values)


def _copy_files(folder: Path, temporary: Path) -> None:
    for path in folder.iterdir():
        wanted = any(fnmatch(path.name, pattern) for pattern in KEPT_FILES)
        if wanted and path.is_file() and not (temporary / path.name).exists():
            shutil.copyfile(path, temporary / path.name)


def _digests(tensors: "Mapping[str, Tensor]") -> dict[str, tuple[list[int], str, int, str]]:
    """name -> (shape, dtype, bytes, sha256 of the content)."""
    import torch

    return {
        name: (
            list(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            tensor.nbytes,
            hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest(),
        )
        for name, tensor in tensors.items()
    }


def _verify(
    model_class: "type[CheckpointModel]", folder: Path, tensors: dict[str, tuple[list[int], str, int, str]]
) -> None:
    """Reload `folder` and compare every tensor, bit by bit.

    Raises:
        CheckpointError: a tensor came back different.
    """
    from dalle_torch.storage import CheckpointError

    reloaded = _digests(model_class.from_pretrained(folder).state_dict())
    wrong = sorted(name for name in tensors.keys() | reloaded.keys() if tensors.get(name) != reloaded.get(name))
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors differ after reloading, nothing is kept: {', '.join(wrong)}")


def _print_tensors(tensors: dict[str, tuple[list[int], str, int, str]]) -> None:
    rows = [(name, "x".join(map(str, shape)) or "scalar", dtype) for name, (shape, dtype, _, _) in tensors.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for name, shape, dtype in rows:
        print(f"{name:{widths[0]}}  {shape:>{widths[1]}}  {dtype}")

    numbers = sum(math.prod(shape) for shape, _, _, _ in tensors.values())
    size = sum(size for _, _, size, _ in tensors.values())
    print(f"{len(tensors)} tensors, {numbers:,} parameters, {size:,} bytes")
