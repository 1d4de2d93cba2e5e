"""The tokenizer gives the ids of its files, however those are laid out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoConfig, AutoTokenizer

from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.text import DalleBartTokenizer
from dalle_torch.text.tokenizer import register_auto_tokenizer

LAYOUTS = ["DalleBartTokenizer", "BartTokenizerFast", "BartTokenizer", "PreTrainedTokenizerFast"]
TEXTS = [
    "",
    " ",
    "a cat",
    "A CAT on the Beach",
    " an armchair\n\tof 12 avocados!",
    "日本の猫 \x00 \x7f",
    "x<mask> </s>y",
    "a  cat",
]

Save = Callable[..., Path]


def ids_of(tokenizer: DalleBartTokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_the_file_for_every_layout(save: Save, layout: str) -> None:
    folder = save(layout)
    tokenizer = DalleBartTokenizer.from_pretrained(folder)
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [ids_of(tokenizer, text) for text in TEXTS] == [truth.encode(text).ids for text in TEXTS]
    assert tokenizer.pad_token_id == 1
    assert len(tokenizer) == truth.get_vocab_size()


def test_normalizer_and_post_processor_of_the_file_survive(save: Save) -> None:
    tokenizer = DalleBartTokenizer.from_pretrained(save("BartTokenizerFast"))
    ids = ids_of(tokenizer, "A CAT")
    assert ids == ids_of(tokenizer, "a cat")
    assert (ids[0], ids[-1]) == (0, 2)
    assert len(ids) == 4


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(max_size=80))
def test_ids_are_those_of_the_tokenizers_library_for_any_text(
    backend: Tokenizer, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    assert ids_of(loaded(backend, tmp_path_factory), text) == backend.encode(text).ids


def loaded(
    backend: Tokenizer,
    factory: pytest.TempPathFactory,
    cache: dict[int, DalleBartTokenizer] = {},  # noqa: B006
) -> DalleBartTokenizer:
    if id(backend) not in cache:
        folder = factory.mktemp("tokenizer")
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BartTokenizerFast"}))
        cache[id(backend)] = DalleBartTokenizer.from_pretrained(folder)
    return cache[id(backend)]


@pytest.mark.parametrize("layout", [*LAYOUTS, "bare", "older"])
def test_saving_and_loading_keeps_ids(save: Save, tmp_path: Path, layout: str) -> None:
    first = DalleBartTokenizer.from_pretrained(save(layout))
    first.save_pretrained(tmp_path / "again")
    second = DalleBartTokenizer.from_pretrained(tmp_path / "again")
    assert [ids_of(second, text) for text in TEXTS] == [ids_of(first, text) for text in TEXTS]
    assert second.special_tokens_map == first.special_tokens_map
    described = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "DalleBartTokenizer"


def test_file_by_itself_gets_barts_roles(save: Save) -> None:
    bare, described = (DalleBartTokenizer.from_pretrained(save(layout)) for layout in ("bare", "DalleBartTokenizer"))
    assert bare.special_tokens_map == described.special_tokens_map


def test_older_pair_of_files_runs_as_bart(save: Save) -> None:
    folder = save("older")
    truth = Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), fuse_unk=False))
    truth.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    truth.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    truth.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer = DalleBartTokenizer.from_pretrained(folder)
    texts = [text for text in TEXTS if "<mask>" not in text]
    assert [ids_of(tokenizer, text) for text in texts] == [truth.encode(text).ids for text in texts]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0, 2)
    assert ids_of(tokenizer, "cat <mask>")[-2:] == [4, 2]
    assert tokenizer.decode(ids_of(tokenizer, "a cat"), skip_special_tokens=True) == "a cat"


@pytest.mark.parametrize("layout", [*LAYOUTS, "bare"])
def test_auto_tokenizer_finds_it_under_every_class_name(save: Save, layout: str) -> None:
    AutoConfig.register("dallebart", DalleBartConfig, exist_ok=True)
    register_auto_tokenizer(DalleBartConfig)
    folder = save(layout, max_text_length=64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is DalleBartTokenizer
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [ids_of(tokenizer, text) for text in TEXTS] == [truth.encode(text).ids for text in TEXTS]


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.json with merges\.txt") as caught:
        DalleBartTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}', '{"added_tokens": [{"id": 0}]}', "\x00\x01"])
def test_broken_tokenizer_file_is_refused_in_one_line(save: Save, content: str) -> None:
    folder = save()
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        DalleBartTokenizer.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_older_pair_without_ends_is_refused(save: Save) -> None:
    folder = save("older")
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({k: v for k, v in vocab.items() if k not in ("<s>", "</s>")}))
    with pytest.raises(ValueError, match=r"lacks sep_token='</s>', cls_token='<s>'"):
        DalleBartTokenizer.from_pretrained(folder)
