"""`VQGAN`: configuration, shapes, training, loading, slices, bad input. The numbers are in tests/parity."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle_torch.models.configuration import VQGANConfig
from dalle_torch.models.vqgan import COMMITMENT_WEIGHT, VQGAN


def small_config(**overrides: object) -> VQGANConfig:
    return VQGANConfig(
        **{
            "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 32, "z_channels": 32, "embed_dim": 16,
            "n_embed": 40, "attn_resolutions": (16,), **overrides,
        }
    )  # fmt: skip


def small_vqgan(**overrides: object) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(small_config(**overrides)).eval()


@pytest.fixture(scope="module")
def model() -> VQGAN:
    return small_vqgan()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"quantizer": "ema"}, "quantizer='ema' is not one of vq, gumbel"),
        ({"ch": 48}, "ch=48"),
        ({"ch_mult": ()}, "ch_mult"),
        ({"resolution": 33}, "resolution=33 is not divisible by 2"),
        ({"n_embed": 0, "embed_dim": 0}, "n_embed=0.*embed_dim=0"),
        ({"double_z": True}, "double_z"),
        ({"pixel_range": (1, -1)}, "pixel_range"),
    ],
)
def test_configuration_names_what_is_wrong(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**overrides)


def test_configuration_sizes() -> None:
    assert (VQGANConfig().latent_size, VQGANConfig().image_length) == (16, 256)
    assert (small_config().latent_size, small_config().image_length) == (16, 256)


def test_building_is_silent_and_leaves_the_rest_of_taming_alone(capsys: pytest.CaptureFixture[str]) -> None:
    small_vqgan()
    assert capsys.readouterr().out == ""
    strangers = [name for name in sys.modules if name.startswith("taming.") and not name.startswith("taming.modules")]
    assert strangers == []


def test_initialisation_is_that_of_torch(model: VQGAN) -> None:
    weight = model.decoder.mid.block_1.conv1.weight
    bound = (weight[0].numel()) ** -0.5  # kaiming_uniform_ with a = sqrt(5)
    assert 0.95 * bound < weight.abs().max() <= bound
    assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.05
    assert 0.9 / 40 < model.codebook.abs().max() <= 1 / 40
    assert torch.equal(model.decoder.norm_out.weight, torch.ones(32))
    gumbel = small_vqgan(quantizer="gumbel", embed_dim=32)
    assert 0.9 < gumbel.codebook.std() < 1.1


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = small_vqgan(), small_vqgan()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
def test_forward_trains_every_weight(quantizer: str) -> None:
    model = small_vqgan(quantizer=quantizer, embed_dim=24).train()
    pixels = torch.rand(2, 3, 32, 32)
    out = model(pixels)
    assert out.reconstruction.shape == pixels.shape
    assert out.codes.shape == (2, 256) and out.codes.dtype == torch.int64
    assert out.codebook_loss.shape == ()
    ((out.reconstruction - pixels).abs().mean() + out.codebook_loss).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []
    # A bias that a softmax over keys cancels out is the only kind of weight that may stand still.
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert all(name.endswith(".k.bias") for name in still)


def test_gradient_passes_straight_through_the_codebook(model: VQGAN) -> None:
    latents = torch.randn(1, 16, 4, 4, requires_grad=True)
    quantized, _, _ = model.quantize(latents)
    factors = torch.randn_like(quantized)
    (quantized * factors).sum().backward()
    torch.testing.assert_close(latents.grad, factors)


def test_codebook_loss_weighs_the_commitment(model: VQGAN) -> None:
    """Equation 3 of arXiv 1711.00937: the codebook follows with weight 1, the encoder commits with beta."""
    latents = torch.randn(2, 16, 4, 4, requires_grad=True)
    _, loss, _ = model.quantize(latents)
    loss.backward()
    codes = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 16), model.codebook).argmin(dim=1)
    nearest = model._look_up(codes.view(2, 4, 4))
    distance = (nearest - latents).detach()
    torch.testing.assert_close(loss.detach(), (1 + COMMITMENT_WEIGHT) * distance.square().mean())
    torch.testing.assert_close(latents.grad, -2 * COMMITMENT_WEIGHT * distance / distance.numel())


def test_gumbel_samples_in_training_alone() -> None:
    model = small_vqgan(quantizer="gumbel", embed_dim=32)
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(pixels).codes, model(pixels).codes)
        assert torch.equal(model(pixels).codes, model.encode(pixels))
        loss = model(pixels).codebook_loss
        model.train()
        assert not torch.equal(model(pixels).codes, model(pixels).codes)
        torch.testing.assert_close(model(pixels).codebook_loss, loss)


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (2, 2), (36, 20)])
def test_other_sizes(model: VQGAN, size: tuple[int, int]) -> None:
    pixels = torch.rand(2, 3, *size)
    codes = model.encode(pixels)
    rows, columns = size[0] // 2, size[1] // 2
    assert codes.shape == (2, rows * columns)
    assert model.decode(codes, grid=(rows, columns)).shape == pixels.shape


def test_codes_are_the_nearest_entries(model: VQGAN) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        latents = model.quant_conv(model.encoder(pixels))
    distance = torch.cdist(latents.permute(0, 2, 3, 1).flatten(0, 2).double(), model.codebook.double())
    assert torch.equal(model.encode(pixels)[0], distance.argmin(dim=1))


@pytest.mark.parametrize("slice_size", [None, 1, 2, 3, 100])
def test_slices_change_nothing(model: VQGAN, slice_size: int | None) -> None:
    pixels = torch.rand(5, 3, 8, 8)
    codes = model.encode(pixels, slice_size=slice_size)
    whole = torch.cat([model.encode(picture[None]) for picture in pixels])
    assert torch.equal(codes, whole)
    alone = torch.cat([model.decode(row[None], grid=(4, 4)) for row in codes])
    # The same numbers but for the order of summation, which may follow the batch.
    torch.testing.assert_close(model.decode(codes, slice_size=slice_size, grid=(4, 4)), alone, rtol=0, atol=1e-5)


def test_slices_fit_memory_and_are_even(model: VQGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    need = model._picture_bytes(32, 32)
    monkeypatch.setattr("dalle_torch.models.vqgan.HOST_SLICE_BYTES", 4 * need)
    assert model._slice_size(4, (32, 32), None) == 4
    assert model._slice_size(5, (32, 32), None) == 3
    assert model._slice_size(9, (32, 32), None) == 3
    monkeypatch.setattr("dalle_torch.models.vqgan.HOST_SLICE_BYTES", 1)
    assert model._slice_size(9, (32, 32), None) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = small_vqgan()
    codes = torch.randint(40, (1, 64))
    expected = model.decode(codes, grid=(8, 8))
    model.to(dtype)
    found = model.decode(codes, grid=(8, 8))
    assert found.dtype == dtype
    # Some 20 layers with 8 (bfloat16) or 11 bits of mantissa; values are of order 1. Measured: 1.5e-2 and 2e-3.
    bound = 8e-2 if dtype == torch.bfloat16 else 1e-2
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=bound)
    assert model.encode(torch.rand(1, 3, 16, 16)).shape == (1, 64)


@pytest.mark.parametrize("value", [-1, 40, 16384])
def test_codes_outside_the_codebook(model: VQGAN, value: int) -> None:
    codes = torch.zeros(1, 256, dtype=torch.long)
    codes[0, 17] = value
    with pytest.raises(ValueError, match=rf"holds {value}; the codebook has n_embed=40"):
        model.decode(codes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 255, dtype=torch.long), r"\[1, 255\]; expected \[B, 256\]"),
        (torch.zeros(256, dtype=torch.long), r"\[256\]"),
        (torch.zeros(0, 256, dtype=torch.long), r"\[0, 256\]"),
        (torch.zeros(1, 256), "float32"),
    ],
)
def test_codes_of_the_wrong_kind(model: VQGAN, codes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.decode(codes)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 31, 32), (0, 3, 32, 32)])
def test_pixels_of_the_wrong_shape(model: VQGAN, shape: tuple[int, ...]) -> None:
    for run in (model.encode, model):
        with pytest.raises(ValueError, match="pixel_values"):
            run(torch.zeros(shape))


def test_slice_size_below_one(model: VQGAN) -> None:
    with pytest.raises(ValueError, match="slice_size=0"):
        model.encode(torch.zeros(1, 3, 32, 32), slice_size=0)


def test_inference_records_no_gradient(model: VQGAN) -> None:
    pixels = torch.rand(1, 3, 8, 8, requires_grad=True)
    assert not model.decode(model.encode(pixels), grid=(4, 4)).requires_grad
    assert model.decode_latents(torch.randn(1, 16, 4, 4)).requires_grad


def test_copies_are_independent(model: VQGAN) -> None:
    codes = torch.randint(40, (1, 256))
    expected = model.decode(codes)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone.decode(codes), expected)
        nn.init.zeros_(clone.decoder.conv_out.weight)
        assert not torch.equal(clone.decode(codes), expected)
        assert torch.equal(model.decode(codes), expected)


def test_loading_keeps_weights_dtype_and_range(tmp_path: Path) -> None:
    model = small_vqgan(pixel_range=(0, 1), quantizer="gumbel", embed_dim=32)
    model.save_pretrained(tmp_path)
    again = VQGAN.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and again.config.pixel_range == (0, 1)
    assert all(torch.equal(value.bfloat16(), again.state_dict()[name]) for name, value in model.state_dict().items())
