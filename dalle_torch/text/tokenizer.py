"""The tokenizer of DALL·E Mini and Mega: a BART-like byte-level BPE, run as its `tokenizer.json` describes it.

Owns: loading and saving, in the layouts the published models have. Does not own: normalisation, padding, batches
(`normalizer`, `processor`).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from dalle_torch.storage import resolve

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

TOKENIZER_FILES: Mapping[str, str] = {
    "tokenizer_file": "tokenizer.json",
    "vocab_file": "vocab.json",
    "merges_file": "merges.txt",
}
COMPANION_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_BART_SPECIAL_TOKENS: Mapping[str, str | AddedToken] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": AddedToken("<mask>", lstrip=True, special=True, normalized=False),
}


class DalleBartTokenizer(PreTrainedTokenizerFast):
    """Text to ids, equal to those of the `tokenizers` library on the same `tokenizer.json`.

    `from_pretrained` takes a source with a `tokenizer.json`, whatever `tokenizer_class` its
    `tokenizer_config.json` names, or with the older pair of `vocab.json` and `merges.txt`, which are run as BART's
    tokenizer (they hold no normalizer and no post-processor of their own). `save_pretrained` writes `tokenizer.json`.

    The original (borisdayma/dalle-mini, `dalle_mini/model/tokenizer.py`) derives from `BartTokenizerFast`. That class
    rebuilds the tokenizer in transformers 5 and loses the normalizer and the post-processor of the file.
    """

    # The base class takes tokenizer.json as it is only for subclasses that have no __init__ of their own.
    vocab_files_names: ClassVar[dict[str, str]] = dict(TOKENIZER_FILES)
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """As `PreTrainedTokenizerBase.from_pretrained`, with any source that `storage.resolve` knows.

        Raises:
            OSError: the source, or the tokenizer in it, is not there or cannot be reached.
            ValueError: the files are not those of a tokenizer.
        """
        folder = resolve(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            subfolder=subfolder,
            local_files_only=local_files_only,
            allow_patterns=[*TOKENIZER_FILES.values(), *COMPANION_FILES],
        )
        try:
            tokenizer: Self = super().from_pretrained(folder, *args, **kwargs)
        except OSError:
            raise
        except Exception as error:
            # The Rust library raises bare exceptions, the JSON of a broken file any kind of them.
            reason = " ".join(f"{error}".split()) or type(error).__name__
            raise ValueError(f"the tokenizer of {pretrained_model_name_or_path} cannot be read: {reason}") from error
        tokenizer.name_or_path = os.fspath(pretrained_model_name_or_path)
        return tokenizer

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Arguments of the constructor out of the files found; called by `from_pretrained`.

        Raises:
            FileNotFoundError: there is neither a `tokenizer.json` nor the older pair.
        """
        vocab_file, merges_file = kwargs.pop("vocab_file", None), kwargs.pop("merges_file", None)
        if kwargs.get("tokenizer_file") or kwargs.get("tokenizer_object"):
            _name_special_tokens(kwargs)
            native: dict[str, Any] = super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)
            return native
        if not (vocab_file and merges_file):
            raise FileNotFoundError(
                f"{kwargs.get('name_or_path')} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt"
            )
        return _bart_arguments(Path(vocab_file), Path(merges_file), kwargs)


def _name_special_tokens(kwargs: dict[str, Any]) -> None:
    """Give roles that no file assigns to the added tokens that play them in BART, for a `tokenizer.json` by itself."""
    known = {str(token): token for token in kwargs.get("added_tokens_decoder", {}).values()}
    for role, token in _BART_SPECIAL_TOKENS.items():
        if kwargs.get(role) is None and str(token) in known:
            kwargs[role] = known[str(token)]


def _bart_arguments(vocab_file: Path, merges_file: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with a backend like that of BART's tokenizer, and with BART's special tokens where none are named."""
    backend = Tokenizer(BPE.from_file(str(vocab_file), str(merges_file), fuse_unk=False))
    for role, token in _BART_SPECIAL_TOKENS.items():
        if kwargs.get(role) is None and backend.token_to_id(str(token)) is not None:
            kwargs[role] = token
    names = {role: str(kwargs.get(role, _BART_SPECIAL_TOKENS[role])) for role in ("sep_token", "cls_token")}
    ends = [(name, index) for name in names.values() if (index := backend.token_to_id(name)) is not None]
    if len(ends) < len(names):
        missing = ", ".join(f"{role}={name!r}" for role, name in names.items() if backend.token_to_id(name) is None)
        raise ValueError(f"{vocab_file.name} lacks {missing}, which stand at the ends of every prompt")
    separator, start = ends
    prefix, trim = bool(kwargs.get("add_prefix_space", False)), bool(kwargs.get("trim_offsets", True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(separator, start, trim_offsets=trim, add_prefix_space=prefix)
    return kwargs | {"tokenizer_object": backend}


def register_auto_tokenizer(config_class: "type[PreTrainedConfig]") -> None:
    """Make `AutoTokenizer` answer with `DalleBartTokenizer` for models of `config_class`, under any `tokenizer_class`.

    `AutoTokenizer.register` alone is not enough for folders whose `tokenizer_config.json` names `BartTokenizerFast`:
    transformers trusts that name over the registered class unless the model type is listed as one that names a wrong
    class.
    """
    from transformers.models.auto import tokenization_auto

    tokenization_auto.AutoTokenizer.register(config_class, DalleBartTokenizer, exist_ok=True)
    tokenization_auto.TOKENIZER_MAPPING_NAMES[config_class.model_type] = DalleBartTokenizer.__name__
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(config_class.model_type)
