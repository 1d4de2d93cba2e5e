"""8 bits lose half a level at most, and zeros stay zeros."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.optim.shampoo.quantization import LEVELS, dequantize, quantize


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000))
def test_the_error_is_half_a_level_of_each_column(count: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stack = torch.randn(count, rows, columns, generator=generator) * 10.0 ** torch.arange(-3, columns - 3)
    values, scales = quantize(stack)
    assert values.dtype == torch.int8 and scales.shape == (count, 1, columns)
    assert int(values.abs().max()) == LEVELS
    # A hair more than a half, for the rounding of the division.
    assert bool(((dequantize(values, scales) - stack).abs() <= 0.5001 * scales).all())


def test_columns_of_zeros_stay_zero() -> None:
    stack = torch.tensor([[[0.0, 1.0], [0.0, -2.0]]])
    values, scales = quantize(stack)
    assert torch.equal(dequantize(values, scales)[:, :, 0], torch.zeros(1, 2))
    assert scales[0, 0, 0] == 0


def test_what_has_been_rounded_stays_as_it_is() -> None:
    once = dequantize(*quantize(torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))))
    torch.testing.assert_close(dequantize(*quantize(once)), once, rtol=1e-6, atol=0)
