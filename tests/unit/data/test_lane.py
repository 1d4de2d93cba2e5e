"""A lane by itself keeps to the bound on bad samples, whatever a batch waits for."""

import itertools

import pytest

from dalle_torch.config import DataConfig
from dalle_torch.data.datasets import TokenData
from dalle_torch.data.text import TextEncoder
from tests.shard_files import CODEBOOK, CODES, tokenised, write_tar
from tests.tiny_pipeline import tiny_processor


@pytest.fixture(scope="module")
def text():
    return TextEncoder(tiny_processor())


def take(folder, text, batches, batch_size=2, **options):
    config = DataConfig(**{"train": [str(folder)], "lanes": 1, "workers": 0, "shuffle_buffer": 0} | options)
    data = TokenData(config=config, text=text, image_length=CODES, codebook_size=CODEBOOK, batch_size=batch_size)
    return list(itertools.islice(data.training_loader(), batches))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lane_without_end_of_bad_samples_stops_within_a_batch(workers, tmp_path, text):
    """The batch that would never be whole does not keep the bound from being seen."""
    write_tar(tmp_path / "a.tar", [(str(n), {"txt": b"x"}) for n in range(3000)])
    with pytest.raises(ValueError) as caught:
        take(tmp_path, text, 1, max_bad_fraction=0.1, workers=workers, lanes=2)
    assert str(caught.value) == (
        "lane 0 of 2: 1,000 of 1,000 samples (100.0%) cannot be used (no_codes: 1,000), "
        "more than max_bad_fraction=0.1 allows"
    )


def test_a_lane_does_not_stop_for_what_others_make_up(tmp_path, text):
    def shard(name, bad_every):
        samples = [(str(n), tokenised(n % 40) if n % bad_every else {"txt": b"x"}) for n in range(1, 1201)]
        write_tar(tmp_path / f"{name}.tar", samples)

    shard("a", 4)
    shard("b", 10_000)
    assert len(take(tmp_path, text, 85, batch_size=20, max_bad_fraction=0.2, lanes=2)) == 85


def test_few_samples_of_which_none_can_be_used(tmp_path, text):
    write_tar(tmp_path / "a.tar", [(str(n), {"txt": b"x"}) for n in range(5)])
    with pytest.raises(ValueError) as caught:
        take(tmp_path, text, 1, max_bad_fraction=0.5)
    assert str(caught.value) == (
        "lane 0 of 1 has no usable sample among 5 (no_codes: 5): most of them cannot be used, whatever "
        "max_bad_fraction=0.5 allows; repair or leave out their shards"
    )
