"""Re-ranking with a small CLIP model of transformers."""

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from dalle_torch.evaluation.clip import ClipScorer
from tests.tiny_pipeline import tiny_pipeline, tiny_processor

PROMPTS = ["a cat", "something else"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def clip():
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 300, "max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 2}
    vision = tower | {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(do_resize=True, size=size, do_center_crop=False)
    return model, CLIPProcessor(images, tiny_processor().tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("clip")
    for part in clip:
        part.save_pretrained(folder)
    return folder


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
