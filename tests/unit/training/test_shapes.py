"""The recipe of the embedded model, run whole at the smallest size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle_torch.config import ShapesConfig
from dalle_torch.config_io import load_config
from dalle_torch.data.synthetic import sample_scenes
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.text.processor import DalleBartProcessor
from dalle_torch.text.tokenizer import DalleBartTokenizer
from dalle_torch.training.shapes import build_tokenizer, make_dataset, run, training_scenes

FILE = Path(__file__).parents[3] / "configs" / "train" / "shapes.yaml"


@pytest.fixture(scope="module")
def tokenizer() -> DalleBartTokenizer:
    return build_tokenizer([scene.caption for scene in sample_scenes(3000, 1)])


def _tiny() -> ShapesConfig:
    config = load_config(
        ShapesConfig,
        FILE,
        ["data.scenes=12", "training.steps=2", "training.batch_size=4", "evaluation.prompts=1",
         "training.compile=false", "vqgan_training.continuous_steps=1"],
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
    folder = run(_tiny(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "model" / "metrics.jsonl").read_text().splitlines()]
    assert {"eval_loss", "seen", "unseen"} <= rows[-1].keys() and rows[-1]["eval_loss"] > 0
    model, vqgan = DalleBart.from_pretrained(folder), VQGAN.from_pretrained(folder / "vqgan")
    processor = DalleBartProcessor.from_pretrained(folder)
    tokens = model.generate(**processor("a red circle"), generator=torch.Generator().manual_seed(0))
    assert vqgan.decode(tokens[:, 1:].clamp(max=7)).shape == (1, 3, 64, 64)
    assert len(processor.tokenizer) == model.config.encoder_vocab_size
    assert model.config.image_vocab_size == vqgan.config.n_embed
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "vqgan").iterdir()}
    run(_tiny(), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "vqgan").iterdir()} == before


def test_an_interrupted_recipe_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(state, *args, **kwargs):
        state.step = 1
        return state

    monkeypatch.setattr("dalle_torch.training.shapes.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(_tiny(), tmp_path)
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


def test_batches_are_a_function_of_their_index(tokenizer: DalleBartTokenizer) -> None:
    data = replace(_tiny().data, scenes=200, blank=0.25)
    codes = torch.arange(200)[:, None].expand(-1, 64).numpy()
    dataset = make_dataset(DalleBartProcessor(tokenizer, None, 32), codes, data, batch_size=20)
    first, again = dataset(3), dataset(3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert dataset.batches_in_pass == 10
    passed = torch.cat([dataset(i)["labels"][:, 0] for i in range(10)])
    assert passed.sort().values.tolist() == list(range(200))
    assert not torch.equal(dataset(10)["labels"], dataset(0)["labels"])


def test_captions_stay_with_their_codes_unless_blank(tokenizer: DalleBartTokenizer) -> None:
    data = replace(_tiny().data, scenes=200, blank=0.25)
    codes = torch.arange(200)[:, None].expand(-1, 64).numpy()
    dataset = make_dataset(DalleBartProcessor(tokenizer, None, 32), codes, data, batch_size=20)
    scenes, blanks = training_scenes(data), 0
    for i in range(10):
        batch = dataset(i)
        for ids, mask, codes_ in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            text = tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).strip()
            blanks += text == ""
            assert text in ("", scenes[int(codes_[0])].caption)
    # 200 draws at 0.25: four standard deviations are 24.
    assert 26 <= blanks <= 74
