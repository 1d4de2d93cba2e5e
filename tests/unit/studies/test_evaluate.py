"""The study behind `evaluate`, with judges that can be computed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_torch.config import DataConfig, MeshConfig, RuntimeConfig
from dalle_torch.data.captioned import CaptionedData
from dalle_torch.data.datasets import TokenData
from dalle_torch.data.encode import EncodeOptions, encode
from dalle_torch.data.manifest import ShardFolder
from dalle_torch.data.sources import find_parts
from dalle_torch.data.text import TextEncoder
from dalle_torch.evaluation.base import Judge
from dalle_torch.evaluation.protocol import read_result
from dalle_torch.parallel.engine import start_engine
from dalle_torch.studies.drawings import Setting
from dalle_torch.studies.evaluate import EvaluationOptions, evaluate
from dalle_torch.studies.reference import measure_reference
from dalle_torch.training.evaluation import evaluation_losses
from tests.tiny_pipeline import tiny_pipeline

SAMPLES = 37


class Colours:
    """The mean of each channel."""

    dimensions = 3
    judge = Judge(name="colours", source="colours", sha256=None, standard=True)
    broken = False

    def features(self, images):
        rows = torch.tensor(np.stack([np.asarray(image).mean(axis=(0, 1)) for image in images]), dtype=torch.float32)
        return rows * float("nan") if self.broken else rows


class Redness:
    """How red a picture is, whatever the prompt; to be told apart from others, how long the prompt is counts too."""

    judge = Judge(name="redness", source="redness", sha256=None, standard=True)
    value = 1.0

    def score(self, images, prompts):
        return [self.value * float(np.asarray(image)[..., 0].mean()) / 255 for image in images]

    def similarities(self, images, prompts):
        return torch.tensor(self.score(images, prompts))[:, None] + torch.tensor([len(p) for p in prompts]) / 100


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    lines = []
    for number in range(SAMPLES):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": "a picture " + "of it " * (number % 5)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def data_of(folder: Path) -> CaptionedData:
    return CaptionedData([str(folder)], resolution=16, image_length=16, codebook_size=20)


def run(folder: Path, output: Path, *, extractor=None, scorer=None, **options):
    return evaluate(
        tiny_pipeline(), data_of(folder), extractor or Colours(), scorer or Redness(), Setting(condition_scale=2.0),
        EvaluationOptions(**{"limit": None, "num_images": 2} | options), output,
    )  # fmt: skip


def test_figures_are_those_of_the_pictures_that_are_kept(photos, tmp_path):
    result = run(photos, tmp_path)
    assert {k: v for k, v in read_result(tmp_path / "evaluation.json").items() if k != "protocol"} == result
    kept = [path for path in (tmp_path / "drawings").glob("*/*.safetensors")]
    from safetensors.torch import load_file

    pictures = np.concatenate([load_file(path)["pictures"].numpy() for path in sorted(kept)])
    assert len(pictures) == 2 * SAMPLES == result["pictures"]["count"]
    assert result["scores"]["text_image_score"] == pytest.approx(pictures[..., 0].mean() / 255)
    means = pictures.astype(np.float64).mean(axis=(1, 2))
    apart = np.linalg.norm(means[0::2] - means[1::2], axis=1).mean()
    assert result["scores"]["diversity"] == pytest.approx(apart)
    originals = np.stack([np.asarray(Image.open(photos / f"{n}.png")) for n in range(SAMPLES)])
    assert result["scores"]["text_image_score_of_data"] == pytest.approx(originals[..., 0].mean() / 255)
    first, second = means, originals.astype(np.float64).mean(axis=(1, 2))
    offset = ((first.mean(0) - second.mean(0)) ** 2).sum()
    a, b = np.cov(first.T), np.cov(second.T)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    # Features are float32.
    assert result["scores"]["fid"] == pytest.approx(offset + np.trace(a + b) - 2 * root, rel=1e-4)
    assert result["notices"] == []


def test_twice_and_in_other_batches_the_result_is_the_same_but_for_the_run(photos, tmp_path):
    first, second = run(photos, tmp_path / "a"), run(photos, tmp_path / "b", batch_size=9)
    assert {**first, "run": None} == {**second, "run": None}


def test_the_loss_is_that_of_training(photos, tmp_path):
    """Codes of shards through the loader and the engine of training, and pictures through ours: the same mean."""
    pipe = tiny_pipeline()
    text = TextEncoder(pipe.processor)
    encode(find_parts([str(photos)], None, "image", 100), ShardFolder(str(tmp_path)), pipe.vqgan, text, EncodeOptions())
    config = DataConfig(train=[str(tmp_path)], evaluation={"photos": [str(tmp_path)]}, lanes=1, workers=0)
    loaders = TokenData(config=config, text=text, image_length=16, codebook_size=20, batch_size=8).evaluation_loaders()
    expected = evaluation_losses(start_engine(RuntimeConfig(device="cpu"), MeshConfig()), pipe.model, loaders)[
        "eval_loss"
    ]
    for folder in (photos, tmp_path):
        found = measure_reference(pipe, data_of(folder), Colours(), Redness(), None)
        # float32 sums over other batches.
        assert found.loss == pytest.approx(expected, rel=1e-6)


def test_broken_judges_are_named_and_pictures_kept(photos, tmp_path):
    blind = Colours()
    blind.broken = True
    with pytest.raises(ValueError, match="have features that are not finite"):
        run(photos, tmp_path / "a", extractor=blind)
    mute = Redness()
    mute.value = float("nan")
    with pytest.raises(ValueError, match=r"redness \(redness\) gave scores that are no numbers.*pictures are kept"):
        run(photos, tmp_path / "b", scorer=mute)
    assert list((tmp_path / "b").glob("drawings/*/*.safetensors"))


def test_one_usable_picture_is_too_few_and_that_is_said_before_anything_is_drawn(photos, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "0.png").write_bytes((photos / "0.png").read_bytes())
    (folder / "1.png").write_bytes(b"no picture")
    lines = [json.dumps({"file_name": f"{number}.png", "text": "a"}) for number in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="one has one usable sample: distances of pictures need at least 2"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "drawings").exists()


def test_other_data_of_the_same_names_are_other_data(photos, tmp_path):
    first = measure_reference(tiny_pipeline(), data_of(photos), Colours(), Redness(), None, with_model=False)
    again = measure_reference(tiny_pipeline(), data_of(photos), Colours(), Redness(), None)
    fewer = measure_reference(tiny_pipeline(), data_of(photos), Colours(), Redness(), 5)
    assert first.sha256 == again.sha256 != fewer.sha256 and len(fewer.captions) == 5
