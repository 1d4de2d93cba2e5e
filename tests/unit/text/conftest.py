"""A small tokenizer of the kind the published models have, in the layouts that are found on the hub."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ROLES = {
    "bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
    "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>",
}  # fmt: skip
SENTENCES = [
    "a small red circle to the left of a large blue square on a white background",
    "an armchair in the shape of an avocado",
    "a photo of a cat on the beach at sunset, painted by a robot",
    "the Eiffel tower under the night sky of the milky way",
]


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    """Byte-level BPE with BART's ids and ends; it lower-cases, so that a lost normalizer changes ids."""
    tokenizer = Tokenizer(BPE(fuse_unk=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


@pytest.fixture
def save(backend: Tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """Writes the tokenizer as `layout` says, and a model's `config.json` with the keys given."""

    def write(layout: str = "DalleBartTokenizer", **config: object) -> Path:
        folder = tmp_path / f"model-{layout}"
        folder.mkdir(exist_ok=True)
        if layout == "older":
            backend.model.save(str(folder))
        else:
            backend.save(str(folder / "tokenizer.json"))
        if layout not in ("older", "bare"):
            described = ROLES | {"tokenizer_class": layout, "model_max_length": 1024, "add_prefix_space": False}
            (folder / "tokenizer_config.json").write_text(json.dumps(described))
            mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
            (folder / "special_tokens_map.json").write_text(json.dumps(ROLES | {"mask_token": mask}))
        if config:
            (folder / "config.json").write_text(json.dumps({"model_type": "dallebart"} | config))
        return folder

    return write
