"""Prompts to tensors: shapes, padding, truncation, the empty prompt, where normalisation applies, bad input."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dalle_torch.text import DalleBartProcessor, DalleBartTokenizer, TextNormalizer
from tests.helpers import GOLDENS

Save = Callable[..., Path]
KEYS = ["input_ids", "attention_mask", "input_ids_uncond", "attention_mask_uncond"]


@pytest.fixture
def tokenizer(save: Save) -> DalleBartTokenizer:
    return DalleBartTokenizer.from_pretrained(save())


@pytest.fixture
def processor(tokenizer: DalleBartTokenizer) -> DalleBartProcessor:
    return DalleBartProcessor(tokenizer, None, 64)


@pytest.fixture
def normalizing(tokenizer: DalleBartTokenizer) -> DalleBartProcessor:
    return DalleBartProcessor(tokenizer, TextNormalizer(GOLDENS / "text" / "words-frequency.txt"), 64)


@pytest.mark.parametrize(("prompts", "rows"), [("a cat", 1), (["a cat"], 1), (("a cat", "", "a DOG"), 3)])
def test_tensors_have_their_shape(processor: DalleBartProcessor, prompts: Any, rows: int) -> None:
    batch = processor(prompts)
    assert list(batch) == KEYS
    for tensor in batch.values():
        assert type(tensor) is torch.Tensor
        assert tensor.shape == (rows, 64)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


def test_ids_are_the_tokenizers_padded_with_its_padding_token(
    processor: DalleBartProcessor, backend: Tokenizer
) -> None:
    prompts = ["a small red circle", "An ARMCHAIR"]
    batch = processor(prompts)
    for row, prompt in enumerate(prompts):
        ids = backend.encode(prompt).ids
        assert batch["input_ids"][row].tolist() == ids + [1] * (64 - len(ids))
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (64 - len(ids))
    assert batch["input_ids_uncond"].tolist() == [[0, 2] + [1] * 62] * 2
    assert batch["attention_mask_uncond"].tolist() == [[1, 1] + [0] * 62] * 2


def test_a_prompt_is_the_same_alone_and_in_a_batch(processor: DalleBartProcessor) -> None:
    prompts = ["a cat", "a small red circle to the left of a large blue square", ""]
    together = processor(prompts)
    for row, prompt in enumerate(prompts):
        alone = processor(prompt)
        assert all(torch.equal(alone[key][0], together[key][row]) for key in KEYS)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_empty_prompt_is_the_unconditional_one(
    processor: DalleBartProcessor, normalizing: DalleBartProcessor, prompt: str
) -> None:
    for one in (processor, normalizing):
        batch = one(["a cat", prompt])
        assert torch.equal(batch["input_ids"][1], batch["input_ids_uncond"][1])
        assert torch.equal(batch["attention_mask"][1], batch["attention_mask_uncond"][1])
        assert not torch.equal(batch["input_ids"][0], batch["input_ids_uncond"][0])


@pytest.mark.parametrize("prompt", ["...", "\x00\x01", "<b></b>", "http://example.com"])
def test_prompt_that_normalises_to_nothing_is_the_unconditional_one(
    normalizing: DalleBartProcessor, prompt: str
) -> None:
    batch = normalizing(prompt)
    assert torch.equal(batch["input_ids"], batch["input_ids_uncond"])


def test_long_prompt_is_cut_with_one_warning(
    processor: DalleBartProcessor, caplog: pytest.LogCaptureFixture, backend: Tokenizer
) -> None:
    with caplog.at_level(logging.WARNING):
        fits = processor("a cat")
        assert not caplog.records
        batch = processor(["a cat", "a cat " * 1667, "\x00 😺" * 3333])
        processor("a cat " * 100)
    assert len(caplog.records) == 1
    assert "2 of 3 prompts (the first is number 2) have more than 64 tokens" in caplog.records[0].getMessage()
    assert batch["input_ids"].shape == (3, 64)
    assert batch["input_ids"][1].tolist() == [*backend.encode("a cat " * 100).ids[:63], 2]
    assert batch["attention_mask"][1:].all()
    assert torch.equal(batch["input_ids"][0], fits["input_ids"][0])


def test_prompt_of_exactly_the_length_is_whole(
    tokenizer: DalleBartTokenizer, caplog: pytest.LogCaptureFixture, backend: Tokenizer
) -> None:
    ids = backend.encode("a small red circle").ids
    with caplog.at_level(logging.WARNING):
        batch = DalleBartProcessor(tokenizer, None, len(ids))("a small red circle")
        assert not caplog.records
        DalleBartProcessor(tokenizer, None, len(ids) - 1)("a small red circle")
        assert len(caplog.records) == 1
    assert batch["input_ids"].tolist() == [ids]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(st.characters(exclude_categories=()), max_size=150))
def test_any_prompt_is_tokenised(processor: DalleBartProcessor, normalizing: DalleBartProcessor, prompt: str) -> None:
    for one in (processor, normalizing):
        batch = one([prompt])
        length = int(batch["attention_mask"].sum())
        assert batch["input_ids"][0, 0] == 0
        assert batch["input_ids"][0, length - 1] == 2
        assert (batch["attention_mask"][0, :length] == 1).all()
        assert (batch["input_ids"][0, length:] == 1).all()


def test_lone_surrogates_read_as_the_replacement_character_and_pairs_as_one(processor: DalleBartProcessor) -> None:
    batch = processor(["a\ud83dcat", "a\ufffdcat", "\ud83d\ude3a", "😺", "\ufeffcat"])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert torch.equal(batch["input_ids"][2], batch["input_ids"][3])
    assert not torch.equal(batch["input_ids"][4], processor("cat")["input_ids"][0])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is an empty list"),
        (None, r"must be a string or a list of strings, not None \(NoneType\)"),
        (3, r"not 3 \(int\)"),
        (b"a cat", r"not b'a cat' \(bytes\)"),
        ({"a": 1}, r"not \{'a': 1\} \(dict\)"),
        (["a", 3, "b", None], r"prompts\[1\] is 3 \(int\), prompts\[3\] is None \(NoneType\)"),
        ([["a"]], r"prompts\[0\] is \['a'\] \(list\)"),
    ],
)
def test_what_is_no_prompt_is_refused(processor: DalleBartProcessor, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        processor(prompts)
    assert "\n" not in str(caught.value)


def test_unusable_processor_names_every_problem(save: Save) -> None:
    tokenizer = DalleBartTokenizer.from_pretrained(save())
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*; max_text_length=2 must exceed the 2 tokens"):
        DalleBartProcessor(tokenizer, None, 2)


@pytest.mark.parametrize("layout", ["DalleBartTokenizer", "BartTokenizerFast", "older", "bare"])
@pytest.mark.parametrize(("wanted", "kind"), [(True, TextNormalizer), (False, type(None)), (None, type(None))])
def test_normalisation_applies_where_the_model_says_so(save: Save, layout: str, wanted: Any, kind: type) -> None:
    keys = {} if wanted is None else {"normalize_text": wanted}
    processor = DalleBartProcessor.from_pretrained(save(layout, max_text_length=16, encoder_vocab_size=400, **keys))
    assert type(processor.normalizer) is kind
    assert processor.max_text_length == 16
    assert processor("a cat")["input_ids"].shape == (1, 16)


def test_configuration_is_overridden_on_request(save: Save) -> None:
    folder = save(normalize_text=True)
    assert DalleBartProcessor.from_pretrained(folder, normalize_text=False).normalizer is None
    assert DalleBartProcessor.from_pretrained(folder).max_text_length == 64


def test_subfolder(save: Save) -> None:
    folder = save(normalize_text=True)
    processor = DalleBartProcessor.from_pretrained(folder.parent, subfolder=folder.name)
    assert isinstance(processor.normalizer, TextNormalizer)


@pytest.mark.parametrize("normalize_text", [True, False])
def test_saving_and_loading_keeps_everything(save: Save, tmp_path: Path, normalize_text: bool) -> None:
    first = DalleBartProcessor.from_pretrained(save(normalize_text=normalize_text, max_text_length=20))
    target = tmp_path / "new" / "folder"
    first.save_pretrained(target)
    assert sorted(path.name for path in target.iterdir()) == [
        "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    second = DalleBartProcessor.from_pretrained(target)
    assert (second.normalizer is not None) == normalize_text
    prompts = ["A cat!", "", "an armchair in the shape of an avocado " * 3]
    assert all(torch.equal(first(prompts)[key], second(prompts)[key]) for key in KEYS)


def test_saving_beside_a_model_leaves_its_configuration_which_still_decides(save: Save) -> None:
    folder = save(normalize_text=True)
    before = (folder / "config.json").read_text()
    processor = DalleBartProcessor.from_pretrained(folder, normalize_text=False)
    processor.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert (folder / "config.json").read_text() == before
    assert isinstance(DalleBartProcessor.from_pretrained(folder).normalizer, TextNormalizer)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_failed_saving_leaves_the_old_files(
    processor: DalleBartProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor.save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(DalleBartTokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="the disk is full"):
        processor.save_pretrained(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_file_in_the_place_of_the_folder_is_refused(processor: DalleBartProcessor, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("here already")
    with pytest.raises(FileExistsError):
        processor.save_pretrained(tmp_path / "out")


def test_folder_without_configuration_is_refused(save: Save) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither config\.json nor processor_config\.json"):
        DalleBartProcessor.from_pretrained(save())


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DalleBartProcessor.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"normalize_text": "yes", "max_text_length": 3.5}', "normalize_text='yes' .*max_text_length=3.5"),
        ('{"max_text_length": true}', "max_text_length=True"),
        ('{"max_text_length": 0}', "max_text_length=0 must exceed"),
        ('{"encoder_vocab_size": 50}', r"tokenizer has \d+ tokens and the model's encoder_vocab_size is 50"),
    ],
)
def test_malformed_configuration_is_refused(save: Save, content: str, message: str) -> None:
    folder = save()
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        DalleBartProcessor.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_configuration_may_hold_more(save: Save) -> None:
    folder = save(max_text_length=12, encoder_layers=3)
    config = json.loads((folder / "config.json").read_text())
    assert DalleBartProcessor.from_pretrained(str(folder)).max_text_length == config["max_text_length"]
