"""A data set is scored, looked at, and trained on above a threshold, as its users type it."""

import json

import pytest
from PIL import Image

from dalle_torch.cli.main import main
from dalle_torch.shapes.drawing import render
from dalle_torch.shapes.sampling import sample_scenes


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Two shards of codes of shapes, a quarter of which have another picture's caption."""
    folder = tmp_path_factory.mktemp("score")
    photos = folder / "photos"
    photos.mkdir()
    scenes = sample_scenes(24, 5)
    captions = [scene.caption for scene in scenes]
    captions[:6] = captions[12:18]
    with (photos / "metadata.jsonl").open("w") as lines:
        for number, picture in enumerate(render(scenes, 5)):
            Image.fromarray(picture).save(photos / f"{number:02d}.png")
            lines.write(json.dumps({"file_name": f"{number:02d}.png", "text": captions[number]}) + "\n")
    words = [
        "encode",
        str(photos),
        "--output",
        str(folder / "tokens"),
        "--vqgan",
        "shapes",
        "--samples-per-shard",
        "12",
    ]
    assert main(words) == 0
    words = [
        "score",
        str(folder / "tokens"),
        "--clip",
        "shapes",
        "--vqgan",
        "shapes",
        "--output",
        str(folder / "scored"),
    ]
    assert main([*words, "--jobs", "2"]) == 0
    return folder


def test_wrong_captions_score_lowest_and_the_folder_stays_whole(scored, capsys):
    assert main(["encode", "--output", str(scored / "scored"), "--verify"]) == 0
    words = ["explore", str(scored / "scored"), "--output", str(scored / "explore"), "--vqgan", "shapes"]
    assert main([*words, "--tokenizer", "shapes"]) == 0
    printed = capsys.readouterr().out
    assert "24 samples" in printed and "min_clip_score" in printed
    result = json.loads((scored / "explore" / "explore.json").read_text())
    assert result["scores"]["min"] < 0.8 < 0.95 < result["scores"]["max"] and result["equal_captions"] >= 6
    assert result["caption_tokens"]["min"] > 3
    threshold = next(row for row in result["thresholds"] if row["samples"] <= 18)
    assert threshold["samples"] >= 16


def test_training_takes_what_is_above_the_threshold(scored, tmp_path):
    overrides = {
        "model.weights": "shapes", "data.train": f'["{scored / "scored"}"]', "data.min_clip_score": 0.9,
        "data.workers": 0, "data.lanes": 1, "training.steps": 1, "training.batch_size": 2, "training.log_every": 1,
    }  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text("{}\n")
    words = [word for name, value in overrides.items() for word in ("--set", f"{name}={value}")]
    assert main(["train", "--config", str(config), "--output", str(tmp_path / "run"), *words]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "nothing*.tar", "--clip", "shapes", "--output", "out"], "no shard matches nothing*.tar"),
        (["explore", "nothing*.tar", "--output", "out"], "no shard matches nothing*.tar"),
    ],
)
def test_names_that_lead_nowhere_are_told(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_codes_of_another_vqgan_are_not_scored(scored, capsys, tmp_path):
    manifest = scored / "tokens" / "manifest.json"
    text = manifest.read_text()
    own = json.loads(text)["settings"]["vqgan"]
    manifest.write_text(text.replace(own, "0" * len(own)))
    try:
        words = [
            "score",
            str(scored / "tokens"),
            "--clip",
            "shapes",
            "--vqgan",
            "shapes",
            "--output",
            str(tmp_path / "x"),
        ]
        assert main(words) == 1
    finally:
        manifest.write_text(text)
    assert "codes of another VQGAN than --vqgan shapes" in capsys.readouterr().err
