"""Scenes in labels, agreement, and the network's files."""

import json

import pytest
import torch

from dalle_torch.shapes.classifier import (
    CLASSES,
    IGNORED,
    ClassifierConfig,
    ShapesClassifier,
    agreement,
    is_classifier,
    labels_of,
    named_attributes,
)
from dalle_torch.shapes.grammar import parse_caption
from dalle_torch.shapes.sampling import sample_scenes

SMALL = ClassifierConfig(channels=(2, 2, 2, 2), features=4)


def test_the_first_part_is_the_left_or_upper_one_whatever_the_caption_names_first():
    one, other = (
        named_attributes(parse_caption(text))
        for text in (
            "a small red circle to the left of a large blue square on a white background",
            "a large blue square to the right of a small red circle on a white background",
        )
    )
    assert one == other and one["color_0"] == "red" and one["shape_1"] == "square" and one["layout"] == "beside"
    assert named_attributes(parse_caption("a red circle below a blue square"))["color_0"] == "blue"


def test_what_a_caption_leaves_open_has_no_label():
    labels = labels_of([parse_caption("a large red shape"), parse_caption("a small red circle at the top")])
    assert labels["layout"].tolist() == [IGNORED, CLASSES["layout"].index("at the top")]
    assert labels["size_0"].tolist() == [IGNORED, 0] and labels["color_1"].tolist() == [IGNORED, IGNORED]
    assert CLASSES["shape_0"][labels["shape_0"][0]] == "shape"


def test_agreement_is_the_mean_over_what_the_caption_names():
    scenes = [parse_caption("a red circle"), parse_caption("a red square at the top on a black background")]
    shares = {name: torch.full((1, len(classes)), 1 / len(classes)) for name, classes in CLASSES.items()}
    for name, value, share in (("color_0", "red", 0.9), ("shape_0", "circle", 0.8), ("background", "black", 0.5)):
        shares[name][0, CLASSES[name].index(value)] = share
    table = agreement(shares, scenes)
    # without a place, all nine places together
    assert table[0, 0] == pytest.approx((0.9 + 0.8 + 9 / 12) / 3)
    assert table[0, 1] == pytest.approx((0.9 + 1 / 5 + 1 / 12 + 0.5) / 4)


def test_a_perfect_reader_agrees_with_every_scene_and_least_with_others():
    scenes = sample_scenes(20, 3)
    shares = {
        name: torch.nn.functional.one_hot(labels.clamp(min=0), len(CLASSES[name])).float()
        for name, labels in labels_of(scenes).items()
    }
    table = agreement(shares, scenes)
    assert (table.diagonal() == 1).all() and table.mean() < 0.6


def test_the_network_comes_back_from_its_folder(tmp_path):
    network = ShapesClassifier(SMALL).eval()
    network.save(tmp_path / "judge")
    again = ShapesClassifier.load(tmp_path / "judge")
    pixels = torch.rand(2, 3, 64, 64)
    assert all((again(pixels)[name] == logits).all() for name, logits in network(pixels).items())
    assert is_classifier(tmp_path / "judge") and not is_classifier(tmp_path)


@pytest.mark.parametrize("damage", ["weights", "config", "kind"])
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage):
    folder = tmp_path / "judge"
    ShapesClassifier(SMALL).save(folder)
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(b"x" * 100)
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        (folder / "config.json").write_text(json.dumps({"type": "bart"}))
    with pytest.raises(ValueError, match="holds no classifier of shapes, or a damaged one") as error:
        ShapesClassifier.load(folder)
    assert "\n" not in str(error.value)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="four numbers"):
        ClassifierConfig(channels=(1, 2))
