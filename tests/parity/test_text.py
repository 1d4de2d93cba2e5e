"""Prompts come out as the original's text processing left them."""

import json

import pytest
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from dalle_torch.text import DalleBartProcessor, DalleBartTokenizer, TextNormalizer
from tests.helpers import GOLDENS

WORDS = GOLDENS / "text" / "words-frequency.txt"
PAIRS = json.loads((GOLDENS / "text" / "normalized.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def normalizer() -> TextNormalizer:
    return TextNormalizer(WORDS)


@pytest.mark.parametrize("pair", PAIRS, ids=[pair["input"][:24] for pair in PAIRS])
def test_normalised_as_by_the_original(normalizer: TextNormalizer, pair: dict[str, str]) -> None:
    assert normalizer(pair["input"]) == pair["output"]


def test_batches_are_padded_as_by_the_original(normalizer: TextNormalizer) -> None:
    """Token 1 pads to 64 places, and the mask is 1 at the tokens and the two ends, 0 at the padding."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted({word for pair in PAIRS for word in pair["output"].split()})]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = DalleBartTokenizer(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    prompts = [pair["input"] for pair in PAIRS]
    batch = DalleBartProcessor(tokenizer, normalizer, 64)(prompts)
    for row, pair in enumerate(PAIRS):
        ids = backend.encode(pair["output"]).ids
        assert batch["input_ids"][row].tolist() == ids + [1] * (64 - len(ids))
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (64 - len(ids))
        assert batch["input_ids_uncond"][row].tolist() == [0, 2] + [1] * 62
        assert batch["attention_mask_uncond"][row].tolist() == [1, 1] + [0] * 62
