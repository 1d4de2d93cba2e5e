"""The parts of a pipeline, found by name: model, processor, VQGAN, and a hash that says which weights drew a picture.

Owns: which VQGAN goes with which model, the notice of the published ones. Does not own:
downloads (`storage`), weights (`models.loading`).
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from dalle_torch.log import get_logger
from dalle_torch.storage import WEIGHT_FORMATS, resolve, sha256_of
from dalle_torch.storage.embedded import EMBEDDED, located

if TYPE_CHECKING:
    from dalle_torch.models.configuration import DalleBartConfig
    from dalle_torch.models.vqgan import VQGAN
    from dalle_torch.text import DalleBartProcessor

logger = get_logger(__name__)

Source = str | os.PathLike[str]

DEFAULT_VQGAN = "dalle-mini/vqgan_imagenet_f16_16384"
"""What DALL·E Mini and Mega were trained with."""

MAX_SPECIAL_TOKENS = 64
"""Image tokens beyond the codebook that a decoder may have; DALL·E Mega has 31. More means another VQGAN."""

_FILLING = (
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.nn.init.normal_,
    torch.nn.init.uniform_,
    torch.nn.init.kaiming_uniform_,
)
_VQGAN_FOLDER = "vqgan"
_MIN_DALLE_VQGAN = "detoker.pt"
_PUBLISHED = re.compile(r"(^|/)dalle-mini/(dalle-(mini|mega)|mega-1|mini-1)\b")
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(/|$)")


class MetaTensorsAreNotFilled(TorchFunctionMode):
    """Leaves out random start values of tensors on the meta device, which hold none.

    Models are built there before their weights are read. Filling nothing would cost the import of torch's
    decompositions, of the compiler and of sympy: more than all else that a small model takes to load.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def load_processor(model: Source, config: "DalleBartConfig", **hub_options: Any) -> "DalleBartProcessor":
    """The model's own processor; where a folder has a tokenizer but no `config.json`, as `config` would have it.

    Raises:
        OSError: there is no tokenizer.
        ValueError: a file is malformed, or the tokenizer has more tokens than the model.
    """
    from dalle_torch.text import DalleBartProcessor, DalleBartTokenizer, TextNormalizer

    folder = Path(model) / (hub_options.get("subfolder") or "")
    if not folder.is_dir() or any((folder / name).is_file() for name in ("config.json", "processor_config.json")):
        return DalleBartProcessor.from_pretrained(model, **hub_options)
    tokenizer = DalleBartTokenizer.from_pretrained(folder)
    if len(tokenizer) > config.encoder_vocab_size:
        vocabulary = config.encoder_vocab_size
        raise ValueError(f"{model}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocabulary}")
    return DalleBartProcessor(tokenizer, TextNormalizer() if config.normalize_text else None, config.max_text_length)


def load_vqgan(model: Source, vqgan: "Source | VQGAN | None", vqgan_revision: str | None, **options: Any) -> "VQGAN":
    """The VQGAN that was asked for; None: the model's own, else `DEFAULT_VQGAN`.

    Args:
        model: where the model comes from, as `located` gives it.
        vqgan_revision: revision of `vqgan` where it is a hub id of its own.
        options: of `VQGAN.from_pretrained`; `revision` and `subfolder` are the model's.
    """
    from dalle_torch.models.vqgan import VQGAN

    if isinstance(vqgan, VQGAN):
        return vqgan
    # Decoding is a small part of the work, and half precision shows in smooth surfaces.
    options["dtype"] = "float32"
    if vqgan is None:
        subfolder = "/".join(filter(None, [options.get("subfolder"), _VQGAN_FOLDER]))
        if _has_own_vqgan(model, subfolder, options):
            return VQGAN.from_pretrained(model, **options | {"subfolder": subfolder})
        if (Path(model) / (options.get("subfolder") or "") / _MIN_DALLE_VQGAN).is_file():
            return VQGAN.from_pretrained(model, **options)
        logger.info("%s brings no VQGAN: %s is used", model, DEFAULT_VQGAN)
    source = DEFAULT_VQGAN if vqgan is None else located(vqgan)
    elsewhere = {"revision": vqgan_revision, "subfolder": _VQGAN_FOLDER if source in EMBEDDED.values() else ""}
    return VQGAN.from_pretrained(source, **options | elsewhere)


def _has_own_vqgan(model: Source, subfolder: str, options: Mapping[str, Any]) -> bool:
    """Whether `model` brings one. Where nobody can be asked the cache decides: what was drawn with before is there."""
    hub = {name: options.get(name) for name in ("revision", "token", "cache_dir")}
    try:
        folder = resolve(
            model, **hub, subfolder=subfolder, allow_patterns=["config.json"],
            local_files_only=bool(options.get("local_files_only")),
        )  # fmt: skip
    except (FileNotFoundError, ConnectionError):
        return False
    return (folder / "config.json").is_file()


def check_match(model: Any, vqgan: Any) -> None:
    """Refuse a VQGAN that the model's tokens cannot be codes of.

    Raises:
        ValueError: grids of different size, or a codebook that does not go with the model's image tokens.
    """
    problems = []
    codes, tokens = vqgan.config.image_length, model.config.image_length
    if codes != tokens:
        problems.append(f"the VQGAN has {codes} codes a picture (image_length) and the model draws {tokens}")
    entries, vocabulary = vqgan.config.n_embed, model.config.image_vocab_size
    if not entries <= vocabulary <= entries + MAX_SPECIAL_TOKENS:
        problems.append(
            f"the VQGAN's codebook has {entries} entries (n_embed) and the model {vocabulary} image tokens "
            f"(image_vocab_size), which must be as many or up to {MAX_SPECIAL_TOKENS} more, for special tokens"
        )
    if problems:
        raise ValueError(f"model and VQGAN do not belong together: {'; '.join(problems)}")


@cache
def show_notice(source: str) -> None:
    """Say once what the model card of a published DALL·E Mini or Mega asks of its users."""
    if _PUBLISHED.search(source):
        logger.info(
            "%s was published for research and personal use. It learnt from uncurated pictures of the web: it mirrors "
            "their social biases, draws faces and text badly and may draw what offends. Do not use it to demean, "
            "deceive or pass off as fact; its model card on the Hugging Face hub has the full terms",
            source,
        )


def weights_hash(source: Source, **hub_options: Any) -> str | None:
    """Which weights a source holds: "commit:..." for a hub snapshot, else "sha256:..." over its weight files.

    Several files count as one, their hashes hashed in order of their names. None where nothing is to be found.
    """
    options = {name: hub_options.get(name) for name in ("revision", "token", "cache_dir", "subfolder")}
    try:
        # What was loaded a moment ago is in the cache.
        folder = resolve(source, **options, local_files_only=True, allow_patterns=["*.json"])
    except (OSError, ValueError):
        return None
    if snapshot := _SNAPSHOT.search(folder.as_posix()):
        return f"commit:{snapshot[1]}"
    for patterns in WEIGHT_FORMATS:
        files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.suffix != ".json")
        if files:
            hashes = [sha256_of(path) for path in files]
            total = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
            return f"sha256:{total}"
    return None
