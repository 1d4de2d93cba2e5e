"""Throughput, utilisation, time left."""

import math

import pytest
import torch

from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.training import speed
from dalle_torch.training.speed import Stopwatch, flops_of_sample, peak_flops


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Time that passes when it is told to."""
    now = [100.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(speed.time, "process_time", lambda: now[0] / 2)

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def test_figures_of_the_updates_since_the_last_look(clock) -> None:
    watch = Stopwatch(samples=8, tokens=10, flops=5.0, peak_flops=1000.0)
    watch.restart(4)
    with watch.waiting_for_data():
        clock(0.5)
    clock(1.5)
    with watch.paused():
        clock(60)
    found = watch.look(step=8, steps=20)
    assert found == {
        "seconds_per_step": 0.5,
        "cpu_seconds_per_step": 0.25,
        "samples_per_second": 16.0,
        "tokens_per_second": 160.0,
        "input_wait": 0.25,
        "eta_seconds": 6.0,
        "model_flops_utilisation": 0.08,
    }
    clock(1.0)
    assert watch.look(step=9, steps=20)["seconds_per_step"] == 1.0


def test_without_updates_there_is_nothing_to_tell(clock) -> None:
    watch = Stopwatch(samples=8, tokens=10, flops=5.0, peak_flops=None)
    clock(1.0)
    assert watch.look(0, 10) == {}


def test_operations_of_a_sample_are_those_of_its_matrices() -> None:
    config = DalleBartConfig.from_pretrained("configs/model/shapes.json")
    width, text, image = config.d_model, config.max_text_length, config.image_length
    attention, feed_forward = 4 * width**2, 3 * width * config.encoder_ffn_dim
    # Products with weights, and of queries, keys and values with each other.
    encoder = config.encoder_layers * (text * (attention + feed_forward) + 2 * text * text * width)
    decoder = config.decoder_layers * (
        image * (attention + feed_forward)
        + image * 2 * width**2
        + text * 2 * width**2
        + 2 * image * image * width
        + 2 * image * text * width
    )
    head = image * width * config.decoder_vocab_size
    assert flops_of_sample(config) == pytest.approx(3 * 2 * (encoder + decoder + head), rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "tflops", "kind", "expected"),
    [
        ("bfloat16", None, "v3-256", 256 * 61.5e12),
        ("bfloat16", None, "v5litepod-16", 256 * 197e12),
        ("bfloat16", None, "", None),
        ("float32", None, "v3-256", None),
        ("float32", 10.0, "", 2560e12),
    ],
)
def test_the_peak_is_known_or_not_reported(
    precision: str, tflops: float | None, kind: str, expected: float | None
) -> None:
    found = peak_flops(torch.device("cpu"), 256, precision, tflops, kind)
    assert found == expected or math.isclose(found or 0, expected or 0)
