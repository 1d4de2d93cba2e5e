"""What a loader does with shards and samples that it cannot use: it leaves them out, counts, and says so."""

import itertools
import json
import logging
import multiprocessing
import os
import signal
import tarfile
import time
import warnings

import numpy as np
import pytest

from dalle_torch.config import DataConfig
from dalle_torch.data import loader as loader_module
from dalle_torch.data import token_reader
from dalle_torch.data.datasets import TokenData
from dalle_torch.data.manifest import Settings, ShardFolder, ShardRecord
from dalle_torch.data.text import TextEncoder
from dalle_torch.data.token_reader import read_npy
from tests.shard_files import (
    CODEBOOK,
    CODES,
    codes_of_number,
    flat,
    npy,
    number_of_codes,
    token_parquet,
    token_tar,
    tokenised,
    write_tar,
)
from tests.tiny_pipeline import tiny_processor

MODEL = {"image_length": CODES, "codebook_size": CODEBOOK}


@pytest.fixture(scope="module")
def text():
    return TextEncoder(tiny_processor())


def make(folder, text, batch_size=2, **options):
    options = {"train": [str(folder)], "lanes": 1, "workers": 0, "shuffle_buffer": 0, "max_bad_fraction": 1.0} | options
    return TokenData(config=DataConfig(**options), text=text, batch_size=batch_size, **MODEL).training_loader()


def rows(loader, count):
    found = []
    for batch in loader:
        found += [number_of_codes(row) for row in batch.labels.tolist()]
        if len(found) >= count:
            return found[:count]
    return found


def make_evaluation(folder, text, host=(0, 1), **options):
    config = DataConfig(evaluation={"all": [str(folder)]}, workers=0, **options)
    index, count = host
    data = TokenData(config=config, text=text, batch_size=4, host_index=index, host_count=count, **MODEL)
    return data.evaluation_loaders()["all"]


def evaluate(folder, text, **options):
    options = {"max_bad_fraction": 1.0, "lanes": 1} | options
    loader = make_evaluation(folder, text, **options)
    found = [batch for batch in loader]
    valid = flat(batch.valid.tolist() for batch in found)
    numbers = flat([number_of_codes(row) for row in batch.labels.tolist()] for batch in found)
    return [number for number, good in zip(numbers, valid, strict=True) if good], loader


DAMAGED_SAMPLES = {
    "no_codes": {"txt": b"x"},
    "codes_malformed": {"npy": b"junk", "txt": b"x"},
    "no_caption": {"npy": npy(codes_of_number(0))},
    "caption_not_utf8": tokenised(0, txt="café".encode("latin-1")),
    "member_too_large": tokenised(0, txt=b"x" * 100_000),
    "bad_json": {"npy": npy(codes_of_number(0)), "json": b"{"},
}


def test_every_kind_of_bad_sample(tmp_path, text):
    samples = [("g0", tokenised(0))]
    samples += list(DAMAGED_SAMPLES.items())
    samples += [
        ("g1", tokenised(1)),
        ("g0", tokenised(2)),
        ("g2", tokenised(2)),
        ("pickled", tokenised(3, pyd=b"cos\n")),
    ]
    write_tar(tmp_path / "a.tar", samples)
    found, loader = evaluate(tmp_path, text)
    assert found == [0, 1, 2, 3]
    assert dict(loader.tally.bad) == dict.fromkeys([*DAMAGED_SAMPLES, "duplicate_key"], 1)
    assert loader.tally.seen == 11
    assert rows(make(tmp_path, text), 8) == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    "values",
    [
        np.full(CODES, CODEBOOK, np.uint16),
        np.full(CODES, -1, np.int32),
        np.full(CODES, 70_000, np.int64),
        np.zeros(CODES + 1, np.uint16),
        np.zeros((2, CODES // 2), np.uint16),
        np.zeros(CODES, np.float32),
        np.array([None] * CODES, dtype=object),
        np.zeros(0, np.uint16),
        np.zeros((), np.uint16),
    ],
    ids=["code 20 of 20", "negative", "too large", "too many", "2-D", "float", "object", "none", "scalar"],
)
def test_codes_that_are_none(values, tmp_path, text):
    write_tar(tmp_path / "a.tar", [("a", tokenised(0, npy=npy(values))), ("b", tokenised(1))])
    found, loader = evaluate(tmp_path, text)
    assert (found, dict(loader.tally.bad)) == ([1], {"codes_malformed": 1})


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i2", "<i4", "<i8", "|u1", ">i8"])
def test_codes_of_any_integer_type(dtype, tmp_path, text):
    write_tar(tmp_path / "a.tar", [("a", tokenised(0, npy=npy(codes_of_number(47).astype(dtype))))])
    assert evaluate(tmp_path, text)[0] == [47]


def test_npy_is_read_without_unpickling():
    for values in (np.arange(5, dtype="<u2"), np.arange(3, dtype=">i4"), np.zeros(0, "<i8"), np.array(7, "<u2")):
        assert np.array_equal(read_npy(npy(values)), values)
    good = npy(np.arange(5, dtype="<u2"))
    for bad in (good[:-1], good + b"x", good[:9], b"", good.replace(b"<u2", b"|O8"), good.replace(b"(5,)", b"(-1)"),
                good.replace(b"'shape'", b"'shabe'"), npy(np.zeros((2, 2), "<u2")), npy(np.zeros(2))):  # fmt: skip
        assert read_npy(bad) is None


@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "text"])
@pytest.mark.parametrize("shuffle", [0, 8])
def test_a_damaged_tar_gives_what_it_has(kind, shuffle, tmp_path, text, caplog):
    data = bytearray(token_tar(tmp_path / "b.tar", range(10, 20)).read_bytes())
    if kind == "flipped":
        data[6 * 2048] ^= 0xFF
    data = {"cut": data[: 6 * 2048 + 100], "empty": b"", "text": b"not a tar at all"}.get(kind, data)
    (tmp_path / "b.tar").write_bytes(data)
    token_tar(tmp_path / "a.tar", range(5))
    token_tar(tmp_path / "c.tar", range(30, 33))
    with caplog.at_level(logging.WARNING, logger="dalle_torch"):
        found, loader = evaluate(tmp_path, text)
    kept = list(range(10, 16)) if kind in ("cut", "flipped") else []
    assert found == [0, 1, 2, 3, 4, *kept, 30, 31, 32]
    assert dict(loader.tally.bad) == {"shard_damaged": 1}
    assert "b.tar" in caplog.text and "damaged" in caplog.text
    size = len(found)
    loader = make(tmp_path, text, batch_size=1, shuffle_buffer=shuffle)
    assert sorted(rows(loader, size)) == found


def test_a_shard_that_was_damaged_after_it_was_counted_leaves_no_host_waiting(tmp_path, text):
    data = token_tar(tmp_path / "a.tar", range(16)).read_bytes()
    loaders = [make_evaluation(tmp_path, text, (index, 2), lanes=4, max_bad_fraction=1.0) for index in range(2)]
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 3])
    batches = [list(loader) for loader in loaders]
    assert [len(found) for found in batches] == [4, 4]
    assert sum(loader.tally.bad["shard_damaged"] for loader in loaders) > 5
    good = sum(int(batch.valid.sum()) for found in batches for batch in found)
    assert good + sum(loader.tally.bad_count for loader in loaders) == 16


def encoded_folder(folder, shards):
    """As `encode` leaves it: tars with records and a manifest."""
    settings = Settings(vqgan="", resolution=16, image_length=CODES, codebook_size=CODEBOOK, dtype="")
    output = ShardFolder(str(folder))
    for name, numbers in shards.items():
        size = token_tar(folder / name, numbers).stat().st_size
        output.write_record(
            ShardRecord(name=name, source="x", samples=len(numbers), bytes=size, sha256="", offsets=[0])
        )
    output.write_manifest(settings, list(shards))


@pytest.mark.parametrize("length", [0, 100, 3000, 9000])
def test_all_that_a_cut_shard_has_lost_counts_as_bad(length, tmp_path, text):
    encoded_folder(tmp_path, {"a.tar": range(12), "b.tar": range(12, 18)})
    before = make(tmp_path, text, lanes=2, shuffle_buffer=8)
    state = before.state_dict()
    path = tmp_path / "a.tar"
    path.write_bytes(path.read_bytes()[:length])
    found, loader = evaluate(tmp_path, text)
    lost = 18 - len(found)
    assert found == [*range(12 - lost), *range(12, 18)] and lost >= 7
    assert (loader.tally.seen, dict(loader.tally.bad)) == (18, {"shard_damaged": lost})
    after = make(tmp_path, text, lanes=2, shuffle_buffer=8)
    after.load_state_dict(state)
    assert after.plan == before.plan, "every other sample keeps its place"
    with pytest.raises(ValueError, match=f"{lost} of 18 samples"):
        evaluate(tmp_path, text, max_bad_fraction=(lost - 1) / 18)
    evaluate(tmp_path, text, max_bad_fraction=lost / 18)


def test_names_without_extension_are_counted(tmp_path, text):
    write_tar(tmp_path / "a.tar", [("a", tokenised(0)), ("x" * 2000, tokenised(1)), ("b", tokenised(2))])
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("README"))
    found, loader = evaluate(tmp_path, text)
    assert (found, loader.tally.seen, dict(loader.tally.bad)) == ([0, 2], 4, {"bad_name": 2})


def test_a_caption_column_of_numbers_is_told_at_once(tmp_path, text):
    token_parquet(tmp_path / "a.parquet", range(3), caption=[1, 2, 3])
    with pytest.raises(ValueError, match="a.parquet: its column caption is int64, and captions are strings"):
        make(tmp_path, text)


def test_damaged_parquet(tmp_path, text):
    data = token_parquet(tmp_path / "b.parquet", range(10, 20)).read_bytes()
    token_parquet(tmp_path / "a.parquet", range(4))
    for damaged in (data[: len(data) // 2], b"", b"PAR1"):
        (tmp_path / "b.parquet").write_bytes(damaged)
        found, loader = evaluate(tmp_path, text)
        assert (found, dict(loader.tally.bad)) == ([0, 1, 2, 3], {"shard_damaged": 1})


def test_bad_rows_of_parquet(tmp_path, text):
    encoding = [codes_of_number(number).tolist() for number in range(7)]
    encoding[1] = None
    encoding[2] = encoding[2][:-1]
    encoding[3] = [*encoding[3][:-1], None]
    encoding[4] = [-1, *encoding[4][1:]]
    caption = ["a", "b", "c", "d", "e", None, "g"]
    token_parquet(tmp_path / "a.parquet", range(7), encoding=encoding, caption=caption)
    found, loader = evaluate(tmp_path, text)
    assert found == [0, 6]
    assert dict(loader.tally.bad) == {"no_codes": 2, "codes_malformed": 2, "no_caption": 1}


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "list"])
def test_parquet_strings_that_are_no_utf8(kind, tmp_path, text):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def strings(values):
        found = pa.array(values, pa.binary()).cast(pa.string(), safe=False).view(pa.string())
        if kind == "list":
            return pa.ListArray.from_arrays(pa.array(range(len(values) + 1), pa.int32()), found)
        return found.dictionary_encode() if kind == "dictionary" else found.cast(getattr(pa, kind)())

    captions = [b"a", "caf\u00e9".encode("latin-1"), "caf\u00e9".encode(), b"d"]
    codes = pa.array([codes_of_number(number).tolist() for number in range(4)], pa.list_(pa.uint16()))
    columns = {"caption": strings(captions), "encoding": codes, "lang": strings([b"en", b"en", b"\xff", b"en"])}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found, loader = evaluate(tmp_path, text)
    assert (found, dict(loader.tally.bad)) == ([0, 2, 3], {"caption_not_utf8": 1})
    wanted = ["en"] if kind == "list" else "en"
    loader = make(tmp_path, text, batch_size=1, filter_column="lang", filter_value=wanted)
    assert rows(loader, 4) == [0, 3, 0, 3]
    assert loader.tally.filtered["filter_column"] > 0


def test_parquet_columns(tmp_path, text):
    token_parquet(tmp_path / "a.parquet", range(3), score=[1, 2, 3])
    with pytest.raises(ValueError, match=r"a.parquet has no column codes; it has: caption, encoding, score"):
        make(tmp_path, text, encoding_column="codes")
    with pytest.raises(ValueError, match=r"has no column clip_score and no lang"):
        make(tmp_path, text, min_clip_score=0.1, filter_column="lang", filter_value="en")
    import pyarrow as pa
    import pyarrow.parquet as pq

    codes = [codes_of_number(number).tolist() for number in range(3)]
    fixed = pa.array(codes, pa.list_(pa.uint16(), CODES))
    pq.write_table(pa.table({"alt": ["x"] * 3, "codes": fixed}), tmp_path / "a.parquet")
    found, _ = evaluate(tmp_path, text, caption_column="alt", encoding_column="codes")
    assert found == [0, 1, 2]


def fields(**values):
    return {"json": json.dumps(values).encode()}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"min_clip_score": 0.3}, [2, 3, 4]),
        ({"max_clip_score": 0.3}, [0, 1, 2]),
        ({"min_clip_score": 0.2, "max_clip_score": 0.4}, [1, 2, 3]),
        ({"filter_column": "lang", "filter_value": "en"}, [0, 2, 4]),
        ({"filter_column": "lang", "filter_value": "en", "min_clip_score": 0.25}, [2, 4]),
        ({"filter_column": "clip_score", "filter_value": 0.3}, [2]),
    ],
)
def test_filters(kind, options, expected, tmp_path, text):
    scores, languages = [0.1, 0.2, 0.3, 0.4, 0.5, None], ["en", "de", "en", "de", "en", None]
    if kind == "parquet":
        token_parquet(tmp_path / "a.parquet", range(6), clip_score=scores, lang=languages)
    else:
        pairs = enumerate(zip(scores, languages, strict=True))
        write_tar(tmp_path / "a.tar", [
            (str(n), tokenised(n, **fields(clip_score=score, lang=language))) for n, (score, language) in pairs
        ])  # fmt: skip
    loader = make(tmp_path, text, batch_size=1, **options)
    assert rows(loader, 2 * len(expected)) == 2 * expected
    assert loader.tally.bad_count == 0 and sum(loader.tally.filtered.values()) > 0


def test_filters_that_leave_nothing_end_the_run(tmp_path, text):
    token_tar(tmp_path / "a.tar", range(4))
    for workers in (0, 1):
        with pytest.raises(ValueError) as caught:
            rows(make(tmp_path, text, min_clip_score=0.5, workers=workers), 1)
        message = (
            "lane 0 of 1 has no usable sample among 4 (filtered by clip_score: 4): widen the filters, or use fewer"
        )
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["tar", "parquet", "list"])
def test_a_filter_that_leaves_nothing_shows_what_it_saw(kind, tmp_path, text):
    languages = [["x", n] if kind == "tar" else ["x"] for n in range(4)] if kind != "parquet" else list("abca")
    if kind == "tar":
        write_tar(tmp_path / "a.tar", [(str(n), tokenised(n, **fields(lang=languages[n]))) for n in range(4)])
    else:
        token_parquet(tmp_path / "a.parquet", range(4), lang=languages)
    seen = {"tar": "['x', 0], ['x', 1], ['x', 2], ['x', 3]", "parquet": "'a', 'b', 'c'", "list": "['x']"}[kind]
    with pytest.raises(ValueError) as caught:
        rows(make(tmp_path, text, filter_column="lang", filter_value="en"), 1)
    assert str(caught.value) == (
        "lane 0 of 1 has no usable sample among 4 (filtered by filter_column: 4): widen the filters, or use fewer "
        f"lanes; filter_column=lang is to be 'en', and it is {seen}"
    )
    with pytest.raises(ValueError, match="filter_column=encoding is to be 'en', and it is"):
        rows(make(tmp_path, text, filter_column="encoding", filter_value="en"), 1)


def test_a_worker_that_is_killed_ends_the_run_in_one_line(tmp_path, text, monkeypatch):
    token_tar(tmp_path / "a.tar", range(40))
    loader = make(tmp_path, text, workers=1)
    monkeypatch.setattr(token_reader, "open_shard", lambda url: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError) as caught:
        next(iter(loader))
    assert "one of the workers that read the data was ended from outside" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_worker_that_is_killed_elsewhere_in_the_run_is_named_there(tmp_path, text):
    token_tar(tmp_path / "a.tar", range(40))
    batches = iter(make(tmp_path, text, workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    with pytest.raises(ChildProcessError, match="one of the workers that read the data was ended from outside"):
        # As a step of the training does, which asks for no batch meanwhile.
        os.kill(worker.pid, signal.SIGKILL)
        for _ in range(600):
            time.sleep(0.1)


def test_more_workers_than_cores_are_started_without_torchs_warning(tmp_path, text, monkeypatch, caplog):
    token_tar(tmp_path / "a.tar", range(40))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    with warnings.catch_warnings(record=True) as seen, caplog.at_level(logging.INFO, logger="dalle_torch"):
        warnings.simplefilter("always")
        next(iter(make(tmp_path, text, workers=2, lanes=2)))
    assert not [str(warning.message) for warning in seen if "DataLoader" in str(warning.message)]
    assert "workers=2 are more than the cores of this machine: 1" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_more_bad_samples_than_allowed_stop_the_run(workers, tmp_path, text, monkeypatch):
    monkeypatch.setattr(loader_module, "BAD_SAMPLES_GRACE", 20)
    samples = [(str(n), tokenised(n) if n % 5 else {"txt": b"x"}) for n in range(100)]
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(ValueError, match=r"samples \(2\d.\d%\) cannot be used \(no_codes: \d+\), more than max_bad_fr"):
        rows(make(tmp_path, text, max_bad_fraction=0.1, workers=workers), 100)
    assert len(rows(make(tmp_path, text, max_bad_fraction=0.3, workers=workers), 100)) == 100
    with pytest.raises(ValueError, match=r"20 of 100 samples \(20.0%\)"):
        evaluate(tmp_path, text, max_bad_fraction=0.1)


def test_bad_samples_are_named_until_they_are_many(tmp_path, text, caplog):
    write_tar(tmp_path / "a.tar", [(f"{n:03d}", tokenised(n) if n % 2 else {"txt": b"x"}) for n in range(200)])
    with caplog.at_level(logging.WARNING, logger="dalle_torch"):
        rows(make(tmp_path, text), 99)
    lines = [record.message for record in caplog.records]
    assert lines[0].endswith("a.tar: 000 (no_codes)")
    assert "further samples that are left out are counted only" in lines
    assert any("samples could not be used: no_codes: " in line for line in lines)
    assert len(lines) < 30


def test_tokens_in_shards_are_used_if_they_are_of_this_tokenizer(tmp_path, text, caplog):
    from dataclasses import asdict

    ids = text(["stored"])[0]
    samples = [(str(n), tokenised(n, **{"tokens.npy": npy(ids.astype(np.uint16))})) for n in range(3)]
    bad = {"vocabulary": npy(np.full(3, 60_000, np.uint16)), "long": npy(np.zeros(13, np.uint16)), "junk": b"x",
           "negative": npy(np.full(3, -1, np.int32)), "empty": npy(np.zeros(0, np.uint16))}  # fmt: skip
    samples += [(name, tokenised(3, **{"tokens.npy": data})) for name, data in bad.items()]
    path = write_tar(tmp_path / "a.tar", samples)
    folder = ShardFolder(str(tmp_path))
    record = ShardRecord(name="a.tar", source="x", samples=8, bytes=path.stat().st_size, sha256="")
    for fingerprint, caption, good in ((text.fingerprint, "stored", 3), ("other", "n0", 8)):
        settings = Settings(
            vqgan="", resolution=16, image_length=CODES, codebook_size=CODEBOOK, dtype="", text=fingerprint
        )
        folder.write_record(record)
        folder.write_manifest(settings, ["a.tar"])
        assert asdict(settings)["text"] == fingerprint
        batch = next(iter(make(tmp_path, text)))
        assert batch.input_ids[0].tolist() == tiny_processor()([caption])["input_ids"][0].tolist()
        found, loader = evaluate(tmp_path, text)
        assert len(found) == good
        assert dict(loader.tally.bad) == ({} if good == 8 else {"tokens_malformed": 5})
    with path.open("ab") as file:
        file.write(bytes(512))
    found, _ = evaluate(tmp_path, text)
    assert len(found) == 8 and "a.tar has " in caplog.text and "by its manifest" in caplog.text
    with pytest.raises(ValueError, match="holds pictures of 16 codes out of 20; the model wants 16 out of 19"):
        config = DataConfig(train=[str(tmp_path)], lanes=1)
        TokenData(config=config, text=text, image_length=16, codebook_size=19, batch_size=1).training_loader()


def test_a_file_system_that_fails_for_a_moment_is_asked_again(tmp_path, text, monkeypatch):
    token_tar(tmp_path / "a.tar", range(6))
    loader = make(tmp_path, text, batch_size=1)
    failures = itertools.count()
    opened = token_reader.open_shard

    def sometimes(url):
        if next(failures) < 2:
            raise ConnectionError(f"{url} cannot be read: TimeoutError")
        return opened(url)

    monkeypatch.setattr(token_reader, "open_shard", sometimes)
    monkeypatch.setattr(token_reader.time, "sleep", lambda seconds: None)
    assert rows(loader, 6) == list(range(6))
    failures = itertools.repeat(0)
    with pytest.raises(OSError, match=r"a.tar cannot be read: TimeoutError"):
        rows(make(tmp_path, text), 6)


def test_a_shard_that_is_gone_ends_the_run_in_one_line(tmp_path, text):
    for workers in (0, 1):
        token_tar(tmp_path / "a.tar", range(6))
        loader = make(tmp_path, text, workers=workers)
        (tmp_path / "a.tar").unlink()
        with pytest.raises(OSError, match=f"^{tmp_path}/a.tar is not there$"):
            rows(loader, 6)
