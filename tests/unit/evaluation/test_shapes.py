"""The embedded judge of shapes on real pictures."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dalle_torch.evaluation.distances import FeatureStatistics, frechet_distance
from dalle_torch.evaluation.loading import load_features, load_scorer
from dalle_torch.evaluation.retrieval import retrieval_accuracy
from dalle_torch.shapes.checker import check
from dalle_torch.shapes.drawing import render
from dalle_torch.shapes.sampling import sample_scenes


def drawn(count, seed, **options):
    scenes = sample_scenes(count, seed, **options)
    return [Image.fromarray(picture) for picture in render(scenes, seed)], scenes


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("shapes")


@pytest.mark.parametrize("unseen", [False, True])
def test_it_agrees_with_right_captions_and_less_with_wrong_ones(scorer, unseen):
    images, scenes = drawn(64, 5, unseen=unseen)
    captions = [scene.caption for scene in scenes]
    right = np.array(scorer.score(images, captions))
    wrong = np.array(scorer.score(images, captions[1:] + captions[:1]))
    assert right.mean() > 0.9 and wrong.mean() < 0.6 and (right > wrong).mean() > 0.97
    assert retrieval_accuracy(scorer, images, captions) > 0.95


def test_one_wrong_word_costs_its_share(scorer):
    (image,), (scene,) = drawn(1, 11, single=1.0)
    caption = scene.caption
    other = next(word for word in ("red", "blue", "green") if word not in caption)
    wrong = caption.replace(scene.parts[0].color, other)
    first, second = scorer.score([image, image], [caption, wrong])
    # a place, a size, a colour, a shape, a background
    assert first - second == pytest.approx(1 / 5, abs=0.05)


def test_broken_pictures_agree_with_nothing_much(scorer):
    """What the checker of pixels calls wrong scores lower."""
    images, scenes = drawn(48, 21)
    generator = np.random.default_rng(0)
    broken = []
    for image in images:
        pixels = np.array(image)
        for _ in range(12):
            row, column = generator.integers(0, 14, 2) * 4
            pixels[row : row + 8, column : column + 8] = generator.integers(0, 256, 3)
        broken.append(Image.fromarray(pixels))
    assert not any(check(image, scene).ok for image, scene in zip(broken, scenes, strict=True))
    captions = [scene.caption for scene in scenes]
    assert np.mean(scorer.score(broken, captions)) < np.mean(scorer.score(images, captions)) - 0.15


def test_scores_are_the_same_to_the_last_digit_whatever_is_scored_together(scorer):
    images, scenes = drawn(40, 7)
    captions = [scene.caption for scene in scenes]
    scores = scorer.score(images, captions)
    assert scores[3:5] == scorer.score(images[3:5], captions[3:5])
    assert scores[33:] == scorer.score(images[33:], captions[33:])
    assert scorer.similarities(images, captions).diagonal().tolist() == scores
    extractor = load_features("shapes")
    assert (extractor.features(images)[33:] == extractor.features(images[33:])).all()
    assert extractor.features([]).shape == (0, extractor.dimensions) and scorer.score([], []) == []


def test_distance_is_near_zero_for_the_same_kind_and_grows_with_damage():
    extractor = load_features("shapes")

    def statistics(images):
        found = FeatureStatistics(extractor.dimensions)
        found.update(extractor.features(images))
        return found

    images, _ = drawn(300, 1)
    reference = statistics(drawn(300, 2)[0])
    blurred = [[image.filter(ImageFilter.GaussianBlur(radius)) for image in images] for radius in (1, 3)]
    distances = [frechet_distance(statistics(some), reference) for some in (images, *blurred)]
    assert distances == sorted(distances) and distances[0] < 0.2 * distances[2]


def test_pictures_of_other_sizes_are_brought_to_its_own(scorer):
    images, scenes = drawn(4, 9)
    captions = [scene.caption for scene in scenes]
    large = [image.resize((256, 256), Image.Resampling.BICUBIC) for image in images]
    assert scorer.score(large, captions) == pytest.approx(scorer.score(images, captions), abs=0.1)


def test_it_says_that_it_is_not_the_standard_and_which_weights_judged(scorer):
    about = scorer.judge.to_json()
    assert about["standard"] is False and len(about["sha256"]) == 64 and about["source"] == "shapes"


def test_captions_of_anything_else_are_refused(scorer):
    with pytest.raises(ValueError, match="captions of shapes alone; a CLIP model reads any: caption 'a cat'"):
        scorer.score([Image.new("RGB", (64, 64))], ["a cat"])


def test_a_name_that_is_no_judge_is_told_with_those_that_are():
    with pytest.raises(ValueError, match="there is no judge 'shape': take shapes, a CLIP model's hub id"):
        load_scorer("shape")


def test_threads_leave_features_as_they_are():
    images, _ = drawn(8, 3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(load_features("shapes").features(images))
    finally:
        torch.set_num_threads(before)
    # Rows are shared out among threads; sums over them are not.
    assert torch.allclose(found[0], found[1], atol=1e-5)
