"""The demonstration counts what is right and what is wrong, and fails where too much is wrong."""

import json

import pytest
from PIL import Image

from dalle_torch.cli.demo import Half, judge, sample_halves, table
from dalle_torch.cli.main import main
from dalle_torch.pipeline.output import DallePipelineOutput, read_metadata
from dalle_torch.shapes.drawing import render
from dalle_torch.shapes.grammar import parse_caption
from dalle_torch.shapes.sampling import sample_prompts
from tests.tiny_pipeline import save_tiny, tiny_model, tiny_processor, tiny_vqgan


def drawn(prompts):
    """What a perfect model draws."""
    images = [Image.fromarray(picture) for picture in render([parse_caption(prompt) for prompt in prompts], seed=1)]
    count = len(prompts)
    return DallePipelineOutput(images=images, prompts=prompts, seeds=[0] * count, tokens=None, withheld=[False] * count)


@pytest.fixture
def halves():
    return [Half("seen", sample_prompts(6, 5)), Half("unseen", sample_prompts(6, 5, unseen=True))]


def test_right_pictures_are_right(halves):
    judge(drawn([prompt for half in halves for prompt in half.prompts]), halves)
    assert [half.accuracy for half in halves] == [1, 1]
    lines = table(halves).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:3] == ["seen", "6/6", "100.0%"]


def test_wrong_pictures_are_counted_by_what_is_wrong(halves):
    output = drawn([prompt for half in halves for prompt in half.prompts])
    output.images[7] = Image.new("RGB", (64, 64), "white")
    judge(output, halves)
    assert [half.right for half in halves] == [6, 5]
    assert "parts" in halves[1].failures[1]
    text = table(halves)
    assert "83.3%" in text
    assert f"wrong (unseen): {halves[1].prompts[1]}" in text
    assert text.count("wrong (") == 1


def test_unseen_prompts_are_unseen_and_the_others_are_not():
    for seed in (0, 1):
        for half, unseen in zip(sample_halves(32, seed), (False, True), strict=True):
            assert {parse_caption(prompt).held_out for prompt in half.prompts} == {unseen}
            assert len(set(half.prompts)) == 32


def test_a_model_that_knows_nothing_fails_and_shows_it(tmp_path, capsys):
    from dalle_torch import DallePipeline

    vqgan = tiny_vqgan(resolution=64, ch_mult=(1, 1, 1, 1, 1))
    model = save_tiny(tmp_path / "model", DallePipeline(tiny_model(), tiny_processor(), vqgan))
    arguments = ["demo", "--model", str(model), "--prompts", "4", "--output", str(tmp_path / "out"), "--device", "cpu"]
    capsys.readouterr()  # what saving the model wrote
    assert main([*arguments, "--min-seen", "0.9", "--min-unseen", "0.75"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "0.0% on seen pairs, below 90.0% and 0.0% on unseen pairs, below 75.0%" in captured.err
    assert "dalle-torch generate" in captured.out
    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert report["accuracy"] == {"seen": 0, "unseen": 0} == read_metadata(tmp_path / "out" / "demo.png")["accuracy"]
    assert [picture["pair"] for picture in report["pictures"]] == ["seen", "seen", "unseen", "unseen"]
    assert all(picture["failures"] and not picture["right"] for picture in report["pictures"])
    assert len(list((tmp_path / "out").glob("demo-*.png"))) == 4
    with Image.open(tmp_path / "out" / "demo.png") as sheet:
        # Four pictures, twice as large, in red frames with text below.
        assert sheet.width == 4 * (2 * 64 + 6) + 3 * 6
        assert sheet.height > 2 * 64 + 6 + 14
        assert sheet.getpixel((1, 1)) == Image.new("RGB", (1, 1), "crimson").getpixel((0, 0))
    # Asked for less, it is content; and what an earlier demonstration wrote is replaced.
    assert main(arguments) == 0
    assert len(list((tmp_path / "out").iterdir())) == 6
