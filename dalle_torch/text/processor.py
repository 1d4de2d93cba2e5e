"""Prompts to the tensors that `DalleBart` reads, each with its unconditional twin for super conditioning.

Owns: when prompts are normalised, padding and truncation, the empty prompt. Does not own: how text is normalised
(`normalizer`) or cut into tokens (`tokenizer`).
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_torch.log import get_logger
from dalle_torch.storage import atomic_file, resolve
from dalle_torch.text.normalizer import TextNormalizer
from dalle_torch.text.tokenizer import COMPANION_FILES, TOKENIZER_FILES, DalleBartTokenizer

if TYPE_CHECKING:
    import torch

logger = get_logger(__name__)

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "processor_config.json"
_MAX_TEXT_LENGTH = 64
"""What a configuration means that leaves `max_text_length` out."""


class DalleBartProcessor:
    """Prompts to ids and masks (borisdayma/dalle-mini, `dalle_mini/model/processor.py`).

    Args:
        tokenizer: Has a padding token.
        normalizer: Applied to each prompt first; `None` leaves prompts as they are. The models that want
            `TextNormalizer` say `normalize_text: true` in their configuration.
        max_text_length: Tokens in a prompt, those at its ends included. Shorter prompts are padded to it; longer ones
            are cut, with one warning in the life of the processor.

    Raises:
        ValueError: the tokenizer has no padding token, or `max_text_length` leaves no room for a prompt.
    """

    def __init__(
        self,
        tokenizer: DalleBartTokenizer,
        normalizer: Callable[[str], str] | None = None,
        max_text_length: int = _MAX_TEXT_LENGTH,
    ) -> None:
        ends = tokenizer.num_special_tokens_to_add()
        problems = []
        if tokenizer.pad_token_id is None:
            problems.append("the tokenizer has no padding token: set its pad_token")
        if max_text_length <= ends:
            problems.append(f"max_text_length={max_text_length} must exceed the {ends} tokens at the ends of a prompt")
        if problems:
            raise ValueError("DalleBartProcessor cannot be used: " + "; ".join(problems))
        self.tokenizer = tokenizer
        self.normalizer = normalizer
        self.max_text_length = max_text_length
        self._warned = False

    def __call__(self, prompts: str | Sequence[str]) -> dict[str, "torch.Tensor"]:
        """Tokenise one prompt or several.

        A prompt of which nothing is left but white space gives the same ids as the unconditional one.

        Returns:
            int64 tensors [B, max_text_length]: `input_ids`, `attention_mask` (1 at tokens, 0 at padding), and
            `input_ids_uncond`, `attention_mask_uncond` of the empty prompt, once for each prompt.

        Raises:
            ValueError: there is no prompt, or some are not strings; all of them are named.
        """
        texts = [self._prepare(prompt) for prompt in _as_list(prompts)]
        encoded = self.tokenizer(
            [*texts, ""],
            padding="max_length",
            truncation=True,
            max_length=self.max_text_length,
            return_tensors="pt",
        )
        self._warn_of_truncation([bool(encoding.overflowing) for encoding in encoded.encodings[:-1]])
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        return {
            "input_ids": ids[:-1].clone(),
            "attention_mask": mask[:-1].clone(),
            "input_ids_uncond": ids[-1:].repeat(len(texts), 1),
            "attention_mask_uncond": mask[-1:].repeat(len(texts), 1),
        }

    def _prepare(self, prompt: str) -> str:
        # Halves of a UTF-16 pair reach Python through JSON and file names, and the tokenizer cannot encode them.
        text = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self.normalizer is not None:
            text = self.normalizer(text)
        return text if text.strip() else ""

    def _warn_of_truncation(self, truncated: list[bool]) -> None:
        if self._warned or not any(truncated):
            return
        self._warned = True
        numbers = [number for number, cut in enumerate(truncated, 1) if cut]
        logger.warning(
            "%d of %d prompts (the first is number %d) have more than %d tokens, the rest of which is not read; "
            "this is said once",
            len(numbers), len(truncated), numbers[0], self.max_text_length,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        normalize_text: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
    ) -> "DalleBartProcessor":
        """The processor of a model: its tokenizer, and normalisation where its `config.json` says `normalize_text`.

        A folder with no `config.json` is read by the `processor_config.json` that `save_pretrained` writes.

        Args:
            source: folder, hub id, wandb artifact or URL of a folder, as `storage.resolve`.
            normalize_text: overrides what the configuration says.

        Raises:
            OSError: the source, its tokenizer or its configuration is not there or cannot be reached.
            ValueError: a file is malformed, or the tokenizer has more tokens than the model.
        """
        folder = resolve(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            subfolder=subfolder,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG_FILE, PROCESSOR_FILE, *TOKENIZER_FILES.values(), *COMPANION_FILES],
        )
        config = _read_config(folder, source)
        tokenizer = DalleBartTokenizer.from_pretrained(folder)
        vocabulary = config.get("encoder_vocab_size")
        if vocabulary is not None and len(tokenizer) > vocabulary:
            raise ValueError(
                f"{source}: the tokenizer has {len(tokenizer)} tokens and the model's encoder_vocab_size is "
                f"{vocabulary}: they do not belong together"
            )
        wanted = config.get("normalize_text", False) if normalize_text is None else normalize_text
        normalizer = TextNormalizer() if wanted else None
        return cls(tokenizer, normalizer, config.get("max_text_length", _MAX_TEXT_LENGTH))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files and `processor_config.json` into `folder`, each whole or not at all.

        That a normalizer is there is recorded, not which: `from_pretrained` builds a `TextNormalizer`.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "processor_class": type(self).__name__,
            "normalize_text": self.normalizer is not None,
            "max_text_length": self.max_text_length,
        }
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as name:
            workplace = Path(name)
            self.tokenizer.save_pretrained(workplace)
            (workplace / PROCESSOR_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for file in sorted(workplace.iterdir()):
                with atomic_file(folder / file.name) as target:
                    file.replace(target)


def _as_list(prompts: str | Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise ValueError(f"prompts must be a string or a list of strings, not {_shown(prompts)}")
    if not prompts:
        raise ValueError("prompts is an empty list: give one prompt or more ('' draws unconditionally)")
    wrong = [f"prompts[{index}] is {_shown(item)}" for index, item in enumerate(prompts) if not isinstance(item, str)]
    if wrong:
        raise ValueError("every prompt must be a string: " + ", ".join(wrong))
    return list(prompts)


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def _read_config(folder: Path, source: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The keys of the model's configuration, or of the processor's where there is no model."""
    path = next((folder / name for name in (CONFIG_FILE, PROCESSOR_FILE) if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{source} has neither {CONFIG_FILE} nor {PROCESSOR_FILE}: give the folder of a model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} of {source} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} of {source} holds no JSON object but {_shown(config)}")
    kinds = {"normalize_text": bool, "max_text_length": int, "encoder_vocab_size": int}
    wrong = [key for key, kind in kinds.items() if key in config and type(config[key]) is not kind]
    if wrong:
        found = ", ".join(f"{key}={_shown(config[key])} where a {kinds[key].__name__} is due" for key in wrong)
        raise ValueError(f"{path.name} of {source} has {found}")
    return config
