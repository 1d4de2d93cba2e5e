"""Windows cover a canvas, share what they should, and undrawn places look undrawn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.pipeline.canvas import UNDRAWN, Canvas, fill_undrawn, grey_out


@given(window=st.integers(2, 6), rows=st.integers(1, 3), columns=st.integers(1, 3), data=st.data())
def test_windows_cover_the_canvas_and_know_their_neighbours(window, rows, columns, data):
    overlap = data.draw(st.integers(1, window - 1))
    canvas = Canvas(window, (rows, columns), overlap)
    codes = torch.full((2, *canvas.shape), UNDRAWN)
    for number, (y, x) in enumerate(canvas.corners):
        known = (canvas.cut(codes, (y, x)) != UNDRAWN).unflatten(1, (window, window))
        if (rows, columns) != (1, 1):
            # All of the rows shared with the window above, all of the columns shared with the one on the left.
            assert known[:, :overlap].all() == (y > 0)
            assert known[:, :, :overlap].all() == (x > 0)
        drawn = torch.full((2, window * window), number)
        canvas.put(codes, (y, x), drawn)
    assert (codes != UNDRAWN).all()
    assert codes[0, -1, -1] == rows * columns - 1
    assert canvas.size == codes[0].numel()


def test_a_window_is_put_in_row_by_row():
    canvas = Canvas(2, (1, 2), 1)
    codes = torch.full((1, *canvas.shape), UNDRAWN)
    canvas.put(codes, (0, 1), torch.tensor([[5, 6, 7]]))
    assert codes.tolist() == [[[-1, 5, 6], [-1, 7, -1]]]
    cut = canvas.cut(codes, (0, 1))
    cut[:] = 0
    assert codes[0, 0, 1] == 5, "a window that was cut out is a copy"


@pytest.mark.parametrize(
    ("tile", "overlap", "word"),
    [((0, 1), 2, "tile=(0, 1)"), ((1, 2), 0, "tile_overlap=0"), ((2, 2), 4, "tile_overlap=4"), ((1, 2, 3), 1, "tile=")],
)
def test_layouts_that_cannot_be_are_refused(tile, overlap, word):
    with pytest.raises(ValueError) as caught:
        Canvas(4, tile, overlap)
    assert word in str(caught.value)


def test_undrawn_codes_continue_what_is_above_them():
    codes = torch.tensor([[[-1, 3, -1], [4, -1, -1]]])
    assert fill_undrawn(codes).tolist() == [[[0, 3, 3], [4, 3, 3]]]
    assert codes[0, 0, 0] == UNDRAWN
    assert (fill_undrawn(torch.full((2, 3, 3), UNDRAWN)) == 0).all()


def test_undrawn_patches_are_grey_and_the_others_untouched():
    codes = torch.tensor([[[1, UNDRAWN], [UNDRAWN, 2]]])
    pixels = torch.rand(1, 3, 4, 4)
    grey = grey_out(pixels, codes, 0.5)
    assert torch.equal(grey[..., :2, :2], pixels[..., :2, :2])
    assert torch.equal(grey[..., 2:, 2:], pixels[..., 2:, 2:])
    assert (grey[..., :2, 2:] == 0.5).all()
    assert (grey[..., 2:, :2] == 0.5).all()
