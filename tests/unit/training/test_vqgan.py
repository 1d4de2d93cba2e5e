"""Training of a codebook: it learns to reconstruct, dead codes come back, crops hold something to see."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_torch.config import CropPhase, OptimizerConfig, ShampooConfig, VQGANTrainingConfig
from dalle_torch.models.configuration import VQGANConfig
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.shapes.drawing import render
from dalle_torch.shapes.sampling import sample_scenes
from dalle_torch.training.vqgan import crop_at_edges, initialise, kmeans, reconstruction_errors, train_vqgan


def _model() -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, norm_groups=1, attn_resolutions=(),
                              resolution=16, z_channels=8, embed_dim=4, n_embed=16))  # fmt: skip
    initialise(model)
    return model


def _flat(start: int, count: int) -> np.ndarray:
    """Pictures of two halves in one of four gray tones each."""
    tones = np.random.default_rng(start).integers(0, 4, (count, 2)) * 80
    pictures = np.repeat(tones[:, :, None], 8, axis=2).reshape(count, 1, 16, 1)
    return np.broadcast_to(pictures, (count, 16, 16, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(lr=3e-3, warmup_steps=5),
        OptimizerConfig(name="adafactor", lr=1e-2, warmup_steps=5),
        OptimizerConfig(
            name="shampoo",
            lr=3e-3,
            warmup_steps=5,
            shampoo=ShampooConfig(block_size=32, start_preconditioning_step=10),
        ),
    ],
    ids=lambda config: config.name,
)
def test_it_learns_and_saves(tmp_path: Path, optimizer: OptimizerConfig) -> None:
    config = VQGANTrainingConfig(
        optimizer=optimizer,
        phases=[CropPhase(steps=70, batch_size=8, crop=16)],
        continuous_steps=20,
        restart_every=10,
        log_every=1,
    )
    train_vqgan(_model(), _flat, config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([row["absolute"] for row in rows[-5:]]) < 0.6 * rows[0]["absolute"]
    assert all(row["codebook"] == 0 for row in rows[:20]) and all(row["codebook"] > 0 for row in rows[20:])
    model = VQGAN.from_pretrained(tmp_path / "vqgan")
    pixels = torch.from_numpy(_flat(999, 8)).permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = model.encode(pixels)
    assert len(codes.unique()) > 3
    assert (model.decode(codes) - pixels).abs().mean() < 0.5


def test_an_interruption_leaves_a_model(tmp_path: Path) -> None:
    def source(start: int, count: int) -> np.ndarray:
        if start >= 8:
            raise KeyboardInterrupt
        return _flat(start, count)

    config = VQGANTrainingConfig(phases=[CropPhase(steps=9, batch_size=4, crop=16)])
    with pytest.raises(KeyboardInterrupt):
        train_vqgan(_model(), source, config, tmp_path)
    VQGAN.from_pretrained(tmp_path / "vqgan")


def test_a_schedule_that_needs_evaluations_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer.schedule=plateau needs evaluations"):
        VQGANTrainingConfig(optimizer=OptimizerConfig(schedule="plateau"))


def test_residual_branches_start_at_zero() -> None:
    model = _model()
    block = model.decoder.mid.block_1
    features = torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(block(features, None), features, rtol=0, atol=0)
    rich = model.decoder.conv_in(torch.randn(64, 8, 8, 8))
    assert 0.8 < rich.detach()[..., 2:-2, 2:-2].std().item() < 1.2


def test_kmeans_finds_the_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(6, 3, generator=generator) * 20
    vectors = centers.repeat_interleave(50, 0) + 0.1 * torch.randn(300, 3, generator=generator)
    found = kmeans(vectors, 6, generator)
    assert torch.cdist(centers, found).amin(1).max() < 0.2


def test_kmeans_of_fewer_different_vectors_than_centres_is_finite() -> None:
    assert kmeans(torch.ones(10, 2), 4, torch.Generator().manual_seed(0)).isfinite().all()


def test_crops_hold_an_edge() -> None:
    pictures = render(sample_scenes(60, 3), 3)
    cut = crop_at_edges(pictures, CropPhase(steps=1, batch_size=60, crop=16), np.random.default_rng(0))
    assert cut.shape == (60, 16, 16, 3)
    assert all(len(np.unique(crop.reshape(-1, 3), axis=0)) > 1 for crop in cut)


def test_crops_as_large_as_the_picture_are_the_picture() -> None:
    pictures = render(sample_scenes(2, 3), 3)
    phase = CropPhase(steps=1, batch_size=2, crop=64)
    np.testing.assert_array_equal(crop_at_edges(pictures, phase, np.random.default_rng(0)), pictures)


def test_crops_of_a_blank_picture_are_taken_too() -> None:
    blank = np.zeros((3, 64, 64, 3), np.uint8)
    assert crop_at_edges(blank, CropPhase(steps=1, batch_size=3, crop=8), np.random.default_rng(0)).shape[1] == 8


def test_the_minority_weighs_more() -> None:
    pixels = torch.zeros(1, 3, 8, 8)
    pixels[..., :2, :2] = 1
    on_it, beside_it = pixels.clone(), pixels.clone()
    on_it[..., 0, 0] = 0
    beside_it[..., 7, 7] = 1
    for weight in (1.0, 4.0):
        absolute = reconstruction_errors(on_it, pixels, weight)[0] / reconstruction_errors(beside_it, pixels, weight)[0]
        torch.testing.assert_close(absolute, torch.tensor(weight))
    assert all(float(error) == 0 for error in reconstruction_errors(pixels, pixels, 4.0))
