"""Captions in bulk give the ids that the processor gives one by one."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_torch.data.text import TextEncoder
from dalle_torch.text import DalleBartProcessor, TextNormalizer
from tests.tiny_pipeline import tiny_processor


def processors():
    plain = tiny_processor()
    return {"plain": plain, "normalised": DalleBartProcessor(plain.tokenizer, TextNormalizer(), 12)}


PROCESSORS = processors()
ENCODERS = {name: TextEncoder(processor) for name, processor in PROCESSORS.items()}


@pytest.mark.parametrize("kind", ["plain", "normalised"])
@settings(max_examples=60, deadline=None)
@given(captions=st.lists(st.text(st.characters(exclude_characters="#"), max_size=30), min_size=1, max_size=4))
def test_ids_are_those_of_the_processor(kind, captions):
    captions = [*captions, "", "  ", "half a pair \ud800", "long " * 20]
    expected = PROCESSORS[kind](captions)
    ids, mask = ENCODERS[kind].pad(ENCODERS[kind](captions))
    assert np.array_equal(ids, expected["input_ids"].numpy())
    assert np.array_equal(mask, expected["attention_mask"].numpy())


def test_the_fingerprint_tells_what_gives_other_ids():
    plain = tiny_processor()
    assert TextEncoder(plain).fingerprint == ENCODERS["plain"].fingerprint
    others = [ENCODERS["normalised"], TextEncoder(DalleBartProcessor(plain.tokenizer, None, 11))]
    added = tiny_processor()
    added.tokenizer.add_tokens(["<new>"])
    others.append(TextEncoder(added))
    assert len({ENCODERS["plain"].fingerprint, *(other.fingerprint for other in others)}) == 4
    # A call sets truncation and padding, which are not what the tokenizer is.
    plain(["something"])
    assert TextEncoder(plain).fingerprint == ENCODERS["plain"].fingerprint


def test_it_can_be_sent_to_another_process():
    encoder = ENCODERS["normalised"]
    copy = pickle.loads(pickle.dumps(encoder))
    assert [row.tolist() for row in copy(["A cat", ""])] == [row.tolist() for row in encoder(["A cat", ""])]
    assert copy.fingerprint == encoder.fingerprint
