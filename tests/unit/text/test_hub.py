"""Word list, tokenizer and processor from a hub on this machine, with the real client."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dalle_torch.text import DalleBartProcessor, DalleBartTokenizer, TextNormalizer, normalizer
from dalle_torch.text.normalizer import WORDS_FILE, WORDS_SOURCE
from tests.helpers import GOLDENS
from tests.hub_server import HubServer

Save = Callable[..., Path]
WORDS = GOLDENS / "text" / "words-frequency.txt"


@pytest.fixture(autouse=True)
def _forget_the_list() -> Iterator[None]:
    normalizer._hub_word_costs.cache_clear()
    yield
    normalizer._hub_word_costs.cache_clear()


def downloads(hub: HubServer) -> list[str]:
    return [path.rpartition("/")[2] for path in hub.paths() if "/resolve/" in path]


def test_word_list_is_downloaded_for_the_first_hashtag_and_alone(hub: HubServer) -> None:
    hub.add_repo(WORDS_SOURCE, {WORDS_FILE: WORDS.read_bytes(), "flax_model.msgpack": b"large"})
    assert TextNormalizer()("C# and # and a cat") == " c and and a cat"
    assert hub.requests == []
    assert TextNormalizer()("#sunsetbeach") == " sunset beach"
    assert set(downloads(hub)) == {WORDS_FILE}
    hub.requests.clear()
    assert TextNormalizer()("#catsofinstagood") == " cats of instagood"
    assert hub.requests == []


def test_word_list_is_taken_from_the_cache_without_the_hub(hub: HubServer) -> None:
    hub.add_repo(WORDS_SOURCE, {WORDS_FILE: WORDS.read_bytes()})
    TextNormalizer()("#sunsetbeach")
    normalizer._hub_word_costs.cache_clear()
    hub.stop()
    assert TextNormalizer()("#sunsetbeach") == " sunset beach"


@pytest.mark.parametrize("failure", ["no network", "no repository", "no file", "no words"])
def test_without_the_list_hashtags_are_cut_by_case_and_one_warning_says_so(
    hub: HubServer, caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    if failure == "no network":
        hub.stop()
    elif failure == "no file":
        hub.add_repo(WORDS_SOURCE, {"config.json": b"{}"})
    elif failure == "no words":
        hub.add_repo(WORDS_SOURCE, {WORDS_FILE: b"<html>\n"})
    with caplog.at_level(logging.WARNING, logger="dalle_torch"):
        assert TextNormalizer()("#GameOfThrones #sunsetbeach #Top10Cats") == " game of thrones sunsetbeach top 10 cats"
        hub.requests.clear()
        assert TextNormalizer()("#RedHouse") == " red house"
    assert hub.requests == []
    messages = [record.getMessage() for record in caplog.records if record.name == normalizer.logger.name]
    assert len(messages) == 1
    assert "capitals and digits only" in messages[0]
    assert "words_frequency=" in messages[0]
    assert "\n" not in messages[0]


def test_processor_of_a_repository_takes_no_weights(hub: HubServer, save: Save, tmp_path: Path) -> None:
    local = DalleBartProcessor.from_pretrained(save(normalize_text=True, max_text_length=16))
    files = {path.name: path.read_bytes() for path in save().iterdir()}
    hub.add_repo("org/model", files | {"flax_model.msgpack": b"large", "enwiki.txt": b"large"}, token="hf_key")
    options = {"token": "hf_key", "cache_dir": tmp_path / "cache"}
    remote = DalleBartProcessor.from_pretrained("org/model", **options)
    assert set(downloads(hub)) == set(files)
    assert isinstance(remote.normalizer, TextNormalizer)
    prompts = ["A cat!", "", "an armchair"]
    expected, batch = local(prompts), remote(prompts)
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    hub.stop()
    again = DalleBartProcessor.from_pretrained("org/model", local_files_only=True, **options)
    assert torch.equal(again(prompts)["input_ids"], expected["input_ids"])


def test_processor_of_a_revision_and_a_subfolder(hub: HubServer, save: Save) -> None:
    def files(**config: object) -> dict[str, bytes]:
        return {f"model/{path.name}": path.read_bytes() for path in save(**config).iterdir()}

    old = hub.add_repo("org/model", files(max_text_length=10))
    hub.add_repo("org/model", files(max_text_length=20))
    assert DalleBartProcessor.from_pretrained("org/model", subfolder="model").max_text_length == 20
    assert DalleBartProcessor.from_pretrained("org/model", subfolder="model", revision=old).max_text_length == 10


def test_repository_that_is_not_there_is_refused(hub: HubServer) -> None:
    with pytest.raises(OSError, match="org/none") as caught:
        DalleBartProcessor.from_pretrained("org/none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["DalleBartTokenizer", "BartTokenizerFast", "older"])
def test_tokenizer_of_a_repository(hub: HubServer, save: Save, layout: str) -> None:
    folder = save(layout, normalize_text=True)
    hub.add_repo("org/model", folder)
    local, remote = DalleBartTokenizer.from_pretrained(folder), DalleBartTokenizer.from_pretrained("org/model")
    texts = ["", "A CAT on the beach", "12 avocados!"]
    assert remote(texts)["input_ids"] == local(texts)["input_ids"]
