"""The checker passes pictures that show their caption and names the property that is wrong in those that do not."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dalle_torch.shapes.checker import analyse, check
from dalle_torch.shapes.drawing import render
from dalle_torch.shapes.grammar import BACKGROUNDS, COLORS, PLACES, RELATIONS, SHAPES, SIZES, Scene
from dalle_torch.shapes.sampling import sample_scenes

N = 160


def _passed(images, scenes: list[Scene]) -> float:
    return float(np.mean([check(image, scene).ok for image, scene in zip(images, scenes, strict=True)]))


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("leave_out", [0.0, 0.3])
def test_rendered_scenes_pass(unseen: bool, leave_out: float) -> None:
    scenes = sample_scenes(N, 21, unseen=unseen, leave_out=leave_out)
    assert _passed(render(scenes, 21), scenes) >= 0.995


def _other(choices, value: str, turn: int) -> str:
    rest = [choice for choice in choices if choice != value]
    return rest[turn % len(rest)]


def _change_part(scene: Scene, turn: int, name: str, choices) -> Scene:
    at = turn % len(scene.parts)
    changed = replace(scene.parts[at], **{name: _other(choices, getattr(scene.parts[at], name), turn)})
    return replace(scene, parts=tuple(changed if i == at else part for i, part in enumerate(scene.parts)))


CORRUPTIONS = {
    "color": lambda scene, turn: _change_part(scene, turn, "color", COLORS),
    "shape": lambda scene, turn: _change_part(scene, turn, "shape", SHAPES),
    "size": lambda scene, turn: _change_part(scene, turn, "size", SIZES),
    "background": lambda scene, turn: replace(scene, background=_other(BACKGROUNDS, scene.background, turn)),
    "relation": lambda scene, turn: scene.relation and replace(scene, relation=_other(RELATIONS, scene.relation, turn)),
    "place": lambda scene, turn: scene.place and replace(scene, place=_other(PLACES, scene.place, turn)),
}


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_a_single_wrong_property_is_found(name: str) -> None:
    """The picture shows a scene that differs from the caption in one property."""
    scenes = sample_scenes(N, 33)
    pairs = [(scene, shown) for i, scene in enumerate(scenes) if (shown := CORRUPTIONS[name](scene, i))]
    images = render([shown for _, shown in pairs], 33)
    assert len(pairs) > 40
    for image, (scene, _shown) in zip(images, pairs, strict=True):
        report = check(image, scene)
        assert not report.ok, scene.caption
        if len(scene.parts) == 1:
            assert set(report.failures) == {name}, (scene.caption, str(report))


def test_a_missing_part_is_found() -> None:
    pairs = [scene for scene in sample_scenes(N, 4) if len(scene.parts) == 2]
    shown = [Scene(parts=scene.parts[:1], background=scene.background) for scene in pairs]
    for image, scene in zip(render(shown, 4), pairs, strict=True):
        assert "parts" in check(image, scene).failures


def test_a_part_too_many_is_found() -> None:
    pairs = [scene for scene in sample_scenes(N, 4) if len(scene.parts) == 2]
    for image, scene in zip(render(pairs, 4), pairs, strict=True):
        told = Scene(parts=scene.parts[:1], background=scene.background)
        assert set(check(image, told).failures) == {"parts"}


def test_blank_and_foreign_pictures_fail() -> None:
    scene = sample_scenes(1, 0)[0]
    assert "parts" in check(np.full((64, 64, 3), 255, np.uint8), scene).failures
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not check(noise, scene).ok
    pink = np.full((64, 64, 3), (255, 120, 200), np.uint8)
    assert "background" in check(pink, scene).failures


def _jpeg(picture: np.ndarray) -> Image.Image:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=85)
    return Image.open(buffer).convert("RGB")


def _noisy(picture: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(int(picture.sum()))
    return np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "degrade",
    [_jpeg, _noisy, lambda picture: Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.6))],
    ids=["jpeg", "noise", "blur"],
)
def test_degraded_pictures_mostly_pass(degrade) -> None:
    scenes = sample_scenes(N, 8)
    # What a network's reconstruction looks like at worst; a person still reads all of these.
    assert _passed([degrade(picture) for picture in render(scenes, 8)], scenes) >= 0.97


def test_degraded_wrong_pictures_still_fail() -> None:
    scenes = sample_scenes(N, 33)
    shown = [CORRUPTIONS["color"](scene, i) for i, scene in enumerate(scenes)]
    assert _passed([_noisy(picture) for picture in render(shown, 33)], scenes) == 0


def test_regions_are_measured() -> None:
    scene = sample_scenes(1, 2, single=1.0)[0]
    background, regions, specks = analyse(render([scene], 2)[0])
    (region,) = regions
    assert (background, region.color, region.shape) == (scene.background, scene.parts[0].color, scene.parts[0].shape)
    # One pixel of jitter, and what thresholding an anti-aliased edge adds or takes.
    assert abs(region.side - SIZES[scene.parts[0].size]) <= 2
    assert specks == 0


def test_other_sizes_and_types_are_refused() -> None:
    scene = sample_scenes(1, 0)[0]
    with pytest.raises(ValueError, match=r"uint8 \[64, 64, 3\]"):
        check(np.zeros((32, 32, 3), np.uint8), scene)
    with pytest.raises(ValueError, match="float32"):
        check(np.zeros((64, 64, 3), np.float32), scene)
