"""`evaluate` and `pareto` on the embedded model, as its users type them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from dalle_torch.cli.main import main
from dalle_torch.evaluation.protocol import PROTOCOL
from tests.unit.reports.test_html import Reader

SMALL = ["--limit", "40", "--data-seed", "3"]


def run(*words):
    assert main([str(word) for word in words]) == 0


def result_of(folder, name="evaluation.json"):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "first"
    run("evaluate", "shapes", *SMALL, "--num-images", "2", "--output", folder)
    return folder


def test_evaluation_says_what_the_model_is_worth_and_who_judged(evaluated):
    result = result_of(evaluated)
    assert result["protocol"] == PROTOCOL and result["pictures"]["count"] == 80
    scores = result["scores"]
    assert scores["text_image_score"] > 0.85 and scores["text_image_score_of_data"] > 0.9
    assert scores["retrieval_accuracy"] > 0.9 and scores["diversity"] > 0 and 0 < scores["evaluation_loss"] < 1.5
    assert result["vqgan"]["psnr"] > 25 and result["vqgan"]["ssim"] > 0.9
    assert result["judges"]["features"]["standard"] is False and len(result["notices"]) >= 2
    assert all("shapes" in notice for notice in result["notices"][:2])
    assert any("no full rank" in notice for notice in result["notices"])


def test_the_page_opens_offline_and_shows_pictures(evaluated):
    reader = Reader()
    reader.feed((evaluated / "report.html").read_text())
    assert len(reader.addresses) > 60 and all(address.startswith("data:image/") for address in reader.addresses)
    assert any("not the standard one" in text for text in reader.text)


def test_twice_and_at_another_batch_size_it_is_equal_to_the_last_digit(evaluated, tmp_path):
    run("evaluate", "shapes", *SMALL, "--num-images", "2", "--output", tmp_path / "again", "--batch-size", "7")
    first, second = result_of(evaluated), result_of(tmp_path / "again")
    for result in (first, second):
        del result["run"]
    assert first == second


def test_data_of_codes_and_of_pictures(tmp_path):
    """The codes of a data set decode to what the VQGAN makes of its pictures."""
    from dalle_torch.shapes.drawing import render
    from dalle_torch.shapes.sampling import sample_scenes

    photos = tmp_path / "photos"
    photos.mkdir()
    scenes = sample_scenes(12, 3)
    lines = []
    for number, (scene, picture) in enumerate(zip(scenes, render(scenes, 3), strict=True)):
        Image.fromarray(picture).save(photos / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": scene.caption}))
    (photos / "0.png").write_bytes(b"no picture")
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    run("encode", photos, "--output", tmp_path / "tokens", "--vqgan", "shapes", "--max-bad-fraction", "0.5")
    run("evaluate", "shapes", "--data", photos, "--output", tmp_path / "a", "--limit", "0")
    run("evaluate", "shapes", "--data", tmp_path / "tokens", "--output", tmp_path / "b", "--limit", "0")
    pictures, codes = result_of(tmp_path / "a"), result_of(tmp_path / "b")
    assert pictures["data"]["kind"] == "pictures" and codes["data"]["kind"] == "codes"
    assert pictures["data"]["skipped"] == {"image_damaged": 1} and pictures["data"]["samples"] == 11
    assert any("the data are codes" in notice for notice in codes["notices"])
    used = {name: pictures["vqgan"][name] for name in ("codebook_used", "codebook_perplexity")}
    assert codes["vqgan"] == pytest.approx(used), "no errors of a VQGAN without pictures"
    assert "samples of the data were left out: image_damaged 1" in pictures["notices"]
    # Pictures come as PNG, so codes are the same; the order is that of the shard.
    assert codes["scores"]["evaluation_loss"] == pytest.approx(pictures["scores"]["evaluation_loss"], rel=1e-4)


def test_pareto_is_resumed_after_a_kill_and_ends_as_if_unbroken(tmp_path):
    words = ["pareto", "shapes", "--limit", "40", "--condition-scale", "0.5,1.25", "--num-images", "2"]
    command = [sys.executable, "-m", "dalle_torch.cli.main", *words, "--output"]
    environment = os.environ | {"USE_TORCH_XLA": "0"}
    with subprocess.Popen([*command, str(tmp_path / "broken")], env=environment) as process:
        deadline = time.monotonic() + 240
        while not list((tmp_path / "broken").glob("drawings/*/*.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("drawings/*/*.safetensors")}
    run(*words, "--output", tmp_path / "broken")
    run(*words, "--output", tmp_path / "whole")
    assert kept and all(path.stat().st_mtime_ns == at for path, at in kept.items())
    broken, whole = (result_of(tmp_path / name, "pareto.json") for name in ("broken", "whole"))
    assert broken["settings"] == whole["settings"]
    low, high = whole["settings"]
    assert low["text_image_score"] < high["text_image_score"] and low["diversity"] > high["diversity"]
    assert any(row["pareto"] for row in whole["settings"])
    with (tmp_path / "whole" / "pareto.csv").open() as file:
        assert [float(row["fid"]) for row in csv.DictReader(file)] == [low["fid"], high["fid"]]
    with Image.open(tmp_path / "whole" / "pareto.png") as chart:
        assert chart.width > 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "no/such-model-here", "--features", "shapes", "--clip", "shapes"], "no/such-model-here"),
        (["evaluate", "shapes", "--data", "nothing-*.tar"], "no shard matches nothing-*.tar"),
        (["evaluate", "shapes", "--features", "no.pth"], "no.pth is not there"),
        (["evaluate", "shapes", "--limit", "1"], "limit=1 must be at least 2"),
        (["evaluate", "shapes", "--limit", "0"], "have no end: give --limit N"),
        (["evaluate", "shapes", "--quantize", "int8"], "leave out --quantize"),
        (["pareto", "shapes", "--temperature", "-1"], "temperature"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*words, "--output", "out"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_data_without_a_usable_sample_is_said(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"no picture")
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a red circle"}))
    assert main(["evaluate", "shapes", "--data", str(photos), "--output", str(tmp_path / "out")]) == 1
    assert "has not one usable sample: image_damaged 1" in capsys.readouterr().err
