"""What `dalle-torch plan` refuses before anything is traced."""

from pathlib import Path

import pytest

from dalle_torch.cli.main import main

CONFIG = """\
model: {config: configs/model/mega.json, tokenizer: none}
data: {train: [none]}
training: {steps: 10, batch_size: 8}
runtime: {backend: BACKEND}
"""


@pytest.mark.parametrize(
    ("backend", "words", "message"),
    [
        ("accelerate", [], "runtime.backend=accelerate: a plan is for TPUs"),
        ("xla", ["--topology", "v9-8"], "topology 'v9-8' is unknown"),
        ("xla", ["--topology", "v3-12"], "give the shape in chips, as v3:4x4"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    backend: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG.replace("BACKEND", backend), encoding="utf-8")
    assert main(["plan", "--config", str(file), *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
