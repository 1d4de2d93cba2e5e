"""The walk over taming's networks against the networks themselves, and when it must step aside."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dalle_torch.models import vqgan_fast
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.models.winograd import (
    TILE,
    Kernel,
    Winograd,
    Workspace,
    transform_kernel,
    transform_upsampling_kernel,
    transforms,
)
from tests.unit.models.test_vqgan import small_vqgan

# Other orders of summation in float32, values of order 1, some 20 layers; measured: at most 2e-5.
TOLERANCE = 2e-4


def convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """[H, W, C] to [h, w, 4, 4, O]."""
    strip = F.pad(x, (0, 0, 1, 1, 1, 1))
    return Winograd(Workspace()).convolve(strip, Kernel(kernel, rows=8)).permute(2, 3, 0, 1, 4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_winograd_is_the_convolution(down: int, across: int, channels: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TILE * down, TILE * across, channels, generator=generator)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator)
    expected = F.conv2d(x.permute(2, 0, 1)[None].double(), weight.double(), padding=1)[0].permute(1, 2, 0)
    tiles = expected.view(down, TILE, across, TILE, outputs).permute(0, 2, 1, 3, 4)
    # Sums of at most 45 products of order 1.
    torch.testing.assert_close(convolved(x, transform_kernel(weight)).double(), tiles, rtol=0, atol=1e-4)
    doubled = F.interpolate(x.permute(2, 0, 1)[None].double(), scale_factor=2.0, mode="nearest")
    expected = F.conv2d(doubled, weight.double(), padding=1)[0].permute(1, 2, 0)
    squares = expected.view(down, TILE, 2, across, TILE, 2, outputs).permute(0, 3, 1, 4, 2, 5, 6).flatten(4)
    found = convolved(x, transform_upsampling_kernel(weight)).double()
    torch.testing.assert_close(found, squares, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 128])
def test_a_kernel_multiplies_alike_with_and_without_onednn(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    strips, weight = torch.randn(36, rows, 20, generator=generator), torch.randn(36, 20, 12, generator=generator)
    blocked = torch.empty(36, rows, 12)
    Kernel(weight, rows=128).products(strips, out=blocked)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = torch.empty(36, rows, 12)
    Kernel(weight, rows=128).products(strips, out=plain)
    # Sums of 20 products of order 1, in another order.
    torch.testing.assert_close(blocked, plain, rtol=0, atol=2e-5)


def test_transforms_are_exact_in_float64() -> None:
    inputs, kernels, outputs = transforms()
    signal, taps = torch.randn(6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = outputs @ ((kernels @ taps) * (inputs @ signal))
    torch.testing.assert_close(found, F.conv1d(signal[None, None], taps[None, None])[0, 0], rtol=0, atol=1e-12)


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "shortcuts": {"ch_mult": (2, 1), "num_res_blocks": 2},
    "no attention": {"attn_resolutions": ()},
    "attention at each level": {"attn_resolutions": (16, 32)},
    "resampling without convolution": {"resamp_with_conv": False},
    "pre-end": {"give_pre_end": True},
    "one level": {"ch_mult": (1,)},
}


def run_both(model: VQGAN, rows: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """(found, expected) of the decoder, then of the encoder."""
    latents = torch.randn(2, model.config.z_channels, rows, columns)
    pixels = torch.rand(2, 3, rows * model.downsampling, columns * model.downsampling)
    with torch.no_grad():
        pairs = [(model.decoder, latents), (model.encoder, pixels)]
        assert all(model._fast.can_run(network, maps) for network, maps in pairs)
        return [(model._fast(network, maps), network(maps)) for network, maps in pairs]


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("grid", [(8, 8), (16, 12), (5, 7)], ids=str)
def test_walk_gives_what_the_network_gives(overrides: dict[str, object], grid: tuple[int, int]) -> None:
    for found, expected in run_both(small_vqgan(**overrides), *grid):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("tiles", "threads"), [(1, 1), (3, 1), (10, 1), (2, 3)])
def test_strips_meet(tiles: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vqgan()
    monkeypatch.setattr(vqgan_fast, "STRIP_TILES", tiles)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for grid in ((16, 16), (18, 8), (5, 7)):
        for found, expected in run_both(model, *grid):
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_winograd_is_what_runs() -> None:
    model = small_vqgan()
    model.decode(torch.zeros(1, 256, dtype=torch.long))
    used = set(model._fast.prepared)
    assert model.decoder.up[0].block[0].conv1 in used
    assert model.decoder.up[1].upsample.conv in used


@torch.no_grad()
def _in_place(model: VQGAN) -> None:
    model.decoder.up[0].block[0].conv2.weight.mul_(2)


def _through_data(model: VQGAN) -> None:
    model.decoder.up[1].upsample.conv.weight.data.mul_(2)


def _replaced(model: VQGAN) -> None:
    conv = model.decoder.up[0].block[1].conv2
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def _loaded(model: VQGAN) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def _assigned(model: VQGAN) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)


def _rounded(model: VQGAN) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def _trained(model: VQGAN) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.rand(1, 3, 32, 32)).reconstruction.square().mean().backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("change", [_in_place, _through_data, _replaced, _loaded, _assigned, _rounded, _trained])
def test_changed_weights_are_noticed(change: Callable[[VQGAN], None]) -> None:
    model = small_vqgan()
    codes = torch.randint(40, (1, 256))
    before = model.decode(codes)
    change(model)
    with torch.no_grad():
        expected = model.decoder(model.post_quant_conv(model._look_up(codes.view(1, 16, 16))))
    assert not torch.allclose(before, expected, atol=TOLERANCE)
    torch.testing.assert_close(model.decode(codes), expected, rtol=0, atol=TOLERANCE)


def test_kernels_are_kept_between_calls_and_given_back_for_training() -> None:
    model = small_vqgan()
    codes = torch.zeros(1, 256, dtype=torch.long)
    model.decode(codes)
    kernels = {conv: held.kernel for conv, held in model._fast.prepared.items()}
    model.decode(codes)
    assert all(model._fast.prepared[conv].kernel is kernel for conv, kernel in kernels.items())
    model.train()
    assert not model._fast.prepared


def test_inference_mode() -> None:
    model = small_vqgan()
    codes = torch.randint(40, (1, 256))
    expected = model.decode(codes)
    with torch.inference_mode():
        made_inside = small_vqgan()
        for candidate in (model, made_inside):
            torch.testing.assert_close(candidate.decode(codes), expected)


def test_steps_aside() -> None:
    model = small_vqgan()
    maps = torch.randn(1, 32, 4, 4)
    can_run = model._fast.can_run
    assert not can_run(model.decoder, maps)  # gradients are on
    with torch.no_grad():
        assert can_run(model.decoder, maps)
        assert not can_run(model.decoder, maps.bfloat16())
        assert not can_run(model.decoder, maps.to("meta"))
        with torch.autocast("cpu"):
            assert not can_run(model.decoder, maps)
        model.decoder.train()
        assert not can_run(model.decoder, maps)
        model.decoder.eval()
        nn.utils.parametrizations.weight_norm(model.decoder.conv_in)
        assert not can_run(model.decoder, maps)


def test_hooks_are_called() -> None:
    model = small_vqgan()
    seen = []
    model.decoder.mid.block_1.register_forward_hook(lambda *_: seen.append(1))
    model.decode(torch.zeros(2, 256, dtype=torch.long), slice_size=1)
    assert len(seen) == 2


def test_a_compiler_sees_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vqgan()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        assert not model._fast.can_run(model.decoder, torch.randn(1, 32, 4, 4))
