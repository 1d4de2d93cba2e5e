"""Pictures of every kind to squares of RGB bytes; what must not be decoded is not."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from dalle_torch.data.images import DAMAGED, TOO_LARGE, BadImage, decode_square
from tests.shard_files import bomb, encoded, picture


def middle(data: bytes) -> list[int]:
    square, _ = decode_square(data, 16)
    assert square.shape == (16, 16, 3) and square.dtype == np.uint8
    return square[8, 8].tolist()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_each_format_is_read_with_its_size(format):
    square, size = decode_square(picture(3, (40, 24), format), 16)
    assert square.shape == (16, 16, 3)
    assert size == (40, 24)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.new("L", (20, 20), 77), "PNG"), [77] * 3),
        (encoded(Image.new("1", (20, 20), 1), "PNG"), [255] * 3),
        (encoded(Image.new("I;16", (20, 20), 257 * 90), "PNG"), [90] * 3),
        (encoded(Image.new("RGBA", (20, 20), (9, 9, 9, 0)), "PNG"), [255] * 3),
        (encoded(Image.new("LA", (20, 20), (40, 255)), "PNG"), [40] * 3),
        (encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 128)), "WEBP", lossless=True), [127] * 3),
        (encoded(Image.new("CMYK", (20, 20), (255, 0, 0, 0)), "JPEG", quality=100), [0, 255, 255]),
        (encoded(Image.new("L", (20, 20), 200), "JPEG"), [200] * 3),
        (encoded(Image.new("RGB", (1, 1), (7, 8, 9)), "PNG"), [7, 8, 9]),
        (encoded(Image.new("RGB", (2, 3000), (7, 8, 9)), "PNG"), [7, 8, 9]),
    ],
    ids=["grey", "1 bit", "16 bits", "clear", "grey alpha", "half clear", "CMYK", "grey JPEG", "1 pixel", "tower"],
)
def test_colours_come_out_right(data, expected):
    assert np.abs(np.array(middle(data)) - expected).max() <= 1  # JPEG rounds


def test_a_palette_with_a_clear_colour_lies_over_white():
    image = Image.new("P", (20, 20), 3)
    image.putpalette([0, 0, 0] * 256)
    assert middle(encoded(image, "PNG", transparency=3)) == [255] * 3


def test_the_centre_is_cut_out_without_aliasing():
    # Columns that alternate between black and white, the left and right thirds red.
    pixels = np.zeros((60, 180, 3), np.uint8)
    pixels[:, ::2] = 255
    pixels[:, :60] = pixels[:, 120:] = (255, 0, 0)
    square, size = decode_square(encoded(Image.fromarray(pixels), "PNG"), 12)
    assert size == (180, 60)
    inner = square[:, 1:-1].astype(int)
    assert np.abs(inner - 127).max() <= 12, "grey: neither black, white nor red is left"


def test_exif_rotation_is_applied_and_swaps_the_size():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    square, size = decode_square(encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=100, subsampling=0), 16)
    assert size == (20, 40)
    assert square[1, 8, 0] > 200 and square[14, 8, 0] < 50, "the left half has become the upper one"


def test_broken_exif_does_not_cost_the_picture():
    data = picture(0, (32, 32), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_square(data, 16)[1] == (32, 32)


def test_the_first_picture_of_an_animation_is_taken():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert middle(data) == [250, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_picture_that_is_cut_off_is_damaged(format):
    data = picture(0, (64, 64), format)
    for length in (len(data) // 2, 20, 1):
        with pytest.raises(BadImage) as caught:
            decode_square(data[:length], 16)
        assert caught.value.reason == DAMAGED


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(Image.new("RGB", (4, 4)), "BMP"), b"%!PS-Adobe-3.0 EPSF"])
def test_other_formats_are_not_looked_at(data):
    with pytest.raises(BadImage, match="no JPEG, PNG or WebP") as caught:
        decode_square(data, 16)
    assert caught.value.reason == DAMAGED


def test_a_decompression_bomb_is_refused_by_its_header():
    data = bomb()
    assert len(data) < 200_000
    tracemalloc.start()
    with pytest.raises(BadImage, match="20000 x 20000 pixels|decompression bomb") as caught:
        decode_square(data, 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.reason == TOO_LARGE
    assert peak < 5_000_000


@pytest.mark.parametrize("options", [{"lossless": True}, {"lossless": False}, {"lossless": True, "exif": b"Exif\0\0"}])
def test_a_webp_picture_is_refused_before_pillow_takes_memory_for_it(options, monkeypatch):
    data = encoded(Image.new("RGB", (300, 200)), "WEBP", **options)
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("it was opened"))
    with pytest.raises(BadImage, match="300 x 200 pixels are more than 59,999"):
        decode_square(data, 16, max_pixels=59_999)


def test_the_bound_is_inclusive():
    data = encoded(Image.new("RGB", (30, 20)), "PNG")
    assert decode_square(data, 16, max_pixels=600)[1] == (30, 20)
    with pytest.raises(BadImage, match="30 x 20"):
        decode_square(data, 16, max_pixels=599)


def test_large_jpegs_are_decoded_smaller_and_look_the_same():
    gradient = np.linspace(0, 255, 1024).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(gradient[:, None], (1024, 1024)))
    quick, size = decode_square(encoded(image.convert("RGB"), "JPEG", quality=95), 32)
    full, _ = decode_square(encoded(image.convert("RGB"), "PNG"), 32)
    assert size == (1024, 1024)
    assert np.abs(quick.astype(int) - full.astype(int)).max() <= 2
    with Image.open(io.BytesIO(encoded(image, "JPEG"))) as opened:
        opened.draft(None, (64, 64))
        assert opened.size == (128, 128), "what makes it quick"
