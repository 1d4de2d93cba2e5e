"""The recipe of the embedded model, run whole at the smallest size."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_torch.config import ShapesConfig
from dalle_torch.config_io import load_config
from dalle_torch.evaluation.loading import load_scorer
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.shapes.drawing import render
from dalle_torch.shapes.sampling import sample_scenes
from dalle_torch.text.processor import DalleBartProcessor
from dalle_torch.text.tokenizer import DalleBartTokenizer
from dalle_torch.training.shapes import run_recipe
from dalle_torch.training.shapes_text import build_tokenizer

FILE = Path(__file__).parents[3] / "configs" / "train" / "shapes.yaml"


@pytest.fixture(scope="module")
def tokenizer() -> DalleBartTokenizer:
    return build_tokenizer([scene.caption for scene in sample_scenes(3000, 1)])


def _tiny(**training: object) -> ShapesConfig:
    config = load_config(
        ShapesConfig,
        FILE,
        ["data.scenes=12", "training.steps=2", "training.batch_size=4", "evaluation.prompts=1",
         "training.compile=false", "training.save_every=1", "vqgan_training.continuous_steps=1",
         "judge.steps=2", "judge.reconstructed=4", "judge.validation=4", "judge.batch_size=4",
         *(f"training.{key}={value}" for key, value in training.items())],
    )  # fmt: skip
    phases = [replace(config.vqgan_training.phases[0], steps=2, batch_size=1)]
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return replace(
        config,
        model=config.model | sizes,
        vqgan=config.vqgan | {"ch_mult": [1, 1, 1], "n_embed": 8},
        vqgan_training=replace(config.vqgan_training, phases=phases),
    )


def test_the_recipe_ends_in_a_model_that_loads(tmp_path: Path) -> None:
    folder = run_recipe(_tiny(), tmp_path)
    assert folder == tmp_path / "export"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (last,) = [row for row in rows if "seen" in row]
    assert {"eval_loss", "eval_loss/shapes", "unseen"} <= last.keys() and last["eval_loss"] > 0
    model, vqgan = DalleBart.from_pretrained(folder), VQGAN.from_pretrained(folder / "vqgan")
    processor = DalleBartProcessor.from_pretrained(folder)
    tokens = model.generate(**processor("a red circle"), generator=torch.Generator().manual_seed(0))
    assert vqgan.decode(tokens[:, 1:].clamp(max=7)).shape == (1, 3, 64, 64)
    assert len(processor.tokenizer) == model.config.encoder_vocab_size
    assert 0 <= load_scorer(folder).score([Image.new("RGB", (64, 64))], ["a red circle"])[0] <= 1
    assert model.config.image_vocab_size == vqgan.config.n_embed
    assert "captioned shapes" not in (folder / "config.json").read_text() and (folder / "README.md").is_file()

    # Done again it does nothing again, and with more steps it goes on.
    kept = [*(tmp_path / "vqgan").iterdir(), *(tmp_path / "tokens").glob("*.tar")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert run_recipe(_tiny(steps=3), tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert not DalleBart.from_pretrained(folder).lm_head.weight.equal(model.lm_head.weight)


def test_the_shards_hold_the_scenes_that_the_seed_names(tmp_path: Path) -> None:
    config = _tiny()
    run_recipe(config, tmp_path)
    data = config.data
    scenes = sample_scenes(
        data.scenes, data.seed, single=data.single, leave_out=data.leave_out, open_shapes=data.open_shapes
    )
    vqgan = VQGAN.from_pretrained(tmp_path / "vqgan").eval()
    pixels = vqgan.bytes_to_pixels(torch.from_numpy(render(scenes, data.seed)))
    expected = {scene.caption: codes for scene, codes in zip(scenes, vqgan.encode(pixels), strict=True)}
    with tarfile.open(tmp_path / "tokens" / "shapes-00000.tar") as archive:
        names = [member.name for member in archive if member.name.endswith(".txt")]
        assert len(names) == data.scenes
        for name in names:
            caption = archive.extractfile(name).read().decode()
            codes = np.load(io.BytesIO(archive.extractfile(name.replace(".txt", ".npy")).read()))
            assert torch.equal(torch.from_numpy(codes.astype(np.int64)), expected[caption])


def test_a_recipe_that_is_stopped_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_torch.training.shapes.train_run", lambda *_: "stopped")
    assert run_recipe(_tiny(), tmp_path) is None
    monkeypatch.setattr("dalle_torch.training.shapes.train_run", lambda *_: "interrupted")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(_tiny(), tmp_path)
    assert not (tmp_path / "export").exists()


def test_every_word_of_the_grammar_is_one_token(tokenizer: DalleBartTokenizer) -> None:
    for scene in sample_scenes(300, 2) + sample_scenes(100, 2, unseen=True):
        words = scene.caption.split()
        assert len(tokenizer(scene.caption).input_ids) == len(words) + 2, scene.caption


def test_special_tokens_have_the_ids_of_bart(tokenizer: DalleBartTokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer("").input_ids == [0, 2]


@pytest.mark.parametrize("text", ["un café 🦊", "\x00\x07", "ΑΒΓ 汉字", "a" * 500, "<s> </s>"])
def test_any_text_has_tokens(tokenizer: DalleBartTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == 0 and ids[-1] == 2 and max(ids) < len(tokenizer) and 3 not in ids


def test_spellings_meet(tokenizer: DalleBartTokenizer) -> None:
    usual = tokenizer("a red circle in the centre on a gray background").input_ids
    assert tokenizer("A red circle, in the CENTER on a grey background!").input_ids == usual


def test_the_tokenizer_survives_saving(tokenizer: DalleBartTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = DalleBartTokenizer.from_pretrained(tmp_path)
    for text in ("A Small red circle, in the center", "", "fox 🦊"):
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert (loaded.bos_token, loaded.pad_token, loaded.eos_token, loaded.unk_token) == ("<s>", "<pad>", "</s>", "<unk>")
