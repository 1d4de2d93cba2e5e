"""Captions and pictures of shapes: the grammar is its own inverse, pictures are a pure function of seed and index."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_torch.shapes.drawing import coverage, render
from dalle_torch.shapes.grammar import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Part,
    Scene,
    parse_caption,
)
from dalle_torch.shapes.sampling import sample_prompts, sample_scenes

part = st.builds(
    Part,
    color=st.sampled_from(sorted(COLORS)),
    shape=st.sampled_from(SHAPES),
    size=st.none() | st.sampled_from(sorted(SIZES)),
)
background = st.none() | st.sampled_from(sorted(BACKGROUNDS))
single = st.builds(
    Scene, parts=st.tuples(part), place=st.none() | st.sampled_from(sorted(PLACES)), background=background
)
pair = st.builds(Scene, parts=st.tuples(part, part), relation=st.sampled_from(sorted(RELATIONS)), background=background)


@given(single | pair)
def test_a_caption_reads_back_as_its_scene(scene: Scene) -> None:
    assert parse_caption(scene.caption) == scene


def test_captions_read_as_english() -> None:
    red, orange = Part(color="red", shape="circle", size="small"), Part(color="orange", shape="square")
    assert Scene(parts=(red, orange), relation="to the left of", background="white").caption == (
        "a small red circle to the left of an orange square on a white background"
    )
    assert Scene(parts=(red,), place="in the centre").caption == "a small red circle in the centre"


def test_spelling_case_and_stop_make_no_difference() -> None:
    assert parse_caption("  A red Circle in the center on a grey background. ") == Scene(
        parts=(Part(color="red", shape="circle"),), place="in the centre", background="gray"
    )


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red",
        "a mauve circle",
        "a red hexagon",
        "a red circle beside a blue square",
        "a red circle above",
        "a red circle at the top on a red background",
        "a red circle above a blue square at the top",
        "two red circles",
    ],
)
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="does not follow the grammar"):
        parse_caption(caption)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parts": ()}, "one or two parts"),
        ({"parts": (Part(color="red", shape="circle"),), "relation": "above"}, "two parts need one"),
        ({"parts": (Part(color="red", shape="circle"),) * 2}, "two parts need one"),
        ({"parts": (Part(color="red", shape="circle"),) * 2, "relation": "above", "place": "at the top"}, "place"),
        ({"parts": (Part(color="red", shape="circle"),), "background": "red"}, "background='red' is not one of"),
    ],
)
def test_scenes_that_no_caption_describes_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scene(**fields)


def test_held_out_pairs_are_in_unseen_scenes_only() -> None:
    assert not any(scene.held_out for scene in sample_scenes(3000, 5))
    unseen = sample_scenes(600, 5, unseen=True)
    assert all(scene.held_out for scene in unseen)
    assert {(p.color, p.shape) for scene in unseen for p in scene.parts if p.held_out} == HELD_OUT


def test_each_color_and_each_shape_is_seen_without_the_held_out_pairs() -> None:
    seen = {(p.color, p.shape) for scene in sample_scenes(3000, 5) for p in scene.parts}
    assert seen == {(color, shape) for color in COLORS for shape in SHAPES} - HELD_OUT


def test_every_relation_place_size_and_background_is_sampled() -> None:
    scenes = sample_scenes(2000, 9)
    assert {scene.relation for scene in scenes} == {None, *RELATIONS}
    assert {scene.place for scene in scenes} == {None, *PLACES}
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {p.size for scene in scenes for p in scene.parts} == set(SIZES)


def test_prompts_leave_nothing_open() -> None:
    for prompt in sample_prompts(200, 3) + sample_prompts(200, 3, unseen=True):
        scene = parse_caption(prompt)
        assert scene.background and all(p.size for p in scene.parts) and (scene.relation or scene.place)


@settings(max_examples=20)
@given(st.integers(0, 2**63), st.integers(0, 10_000))
def test_any_stretch_of_the_sequence_is_the_same_stretch(seed: int, start: int) -> None:
    scenes = sample_scenes(6, seed, start=start, leave_out=0.3)
    assert sample_scenes(2, seed, start=start + 3, leave_out=0.3) == scenes[3:5]
    np.testing.assert_array_equal(render(scenes[3:5], seed, start=start + 3), render(scenes, seed, start=start)[3:5])


def test_seeds_give_different_scenes_and_pictures() -> None:
    assert sample_scenes(50, 1) != sample_scenes(50, 2)
    scenes = sample_scenes(50, 1)
    assert (render(scenes, 1) != render(scenes, 2)).any()


def test_colors_are_far_apart() -> None:
    """The checker tells colours by the nearest one, up to a distance of 70."""
    palette = np.array([*COLORS.values(), *BACKGROUNDS.values()], dtype=float)
    distances = np.linalg.norm(palette[:, None] - palette[None], axis=-1)
    assert distances[~np.eye(len(palette), dtype=bool)].min() > 90


def test_shapes_cover_the_area_that_geometry_says() -> None:
    covered = coverage(np.arange(4), np.full((4, 2), 32.0), np.full(4, 24.0)).sum((1, 2))
    # Anti-aliasing by distance rounds corners off, by less than one pixel for each of four.
    np.testing.assert_allclose(covered, [np.pi * 144, 576, 288, 288], atol=4)


def test_pictures_show_background_and_ink() -> None:
    scene = Scene(parts=(Part(color="blue", shape="square", size="large"),), place="in the centre", background="gray")
    picture = render([scene], 0)[0]
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert tuple(picture[0, 0]) == BACKGROUNDS["gray"]
    assert tuple(picture[32, 32]) == COLORS["blue"]


def test_no_scenes_give_no_pictures() -> None:
    assert render([], 0).shape == (0, 64, 64, 3)
