"""The VQGAN against numbers of the original systems: DALL·E Mini's Flax port and taming-transformers, VQ and Gumbel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_torch.models.vqgan import VQGAN
from tests.helpers import GOLDENS

NAMES = ("flax", "taming-vq", "taming-gumbel")

# float32 through some 20 layers in another order of summation; measured: 7e-6.
TOLERANCE = 1e-4


def numbers(name: str) -> dict[str, Tensor]:
    held = {key: torch.from_numpy(value) for key, value in np.load(GOLDENS / "vqgan" / name / "io.npz").items()}
    if name == "flax":
        held = {key: value.permute(0, 3, 1, 2) if value.ndim == 4 else value.long() for key, value in held.items()}
    return held


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[str, VQGAN, dict[str, Tensor]]:
    folder = GOLDENS / "vqgan" / request.param
    return request.param, VQGAN.from_pretrained(folder, trust_pickle=True), numbers(request.param)


def check(model: VQGAN, expected: dict[str, Tensor]) -> None:
    assert torch.equal(model.encode(expected["pixel_values"]), expected["indices"])
    torch.testing.assert_close(model.decode(expected["codes"]), expected["decoded"], rtol=0, atol=TOLERANCE)


def test_codes_and_pixels(case: tuple[str, VQGAN, dict[str, Tensor]]) -> None:
    _, model, expected = case
    assert not model.training
    check(model, expected)


def test_forward(case: tuple[str, VQGAN, dict[str, Tensor]]) -> None:
    _, model, expected = case
    for grad in (True, False):  # taming's modules, then the walk over them
        with torch.set_grad_enabled(grad):
            out = model(expected["pixel_values"])
        assert torch.equal(out.codes, expected["indices"])
        torch.testing.assert_close(out.reconstruction, expected["reconstruction"], rtol=0, atol=TOLERANCE)


def test_pixel_range_and_quantizer(case: tuple[str, VQGAN, dict[str, Tensor]]) -> None:
    name, model, _ = case
    assert model.config.pixel_range == ((0, 1) if name == "flax" else (-1, 1))
    assert model.config.quantizer == ("gumbel" if name == "taming-gumbel" else "vq")


def test_round_trip(case: tuple[str, VQGAN, dict[str, Tensor]], tmp_path: Path) -> None:
    _, model, expected = case
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = VQGAN.from_pretrained(tmp_path)
    assert again.config.pixel_range == model.config.pixel_range
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    check(again, expected)


def test_codes_run_along_rows(case: tuple[str, VQGAN, dict[str, Tensor]]) -> None:
    """The top half of a picture is the first half of its codes: another bottom changes no code far above it."""
    _, model, expected = case
    codes = expected["codes"][:1]
    side = model.config.latent_size
    changed = codes.clone()
    changed[:, -side:] = (changed[:, -side:] + 1) % model.config.n_embed
    difference = (model.decode(codes) - model.decode(changed)).abs().amax(dim=(0, 1, 3))
    half = len(difference) // 2
    # Norms and attention carry a little of it everywhere.
    assert difference[-2 * model.downsampling :].max() > 5 * difference[:half].max()
