"""Scores written into shards of codes and of pictures."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_torch.data.encode import EncodeOptions, encode
from dalle_torch.data.manifest import ShardFolder
from dalle_torch.data.scoring import ScoringOptions, find_scorable, finish_manifest, score_shards
from dalle_torch.data.sources import find_parts
from dalle_torch.data.survey import difference_hash, survey
from dalle_torch.data.verify import verify
from dalle_torch.data.vqgan_match import check_made_by
from dalle_torch.evaluation.base import Judge
from tests.tiny_pipeline import tiny_vqgan


class Brightness:
    """Scores the mean of the red values, in [0, 1]; counts what it saw."""

    def __init__(self, sha256="a"):
        self.judge = Judge(name="brightness", source="here", sha256=sha256, standard=False)
        self.seen = 0

    def score(self, images, prompts):
        self.seen += len(images)
        assert len(images) == len(prompts)
        return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (value, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def members_of(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for shard in range(3):
        samples = [
            (f"{shard}{n}", {"png": png(20 * n + shard), "txt": f"number {n}".encode(), "cls": b"7",
                             "json": json.dumps({"id": n}).encode()})
            for n in range(5)
        ]  # fmt: skip
        write_tar(folder / f"{shard}.tar", samples)
    return folder


@pytest.fixture(scope="module")
def vqgan():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_vqgan()


def score(inputs, output, scorer, vqgan=None, **options):
    folder = ShardFolder(str(output))
    shards = find_scorable([str(inputs)], folder)
    found = score_shards(shards, folder, scorer, vqgan, ScoringOptions(**options))
    finish_manifest(shards, folder)
    return found


def test_pictures_keep_all_they_have_and_get_a_score(photos, tmp_path):
    found = score(photos, tmp_path / "out", Brightness())
    assert [result.samples for result in found] == [5, 5, 5]
    before, after = members_of(photos / "1.tar"), members_of(tmp_path / "out" / "1.tar")
    assert before.keys() == after.keys()
    assert all(after[name] == data for name, data in before.items() if not name.endswith(".json"))
    fields = json.loads(after["13.json"])
    # Pictures come as PNG and are resized, so that a flat one stays flat.
    assert fields == {"id": 3, "clip_score": pytest.approx(61 / 255, abs=1e-6)}
    assert (found[1].lowest, found[1].highest) == pytest.approx((1 / 255, 81 / 255), abs=1e-6)


def test_what_is_there_is_kept_until_judge_or_input_change(photos, tmp_path):
    out = tmp_path / "out"
    score(photos, out, first := Brightness())
    again = Brightness()
    assert score(photos, out, again) == score(photos, out, Brightness()) and again.seen == 0 and first.seen == 15
    (out / "1.tar").unlink()
    score(photos, out, partly := Brightness())
    assert partly.seen == 5
    score(photos, out, other := Brightness(sha256="b"))
    assert other.seen == 15
    score(photos, out, key := Brightness(sha256="b"), key="brightness")
    assert key.seen == 15 and "brightness" in json.loads(members_of(out / "0.tar")["00.json"])


def test_an_interruption_leaves_whole_shards_and_no_other(photos, tmp_path):
    class Stops(Brightness):
        def score(self, images, prompts):
            if self.seen >= 5:
                raise KeyboardInterrupt
            return super().score(images, prompts)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        score(photos, out, Stops())
    assert [path.name for path in out.glob("*.tar")] == ["0.tar"]
    score(photos, out, rest := Brightness())
    assert rest.seen == 10


def test_hosts_share_the_shards(photos, tmp_path):
    for host in range(2):
        score(photos, tmp_path / "out", Brightness(), host_index=host, host_count=2)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3


def test_codes_are_decoded_and_stay_what_training_reads(photos, tmp_path, vqgan):
    tokens, out = tmp_path / "tokens", tmp_path / "out"
    parts = find_parts([str(photos)], None, "image", 100)
    encode(parts, ShardFolder(str(tokens)), vqgan, None, EncodeOptions(threads=1))
    found = score(tokens, out, Brightness(), vqgan)
    assert sum(result.samples for result in found) == 15
    whole = verify(ShardFolder(str(out)))
    assert whole.complete and whole.samples == 15
    # the offsets of samples are those of the new file
    record = ShardFolder(str(out)).records()["1.tar"]
    with tarfile.open(out / "1.tar") as tar:
        assert tar.next().offset == record.offsets[0] == 0
    skipped = Counter()
    scores = [seen.score for seen in survey([str(out)], skipped, score_key="clip_score")]
    assert len(scores) == 15 and all(0 <= value <= 1 for value in scores) and not skipped
    check_made_by([str(out)], vqgan, "it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        other = tiny_vqgan()
    with pytest.raises(ValueError, match="codes of another VQGAN than it"):
        check_made_by([str(out)], other, "it")


def test_the_loader_keeps_what_the_threshold_says(photos, tmp_path, vqgan):
    from dalle_torch.config import DataConfig
    from dalle_torch.data.datasets import TokenData
    from dalle_torch.data.text import TextEncoder
    from tests.tiny_pipeline import tiny_processor

    tokens, out = tmp_path / "tokens", tmp_path / "out"
    encode(
        find_parts([str(photos)], None, "image", 100), ShardFolder(str(tokens)), vqgan, None, EncodeOptions(threads=1)
    )
    score(tokens, out, Brightness(), vqgan)
    scores = sorted(seen.score for seen in survey([str(out)], Counter(), score_key="clip_score"))
    config = DataConfig(train=[str(out)], lanes=1, workers=0, shuffle_buffer=0, min_clip_score=scores[10])
    data = TokenData(
        config=config, text=TextEncoder(tiny_processor()), image_length=vqgan.config.image_length,
        codebook_size=vqgan.config.n_embed, batch_size=5,
    )  # fmt: skip
    first = next(iter(data.training_loader()))
    kept = {seen.codes.tobytes() for seen in survey([str(out)], Counter(), score_key="clip_score")
            if seen.score >= scores[10]}  # fmt: skip
    assert {row.numpy().astype(np.int64).tobytes() for row in first.inputs["labels"]} <= kept


def test_what_cannot_be_scored_is_left_out_by_reason(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    good = [(f"g{n}", {"png": png(n), "txt": b"a"}) for n in range(9)]
    bad = [
        ("a", {"png": b"no picture", "txt": b"a"}), ("b", {"png": png(1)}), ("c", {"txt": b"a"}),
        ("d", {"png": png(1), "txt": b"a", "json": b"{"}), ("g1", {"png": png(1), "txt": b"a"}),
    ]  # fmt: skip
    write_tar(folder / "0.tar", good + bad)
    (result,) = score(folder, tmp_path / "out", Brightness(), max_bad_fraction=0.5)
    assert result.samples == 9
    assert {reason: keys for reason, keys in result.skipped.items()} == {
        "image_damaged": ["a"], "no_caption": ["b"], "no_image": ["c"], "bad_json": ["d"], "duplicate_key": ["g1"],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"5 of 14 samples cannot be scored .* in 0.tar: a \(image_damaged\)"):
        score(folder, tmp_path / "strict", Brightness())


def test_scores_that_are_no_numbers_are_left_out(photos, tmp_path):
    class Breaks(Brightness):
        def score(self, images, prompts):
            return [float("nan"), *super().score(images, prompts)[1:]]

    found = score(photos, tmp_path / "out", Breaks(), max_bad_fraction=0.5)
    assert [result.skipped for result in found] == [{"no_score": [f"{n}0"]} for n in range(3)]


def test_a_truncated_shard_is_scored_as_far_as_it_goes(photos, tmp_path):
    data = (photos / "2.tar").read_bytes()
    (photos / "2.tar").write_bytes(data[: len(data) // 2])
    *_, last = score(photos, tmp_path / "out", Brightness(), max_bad_fraction=0.5)
    assert 0 < last.samples < 5 and last.skipped["shard_damaged"] == ["2.tar"]


def test_inputs_that_cannot_be_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="holds the input, which would be written over"):
        find_scorable([str(photos)], ShardFolder(str(photos)))
    with pytest.raises(FileNotFoundError, match="no shard matches"):
        find_scorable([str(tmp_path / "none*.tar")], ShardFolder(str(tmp_path / "out")))
    for options in ({"key": "a b"}, {"max_bad_fraction": 2}, {"host_index": 3}):
        with pytest.raises(ValueError, match="scoring cannot start"):
            ScoringOptions(**options)


def test_hashes_are_alike_for_pictures_that_look_alike():
    photo = np.asarray(Image.effect_noise((96, 96), 90).convert("RGB").resize((12, 12)).resize((96, 96)))
    same = difference_hash(photo)
    brighter = difference_hash(np.clip(photo.astype(int) + 12, 0, 255).astype(np.uint8))
    other = difference_hash(np.asarray(Image.effect_noise((96, 96), 90).convert("RGB")))
    assert (same ^ brighter).bit_count() <= 3 < (same ^ other).bit_count()
