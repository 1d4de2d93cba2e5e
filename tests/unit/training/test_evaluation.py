"""The evaluation's loss is the mean over samples, whatever batches they come in; histograms count every entry."""

from pathlib import Path

import pytest
import torch

from dalle_torch.config import DataConfig, MeshConfig, RuntimeConfig
from dalle_torch.data.datasets import TokenData
from dalle_torch.data.text import TextEncoder
from dalle_torch.parallel.engine import start_engine
from dalle_torch.training.evaluation import evaluation_losses
from dalle_torch.training.observation import BINS, Observer, norms
from tests.shard_files import CODEBOOK, CODES, token_tar
from tests.tiny_pipeline import tiny_model, tiny_processor

SAMPLES = 11


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    token_tar(folder / "0.tar", range(SAMPLES))
    return folder


def loaders(shards: Path, batch_size: int, lanes: int):
    config = DataConfig(evaluation={"a": [str(shards)], "b": [str(shards)]}, lanes=lanes, workers=0)
    data = TokenData(
        config=config, text=TextEncoder(tiny_processor()), image_length=CODES, codebook_size=CODEBOOK,
        batch_size=batch_size,
    )  # fmt: skip
    return data.evaluation_loaders()


@pytest.mark.parametrize(("batch_size", "lanes"), [(1, 1), (4, 2), (16, 1), (8, 8)])
def test_the_mean_does_not_depend_on_batches(shards: Path, batch_size: int, lanes: int) -> None:
    torch.manual_seed(0)
    model = tiny_model(dropout=0.3).train()
    engine = start_engine(RuntimeConfig(device="cpu"), MeshConfig())
    found = evaluation_losses(engine, model, loaders(shards, batch_size, lanes))
    assert model.training, "the mode is as before"
    # Each sample alone, without dropout.
    model.eval()
    with torch.no_grad():
        alone = [float(model(**batch.inputs).loss) for batch in loaders(shards, 1, 1)["a"]]
    assert len(alone) == SAMPLES
    expected = sum(alone) / SAMPLES
    assert found == {
        "eval_loss/a": pytest.approx(expected, rel=1e-5),
        "eval_loss/b": pytest.approx(expected, rel=1e-5),
        "eval_loss": pytest.approx(expected, rel=1e-5),
    }


def test_a_part_of_a_set_can_be_measured(shards: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model().eval()
    engine = start_engine(RuntimeConfig(device="cpu"), MeshConfig())
    found = evaluation_losses(engine, model, loaders(shards, 2, 1), batches=2)
    with torch.no_grad():
        alone = [float(model(**batch.inputs).loss) for batch in loaders(shards, 1, 1)["a"]][:4]
    assert found["eval_loss/a"] == pytest.approx(sum(alone) / 4, rel=1e-5)
    assert evaluation_losses(engine, model, {}) == {}


def test_histograms_are_torchs_own() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 40)
    model.bias.requires_grad_(False)
    model.weight.grad = torch.randn(40, 30)
    observer = Observer()
    observer(model)
    found = observer.take()
    assert set(found) == {"gradients/weight", "parameters/weight"} and observer.take() == {}
    gradient, histogram = model.weight.grad, found["gradients/weight"]
    low, high = gradient.min().item(), gradient.max().item()
    expected = torch.histc(gradient, BINS, low, high)
    # Entries on an edge can fall to either side.
    assert (torch.tensor(histogram.counts) - expected).abs().sum() <= 4
    assert sum(histogram.counts) == gradient.numel() and len(histogram.edges) == BINS + 1
    assert (histogram.edges[0], histogram.edges[-1]) == pytest.approx((low, high))
    assert histogram.norm == pytest.approx(gradient.norm().item())
    assert norms(found)["norm/gradients"] == histogram.norm


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan"), float("inf")])
def test_a_tensor_of_one_value_has_a_histogram(value: float) -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.full((2, 2), value)
    observer = Observer()
    observer(model)
    assert sum(observer.take()["gradients/weight"].counts) == 4
