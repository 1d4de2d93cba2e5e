"""Re-ranking with a small CLIP model of transformers."""

import pytest
import torch

from dalle_torch.evaluation.clip import ClipScorer
from tests.tiny_clip import save_tiny_clip, tiny_clip
from tests.tiny_pipeline import tiny_pipeline

PROMPTS = ["a cat", "something else"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_each_prompts_pictures_come_best_first(pipe, clip):
    options = {"num_images": 5, "condition_scale": 2.0, "temperature": 3.0, "progress": False}
    plain = pipe(PROMPTS, **options)
    ranked = pipe(PROMPTS, rank_with=clip, **options)
    keys = list(zip(plain.prompts, plain.seeds, strict=True))
    scores = dict(zip(keys, ClipScorer(*clip).score(plain.images, plain.prompts), strict=True))
    assert ranked.prompts == plain.prompts
    for first in (0, 5):
        assert ranked.scores[first : first + 5] == sorted(ranked.scores[first : first + 5], reverse=True)
        assert sorted(ranked.seeds[first : first + 5]) == [0, 1, 2, 3, 4]
    for index, (prompt, seed, score) in enumerate(zip(ranked.prompts, ranked.seeds, ranked.scores, strict=True)):
        before = keys.index((prompt, seed))
        assert score == pytest.approx(scores[prompt, seed], abs=1e-5)
        assert torch.equal(ranked.tokens[index], plain.tokens[before])
        assert ranked.images[index].tobytes() == plain.images[before].tobytes()
        assert ranked.metadata(index)["clip_score"] == score
    best = pipe(PROMPTS, rank_with=clip, num_best=2, **options)
    assert best.seeds == ranked.seeds[:2] + ranked.seeds[5:7]
    assert best.scores == ranked.scores[:2] + ranked.scores[5:7]


def test_a_ranker_is_loaded_by_name_once(pipe, folder, clip):
    first = pipe("a cat", num_images=3, rank_with=folder, progress=False)
    assert first.scores == pytest.approx(pipe("a cat", num_images=3, rank_with=clip, progress=False).scores, abs=1e-5)
    kept = pipe._ranker(folder)
    assert pipe._ranker(str(folder)) is kept


@pytest.mark.parametrize("num_best", [0, 4])
def test_more_than_there_are_cannot_be_kept(pipe, clip, num_best):
    with pytest.raises(ValueError, match=f"num_best={num_best} must lie between 1 and num_images=3$"):
        pipe("a", num_images=3, rank_with=clip, num_best=num_best)


def test_a_model_without_two_towers_is_refused(pipe):
    with pytest.raises(ValueError, match="DalleBart"):
        pipe("a", rank_with=(pipe.model, pipe.processor))
