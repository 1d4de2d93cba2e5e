"""`dalle-torch export`: its options, what it prints, the hub, and one line for each mistake."""

from pathlib import Path

import pytest
import torch

from dalle_torch import DalleBart
from dalle_torch.cli.main import main
from tests.hub_server import HubServer
from tests.tiny_pipeline import tiny_vqgan
from tests.unit.checkpoint.runs import make_run, model_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a failing command leaves."""
    capsys.readouterr()
    assert main(["export", *map(str, words)]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("dalle-torch: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_a_run_to_a_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_vqgan().save_pretrained(tmp_path / "codebook")
    out = tmp_path / "Tiny"
    words = ["export", str(run), "--output", str(out), "--step", "10", "--dtype", "bfloat16"]
    assert main([*words, "--vqgan", str(tmp_path / "codebook"), "--license", "mit"]) == 0
    assert capsys.readouterr().out == (f"{out}: the model of step 10, from {run / 'checkpoints' / 'step-00000010'}\n")
    model = DalleBart.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    expected = model_of(10).state_dict()
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in model.state_dict().items())
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "# Tiny\n" in card
    assert 'license: "mit"' in card
    assert (out / "vqgan" / "model.safetensors").is_file()


def test_to_the_hub(
    hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(run), "--output", str(tmp_path / "out"), "--push-to-hub", "tester/tiny", "--private"]
    assert main([*words, "--token", "mine"]) == 0
    assert f"uploaded to {hub.endpoint}/tester/tiny" in capsys.readouterr().out
    assert {seen.token for seen in hub.requests if seen.method == "POST"} == {"mine"}
    files = hub.repos["tester/tiny"].commits[hub.repos["tester/tiny"].refs["main"]]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= set(files)
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    found, expected = DalleBart.from_pretrained("tester/tiny").state_dict(), model_of(20).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    hub.refuse(403, path="/api/repos/create")
    words[words.index("tester/tiny")] = "org/other"
    message = failure(capsys, *words[1:], "--token", "hf_mine", "--overwrite")
    assert f"{tmp_path / 'out'} is written, but not uploaded to org/other: " in message
    assert "hf_mine" not in message
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_mistakes_are_one_line_each(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "nowhere is not there" in failure(capsys, tmp_path / "nowhere", "--output", out)
    assert "no checkpoint of step 7; there are: 10, 20" in failure(capsys, run, "--output", out, "--step", 7)
    assert "--private and --token are for --push-to-hub" in failure(capsys, run, "--output", out, "--private")
    assert "nobody" in failure(capsys, run, "--output", out, "--vqgan", tmp_path / "nobody")
    assert "nobody" in failure(capsys, run, "--output", out, "--tokenizer", tmp_path / "nobody")
    assert not out.exists()
    for words in (
        ["export", str(run)],
        ["export", "--output", "x"],
        ["export", str(run), "--output", "x", "--dtype=x"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 2


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["export", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "RUN_OR_CHECKPOINT", "--output DIR", "--step N", "--dtype", "--tokenizer SOURCE", "--vqgan SOURCE", "--name",
        "--license", "--max-shard-size", "--overwrite", "--push-to-hub REPO", "--private", "--token", "--debug",
    ):  # fmt: skip
        assert option in text, option
