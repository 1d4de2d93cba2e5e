"""Pictures that are drawn once and kept."""

import numpy as np
import pytest

from dalle_torch.studies import drawings
from dalle_torch.studies.drawings import Setting, draw, portion_file
from tests.tiny_pipeline import tiny_pipeline

PROMPTS = [f"number {n}" for n in range(10)]
SETTINGS = [Setting(condition_scale=1.0), Setting(condition_scale=3.0), Setting(condition_scale=3.0, top_k=4)]


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    monkeypatch.setattr(drawings, "PORTION", 4)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


def test_pictures_are_those_of_the_pipeline_and_each_has_its_own_seed(pipe, tmp_path):
    found = draw(pipe, PROMPTS, SETTINGS, tmp_path, num_images=2, seed=5)
    assert [len(pictures) for pictures in found] == [20] * 3
    for setting, pictures in zip(SETTINGS, found, strict=True):
        for row in (0, 7, 9):
            seeds = [5 + 2 * row, 6 + 2 * row]
            for image, seed in zip(pictures[2 * row : 2 * row + 2], seeds, strict=True):
                (alone,) = pipe(
                    PROMPTS[row], seed=seed, condition_scale=setting.condition_scale, temperature=1.0,
                    top_k=setting.top_k,
                ).images  # fmt: skip
                assert (np.asarray(alone) == np.asarray(image)).all()
    assert found[0].prompts[:4] == ["number 0", "number 0", "number 1", "number 1"]


def test_each_prompt_goes_through_the_encoder_once_for_all_settings(pipe, tmp_path, monkeypatch):
    rows = []
    forward = type(pipe.model.encoder).forward
    monkeypatch.setattr(
        type(pipe.model.encoder),
        "forward",
        lambda self, ids, mask=None: rows.append(len(ids)) or forward(self, ids, mask),
    )
    draw(pipe, PROMPTS, SETTINGS, tmp_path)
    # and the empty prompt once a portion at most
    assert len(PROMPTS) < sum(rows) <= len(PROMPTS) + 3
    assert pipe.encoder_cache is None


def test_what_is_there_is_not_drawn_again_and_what_is_damaged_is(pipe, tmp_path, monkeypatch, caplog):
    (first,) = draw(pipe, PROMPTS, SETTINGS[:1], tmp_path)
    before = pixels(first)
    calls = []
    plain = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *a, **k: calls.append(a[0]) or plain(self, *a, **k))
    draw(pipe, PROMPTS, SETTINGS[:1], tmp_path)
    assert calls == []
    portion_file(first.folder, 1).write_bytes(b"\x08\x00\x00\x00")
    portion_file(first.folder, 2).unlink()
    (again,) = draw(pipe, PROMPTS, SETTINGS[:1], tmp_path)
    assert [len(prompts) for prompts in calls] == [4, 2]
    assert (pixels(again) == before).all() and "is damaged" in caplog.text
    # another setting, seed or list of prompts lies elsewhere
    others = [
        draw(pipe, PROMPTS, SETTINGS[1:2], tmp_path)[0],
        draw(pipe, PROMPTS, SETTINGS[:1], tmp_path, seed=1)[0],
        draw(pipe, PROMPTS[:9], SETTINGS[:1], tmp_path)[0],
    ]
    assert len({first.folder, *(other.folder for other in others)}) == 4


def test_batches_make_no_difference(pipe, tmp_path):
    (one,) = draw(pipe, PROMPTS, SETTINGS[1:2], tmp_path / "a", batch_size=1)
    (all_at_once,) = draw(pipe, PROMPTS, SETTINGS[1:2], tmp_path / "b", batch_size=4)
    assert (pixels(one) == pixels(all_at_once)).all()


def test_pictures_are_counted_from_the_start_alone(pipe, tmp_path):
    (found,) = draw(pipe, PROMPTS[:2], SETTINGS[:1], tmp_path)
    with pytest.raises(IndexError, match="picture 2 of 2"):
        found[2]
    assert [len(images) for images, _ in found.chunks(1)] == [1, 1]
