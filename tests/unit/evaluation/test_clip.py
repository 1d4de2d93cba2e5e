"""CLIP scores by a small model of transformers."""

import pytest
import torch
from PIL import Image

from dalle_torch.evaluation.clip import ClipScorer
from dalle_torch.evaluation.loading import load_scorer
from tests.tiny_clip import save_tiny_clip, tiny_clip

PROMPTS = ["a cat", "something else"]


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_scores_are_those_of_the_model_itself(clip):
    model, processor = clip
    images = [Image.effect_noise((20, 24), 100).convert("RGB"), Image.new("RGB", (16, 16), "red")]
    scores = ClipScorer(model, processor).score(images * 2, ["a cat", "a cat", "something else", "something else"])
    with torch.no_grad():
        inputs = processor(text=PROMPTS, images=images, return_tensors="pt", padding=True)
        expected = model(**inputs).logits_per_text / model.logit_scale.exp()
    # Padding to the full length moves the reductions of attention by a rounding.
    assert scores == pytest.approx(expected.flatten().tolist(), abs=1e-5)
    assert len(set(scores)) == 4


def test_scores_do_not_depend_on_what_else_is_scored(clip):
    scorer = ClipScorer(*clip, filled=True)
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue", "white", "black")] * 14
    prompts = ["a", "b", "c", "a", "b"] * 14
    scores = scorer.score(images, prompts)
    assert scores[:3] == scorer.score(images[:3], prompts[:3])
    assert scores[60:] == scorer.score(images[60:], prompts[60:])
    # A batch of another size rounds differently.
    assert scores == pytest.approx(ClipScorer(*clip).score(images, prompts), abs=1e-5)
    assert scorer.similarities(images[:3], prompts[:3]).diagonal().tolist() == pytest.approx(scores[:3], abs=1e-6)


def test_a_loaded_model_says_which_weights_judged(clip, folder):
    images = [Image.new("RGB", (20, 16), colour) for colour in ("red", "blue")]
    scorer = load_scorer(folder)
    assert scorer.score(images, PROMPTS) == ClipScorer(*clip, filled=True).score(images, PROMPTS)
    about = scorer.judge.to_json()
    assert about["name"] == "clip" and about["source"] == str(folder) and len(about["sha256"]) == 64


def test_a_ranker_of_the_hub_is_one_download(hub, folder, clip):
    hub.add_repo("org/clip", folder)
    images = [Image.new("RGB", (16, 16), "red")]
    expected = ClipScorer(*clip).score(images, ["a"])
    assert ClipScorer.from_pretrained("org/clip").score(images, ["a"]) == pytest.approx(expected, abs=1e-5)
    hub.stop()
    assert ClipScorer.from_pretrained("org/clip").score(images, ["a"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nonexistent/clip", "/nonexistent/clip is not a folder here"),
        ("org/nothing", "org/nothing"),
        ("org/pickled", "org/pickled has no weights that can be read here (model.safetensors"),
        ("org/bert", "org/bert cannot rank"),
    ],
)
def test_what_cannot_rank_is_refused_by_name(hub, folder, tmp_path, source, message):
    hub.add_repo("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    hub.add_repo("org/bert", {"config.json": b'{"model_type": "no-such-model"}', "model.safetensors": b""})
    with pytest.raises((ValueError, OSError)) as caught:
        ClipScorer.from_pretrained(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
