"""From a checkpoint to a folder that everything else loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dalle_torch import DalleBart, DallePipeline
from dalle_torch.checkpoint import CheckpointFolder, export
from dalle_torch.checkpoint.export import export_model, find_checkpoint
from dalle_torch.checkpoint.model_card import ModelCard, loss_table, read_metrics
from dalle_torch.storage import CheckpointError
from dalle_torch.text import DalleBartProcessor
from tests.tiny_pipeline import tiny_processor, tiny_vqgan
from tests.unit.checkpoint.runs import make_run, model_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def test_what_is_exported_loads_and_draws(run: Path, tmp_path: Path) -> None:
    tiny_vqgan().save_pretrained(tmp_path / "codebook")
    checkpoint = export_model(run, tmp_path / "new" / "out", vqgan=tmp_path / "codebook")
    out = tmp_path / "new" / "out"
    assert checkpoint.step == 20
    model = DalleBart.from_pretrained(out)
    expected = model_of(20).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    prompt = "a red square"
    assert torch.equal(
        DalleBartProcessor.from_pretrained(out)(prompt)["input_ids"], tiny_processor()(prompt)["input_ids"]
    )
    assert DallePipeline.from_pretrained(str(out))(prompt, seed=1).images[0].size == (16, 16)
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json", "vqgan",
    }  # fmt: skip
    assert (
        str(tmp_path) not in "".join(path.read_text() for path in out.rglob("*.json")) + (out / "README.md").read_text()
    )


def test_a_step_a_dtype_and_shards(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "out", step=10, dtype=torch.bfloat16, max_shard_size="20KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    model = DalleBart.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    expected = model_of(10).state_dict()
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in model.state_dict().items())


def test_the_places_a_checkpoint_is_found_in(run: Path, tmp_path: Path) -> None:
    checkpoints = run / "checkpoints"
    for source, step, expected in [
        (run, None, 20),
        (run, 10, 10),
        (checkpoints, None, 20),
        (checkpoints / "step-00000010", None, 10),
        (f"{checkpoints}/step-00000010/", None, 10),
    ]:
        found = find_checkpoint(source, step)
        assert (found.checkpoint.step, found.run) == (expected, run)
    elsewhere = make_run(tmp_path / "other", checkpoints="memory://somewhere/checkpoints")
    assert find_checkpoint(elsewhere).run == elsewhere
    for url in ("memory://somewhere/checkpoints", "memory://somewhere/checkpoints/step-00000020"):
        found = find_checkpoint(url)
        assert (found.checkpoint.step, found.run) == (20, None)
    with pytest.raises(FileNotFoundError, match="the tokenizer of the run, someone/tiny, cannot be had: .*--tokenizer"):
        export_model("memory://somewhere/checkpoints", tmp_path / "out")
    export_model("memory://somewhere/checkpoints", tmp_path / "out", processor=run / "processor")
    assert DalleBart.from_pretrained(tmp_path / "out").config.d_model == 32


def test_the_model_card(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "out", card=ModelCard(name="Tiny", license="apache-2.0", data="Made up."))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text.startswith('---\nlicense: "apache-2.0"\npipeline_tag: text-to-image\n')
    for words in (
        "# Tiny", "after 20 updates", "(1 + 2 layers, d_model 32)", "DallePipeline.from_pretrained", "Made up.",
        "`gs://bucket/shards/{0..9}.tar`", "`0.tar`", "| optimizer.name | ", "| training.batch_size | 64 |",
        "## Intended use", "## Limits", "## Bias", "## Licence\n\napache-2.0", "| step | loss | eval_loss |",
        "| 1 | 5 |  |", "| 100 | 0.05 | 0.06 |",
    ):  # fmt: skip
        assert words in text, words
    for words in ("secret", "key@", "/home/me"):
        assert words not in text
    export_model(run, tmp_path / "plain")
    assert "*To be filled in: the licence" in (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")


def test_what_was_changed_on_the_way_is_in_the_card(tmp_path: Path) -> None:
    history = [{"time": "2026-01-01", "step": 15, "setting": "learning_rate", "old": 1e-3, "new": 5e-4}]
    export_model(make_run(tmp_path / "run", history=history), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| time | step | setting | old | new |" in text
    assert "| 2026-01-01 | 15 | learning_rate | 0.001 | 0.0005 |" in text


def test_the_table_of_losses() -> None:
    assert loss_table([]) == "*The run has left no metrics.*"
    lines = ['{"step": 1, "loss": 3.0}', "torn", "[]", '{"step": 2, "loss": NaN}', '{"step": 2, "loss": 2.0, "lr": 1}']
    rows = read_metrics(lines)
    assert rows == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "lr": 1}]
    assert loss_table(rows).splitlines()[2:] == ["| 1 | 3 |", "| 2 | 2 |"]
    many = [{"step": step, "loss": 1.0} for step in range(1000)]
    table = loss_table(many).splitlines()
    assert len(table) == 22
    assert table[-1] == "| 999 | 1 |"


def test_what_does_not_belong_together(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny_vqgan(n_embed=99).save_pretrained(tmp_path / "codebook")
    with pytest.raises(ValueError, match="pictures of 16 of 99 codes, and the model draws 16 of 23"):
        export_model(run, out, vqgan=tmp_path / "codebook")
    small = make_run(tmp_path / "small", model=model_of(1).config.to_dict() | {"encoder_vocab_size": 20})
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \[300, 32\], expected \[20, 32\]"):
        export_model(small, out)
    nothing = make_run(tmp_path / "nothing", model=None)
    with pytest.raises(CheckpointError, match="has no configuration of a model"):
        export_model(nothing, out)
    odd = make_run(tmp_path / "odd", model=model_of(1).config.to_dict() | {"d_model": "x"})
    with pytest.raises(ValueError, match="d_model"):
        export_model(odd, out)
    deep = make_run(tmp_path / "deep", model=model_of(1).config.to_dict() | {"decoder_layers": 3})
    with pytest.raises(CheckpointError, match="decoder.layers.2.* is missing"):
        export_model(deep, out)
    with pytest.raises(ValueError, match="holds the run itself"):
        export_model(run, run, overwrite=True)
    assert not out.exists()


def test_what_is_there_is_not_lost(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("work of years")
    with pytest.raises(FileExistsError, match="is not empty: give another folder, or --overwrite"):
        export_model(run, out)

    def fail(*args: Any) -> None:
        raise CheckpointError("tensors differ")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="tensors differ"):
        patch.setattr(export, "check_written", fail)
        export_model(run, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    export_model(run, out, overwrite=True)
    assert not (out / "mine").exists()
    with pytest.raises(FileExistsError):
        export_model(run, out / "config.json")


def test_a_tensor_that_was_not_written_as_it_is_is_found(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    export.check_written(tmp_path / "out", tensors)
    first, second, *_ = tensors
    with pytest.raises(CheckpointError, match=first):
        export.check_written(tmp_path / "out", tensors | {first: tensors[first] + 1})
    with pytest.raises(CheckpointError, match="more"):
        export.check_written(tmp_path / "out", tensors | {"more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=second):
        export.check_written(tmp_path / "out", {k: v for k, v in tensors.items() if k != second})


def test_sources_that_are_none(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 7; there are: 10, 20"):
        find_checkpoint(run, 7)
    with pytest.raises(FileNotFoundError, match="is of step 10, not 20"):
        find_checkpoint(run / "checkpoints" / "step-00000010", 20)
    with pytest.raises(FileNotFoundError, match="is not there"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="step-00000077 is not there"):
        find_checkpoint(run / "checkpoints" / "step-00000077")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no checkpoint that is whole"):
        find_checkpoint(tmp_path / "empty")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "step-00000020" / "meta.json").write_text("{}")
    assert find_checkpoint(copy).checkpoint.step == 10
    with pytest.raises(CheckpointError, match="meta.json has 2 bytes"):
        find_checkpoint(copy, 20)
    (copy / "config.yaml").write_text(json.dumps({"model": {"config": "x", "modle": 1}}))
    with pytest.raises(ValueError, match="modle"):
        find_checkpoint(copy)


def test_opening_a_step(run: Path) -> None:
    folder = CheckpointFolder(str(run / "checkpoints"))
    assert folder.open(10).step == 10
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 11"):
        folder.open(11)
