"""Batches: the same for any number of hosts and workers, each sample once an epoch, taken up again at any place."""

import gc
import glob
import itertools
import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_torch.config import DataConfig
from dalle_torch.data.datasets import TokenData
from dalle_torch.data.loader import merge_states
from dalle_torch.data.text import TextEncoder
from dalle_torch.data.worker import WorkerStream
from tests.shard_files import CODEBOOK, CODES, flat, number_of_codes, token_parquet, token_tar
from tests.tiny_pipeline import tiny_processor

SIZES = (13, 1, 0, 29, 7, 14)
TOTAL = sum(SIZES)
MODEL = {"image_length": CODES, "codebook_size": CODEBOOK}


@pytest.fixture(scope="module")
def text():
    return TextEncoder(tiny_processor())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 samples, numbered, in uneven shards of both kinds."""
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for index, size in enumerate(SIZES):
        numbers = range(first, first + size)
        if index % 2:
            token_parquet(folder / f"{index}.parquet", numbers)
        else:
            token_tar(folder / f"{index}.tar", numbers)
        first += size
    return folder


def make(folder, text, batch_size=8, host=(0, 1), **options):
    options = {"train": [str(folder)], "lanes": 8, "workers": 0, "shuffle_buffer": 80} | options
    index, count = host
    config = DataConfig(**options)
    return make_data(config, text, batch_size=batch_size, host_index=index, host_count=count).training_loader()


def make_data(config, text, batch_size=8, **host):
    return TokenData(config=config, text=text, batch_size=batch_size, **MODEL, **host)


def numbers(batch):
    return [number_of_codes(row) for row in batch.labels.tolist()]


def take(loader, batches):
    return [numbers(batch) for batch in itertools.islice(loader, batches)]


@pytest.fixture(scope="module")
def expected(folder, text):
    """Three epochs and a little, in one process."""
    return take(make(folder, text), 26)


def test_each_sample_comes_once_an_epoch(expected):
    # 64 samples in lanes of 8, a row in each batch: an epoch is 8 batches for every lane.
    for epoch in range(3):
        rows = flat(expected[8 * epoch : 8 * (epoch + 1)])
        assert sorted(rows) == list(range(TOTAL))
    assert expected[:8] != expected[8:16], "each epoch has an order of its own"


def test_samples_of_several_shards_meet_in_a_batch(expected):
    assert all(max(batch) - min(batch) > 10 for batch in expected)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_do_not_show(workers, folder, text, expected):
    assert take(make(folder, text, workers=workers), 10) == expected[:10]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_have_the_rows_of_the_same_batches(hosts, workers, folder, text, expected):
    of_hosts = [take(make(folder, text, host=(index, hosts), workers=workers), 9) for index in range(hosts)]
    assert [flat(parts) for parts in zip(*of_hosts, strict=True)] == expected[:9]


@pytest.mark.parametrize("stop", [0, 1, 5, 7, 8, 9, 17, 25])
@pytest.mark.parametrize("workers", [(0, 3), (2, 0)])
def test_stopped_anywhere_it_goes_on_with_another_number_of_workers(stop, workers, folder, text, expected):
    before, after = workers
    loader = make(folder, text, workers=before)
    assert take(loader, stop) == expected[:stop]
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make(folder, text, workers=after)
    resumed.load_state_dict(state)
    assert take(resumed, 26 - stop) == expected[stop:]


def test_one_row_a_batch_stops_at_any_sample(folder, text):
    whole = take(make(folder, text, batch_size=1, lanes=1), TOTAL + 5)
    loader = make(folder, text, batch_size=1, lanes=1)
    for place, batch in enumerate(take(loader, TOTAL)):
        assert batch == whole[place]
    for stop in range(0, TOTAL + 1, 3):
        first = make(folder, text, batch_size=1, lanes=1)
        take(first, stop)
        second = make(folder, text, batch_size=1, lanes=1)
        second.load_state_dict(first.state_dict())
        assert take(second, 5) == whole[stop : stop + 5]


def test_the_same_loader_goes_on_where_it_was_left(folder, text, expected):
    loader = make(folder, text)
    assert take(loader, 3) + take(loader, 4) == expected[:7]


def test_files_are_closed_when_an_iteration_ends(folder, text):
    loader = make(folder, text, shuffle_buffer=0)

    def opened():
        return [path for path in map(os.path.realpath, glob.glob("/proc/self/fd/*")) if path.startswith(str(folder))]

    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            batches = iter(loader)
            next(batches)
            assert opened()
            del batches
            assert opened() == []
            for _ in loader:
                break
            assert opened() == []
    finally:
        gc.enable()


def test_states_of_all_hosts_fit_any_number_of_hosts(folder, text, expected):
    loaders = [make(folder, text, host=(index, 4), workers=1) for index in range(4)]
    for loader in loaders:
        take(loader, 6)
    state = merge_states([loader.state_dict() for loader in loaders])
    for hosts in (1, 2):
        of_hosts = []
        for index in range(hosts):
            loader = make(folder, text, host=(index, hosts))
            loader.load_state_dict(state)
            of_hosts.append(take(loader, 5))
        assert [flat(parts) for parts in zip(*of_hosts, strict=True)] == expected[6:11]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 15), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) >= 4),
    lanes=st.sampled_from([1, 2, 4]),
    buffer=st.integers(0, 30),
    seed=st.integers(0, 5),
    parquet=st.booleans(),
    data=st.data(),
)
def test_any_sizes_of_shards(tmp_path_factory, text, sizes, lanes, buffer, seed, parquet, data):
    folder = tmp_path_factory.mktemp("random")
    first = 0
    for index, size in enumerate(sizes):
        write = token_parquet if parquet else token_tar
        write(folder / f"{index}.{'parquet' if parquet else 'tar'}", range(first, first + size))
        first += size
    options = {"batch_size": lanes, "lanes": lanes, "shuffle_buffer": buffer, "seed": seed}
    steps = 2 * -(-first // lanes)
    whole = take(make(folder, text, **options), steps)
    assert sorted(flat(whole))[: 2 * first : 2] == list(range(first)) or first % lanes
    for lane in range(lanes):
        size = (lane + 1) * first // lanes - lane * first // lanes
        rows = [batch[lane] for batch in whole]
        assert len(set(rows[:size])) == size
    stop = data.draw(st.integers(0, steps))
    hosts = data.draw(st.sampled_from([count for count in (1, 2, 4) if lanes % count == 0]))
    loaders = [make(folder, text, host=(index, hosts), **options) for index in range(hosts)]
    halves = [take(loader, stop) for loader in loaders]
    assert [flat(parts) for parts in zip(*halves, strict=True)] == whole[:stop]
    resumed = make(folder, text, **options)
    resumed.load_state_dict(merge_states([loader.state_dict() for loader in loaders]))
    assert take(resumed, steps - stop) == whole[stop:]


def test_a_batch_is_what_the_model_takes(folder, text):
    batch = next(iter(make(folder, text)))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.inputs.items()} == {
        "input_ids": (torch.int64, (8, 12)), "attention_mask": (torch.int64, (8, 12)), "labels": (torch.int64, (8, 16)),
    }  # fmt: skip
    assert batch.valid.all()
    ready = tiny_processor()([f"n{number}" for number in numbers(batch)])
    assert torch.equal(batch.input_ids, ready["input_ids"])
    assert torch.equal(batch.attention_mask, ready["attention_mask"])


def test_workers_can_be_started_afresh(folder, text, expected):
    """Where processes are not forked, what a worker does is sent to it."""
    loader = make(folder, text)
    stream = pickle.loads(pickle.dumps(WorkerStream(loader._work, loader._places)))
    first = next(iter(stream))
    assert [number_of_codes(row) for row in first.codes.tolist()] == expected[0]


def test_captions_are_blanked_by_sample_and_epoch_alone(folder, text):
    blank = tiny_processor()([""])["input_ids"][0]

    def blanked(**options):
        found = []
        for batch in itertools.islice(make(folder, text, blank_caption_prob=0.4, **options), 16):
            found.append([bool(torch.equal(row, blank)) for row in batch.input_ids])
        return found

    of_one = blanked()
    share = np.mean(of_one)
    assert 0.25 < share < 0.55  # 128 draws: 0.4 and standard deviation 0.043
    assert of_one[:8] != of_one[8:]
    assert blanked(workers=2) == of_one
    assert blanked(seed=1) != of_one


def test_reading_does_not_touch_the_random_numbers_of_training(folder, text):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(make(folder, text, workers=2), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_reads_each_set_once_in_as_many_batches_on_every_host(hosts, workers, folder, tmp_path, text):
    token_tar(tmp_path / "small.tar", range(5))
    config = DataConfig(evaluation={"all": [str(folder)], "small": [str(tmp_path)]}, lanes=4, workers=workers)
    for _ in range(2):
        of_hosts = [
            make_data(config, text, 12, host_index=index, host_count=hosts).evaluation_loaders()
            for index in range(hosts)
        ]
        for name, size, steps in (("all", TOTAL, 6), ("small", 5, 1)):
            batches = [list(loaders[name]) for loaders in of_hosts]
            assert {len(found) for found in batches} == {steps} == {loaders[name].steps for loaders in of_hosts}
            found = [batch for host in batches for batch in host]
            assert {tuple(batch.labels.shape) for batch in found} == {(12 // hosts, CODES)}
            rows = [
                n for batch in found for n, valid in zip(numbers(batch), batch.valid.tolist(), strict=True) if valid
            ]
            assert sorted(rows) == list(range(size))


def test_an_evaluation_that_is_broken_off_begins_anew(folder, text):
    config = DataConfig(evaluation={"all": [str(folder)]}, lanes=4, workers=0)
    loader = make_data(config, text).evaluation_loaders()["all"]
    first = take(loader, 3)
    assert take(loader, 3) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": 3}, "a batch of 8 rows over all hosts must be a multiple of lanes=3"),
        ({"lanes": 4, "host": (0, 8)}, "lanes=4 must be a multiple of the 8 hosts"),
        ({"host": (4, 4)}, "host_index=4 must lie in [0, 4)"),
        ({"lanes": 128, "batch_size": 128}, "64 samples are fewer than lanes=128"),
    ],
)
def test_what_cannot_be_split(options, message, folder, text):
    with pytest.raises(ValueError) as caught:
        make(folder, text, **options)
    assert message in str(caught.value)


def test_a_state_of_other_data_is_refused(folder, tmp_path, text):
    state = make(folder, text).state_dict()
    token_tar(tmp_path / "0.tar", range(64))
    for other, message in [
        (make(tmp_path, text), "another run: shards"),
        (make(folder, text, seed=3), "another run: seed 0, here 3"),
        (make(folder, text, lanes=2), "lanes 8, here 2"),
        (make(folder, text, shuffle_buffer=160), "window 10, here 20"),
    ]:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    for place in ([0], [0, 9], [-1, 0], [0, "1"], None, [0.0, 1]):
        with pytest.raises(ValueError, match="for lane 5: \\[epoch, position up to 8\\] is due"):
            make(folder, text).load_state_dict({**state, "places": {**state["places"], "5": place}})
    for places in (None, 3, [[0, 0]] * 8):
        with pytest.raises(ValueError, match="for places: lane -> \\[epoch, position\\] is due"):
            make(folder, text).load_state_dict({**state, "places": places})
        with pytest.raises(ValueError, match="for places: lane -> "):
            merge_states([{**state, "places": places}])
    with pytest.raises(ValueError, match="the state of the data is None"):
        make(folder, text).load_state_dict(None)
    half = make(folder, text, host=(1, 2)).state_dict()
    with pytest.raises(ValueError, match="lacks lanes 0 to 3: it comes from another host"):
        make(folder, text).load_state_dict(half)
    with pytest.raises(ValueError, match="two states of the data have lane 4"):
        merge_states([half, half])
    with pytest.raises(ValueError, match="different runs"):
        merge_states([half, make(folder, text, seed=1).state_dict()])
    with pytest.raises(ValueError, match="no state"):
        merge_states([])


def test_a_state_knows_the_filter(tmp_path, text):
    token_parquet(tmp_path / "a.parquet", range(8), lang=["en"] * 8, place=[1] * 8)
    english = make(tmp_path, text, filter_column="lang", filter_value="en")
    state = json.loads(json.dumps(english.state_dict()))
    make(tmp_path, text, filter_column="lang", filter_value="en").load_state_dict(state)
    for options, ours in [
        ({}, "None"),
        ({"filter_column": "lang", "filter_value": "de"}, "\"lang == 'de'\""),
        ({"filter_column": "place", "filter_value": 1}, "'place == 1'"),
    ]:
        with pytest.raises(ValueError) as caught:
            make(tmp_path, text, **options).load_state_dict(state)
        assert f"another run: filter \"lang == 'en'\", here {ours}; use its options" in str(caught.value)
    with pytest.raises(ValueError, match="another run: filter None, here"):
        english.load_state_dict(make(tmp_path, text).state_dict())


def test_clip_bounds_and_blanks_may_be_changed_on_the_way(tmp_path, text, caplog):
    token_parquet(tmp_path / "a.parquet", range(8), clip_score=[0.5] * 8)
    state = json.loads(json.dumps(make(tmp_path, text, min_clip_score=0.2).state_dict()))
    make(tmp_path, text, min_clip_score=0.2).load_state_dict(state)
    assert "other options" not in caplog.text
    make(tmp_path, text, min_clip_score=0.3, max_clip_score=0.9, blank_caption_prob=0.5).load_state_dict(state)
    assert (
        "the data goes on with other options: min_clip_score 0.2, from here on 0.3; max_clip_score None, "
        "from here on 0.9; blank_prob 0.0, from here on 0.5"
    ) in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": 0, "workers": -1}, "lanes=0 must be at least 1; workers=-1 must be at least 0"),
        ({"blank_caption_prob": 2}, "blank_caption_prob=2 must lie in"),
        ({"min_clip_score": 0.5, "max_clip_score": 0.1}, "min_clip_score=0.5 must not exceed max_clip_score=0.1"),
        ({"filter_column": "a"}, "filter_column=a and filter_value=None need each other"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_no_shards_at_all(tmp_path, text):
    with pytest.raises(FileNotFoundError, match="no shard matches"):
        make(tmp_path, text)
    token_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match="1 shards, of which the first is .*empty.tar, have no sample"):
        make(tmp_path, text)
    assert make_data(DataConfig(), text).evaluation_loaders() == {}
