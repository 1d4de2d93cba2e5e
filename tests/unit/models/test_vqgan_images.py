"""PIL images into and out of the VQGAN's range."""

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_torch.models.vqgan import VQGAN
from tests.unit.models.test_vqgan import small_vqgan


@pytest.fixture(scope="module", params=[(-1, 1), (0, 1)])
def model(request: pytest.FixtureRequest) -> VQGAN:
    return small_vqgan(pixel_range=request.param)


def colour(model: VQGAN, image: Image.Image) -> list[int]:
    """Of the middle of an image, as it comes back."""
    (back,) = model.pixels_to_images(model.images_to_pixels(image))
    assert back.mode == "RGB" and back.size == (32, 32)
    return list(back.getpixel((16, 16)))


def test_an_image_of_the_right_size_comes_back_exactly(model: VQGAN) -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = model.images_to_pixels([Image.fromarray(values)])
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == torch.float32
    black, white = model.config.pixel_range
    assert pixels.min() >= black and pixels.max() <= white
    assert np.array_equal(np.asarray(model.pixels_to_images(pixels)[0]), values)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (40, 50), (10, 200, 30)), [10, 200, 30]),
        (Image.new("L", (32, 32), 77), [77] * 3),
        (Image.new("1", (32, 32), 1), [255] * 3),
        (Image.new("I;16", (32, 32), 257 * 90), [90] * 3),
        (Image.new("I", (32, 32), 257 * 90), [90] * 3),
        (Image.new("I", (32, 32), 90), [90] * 3),
        (Image.new("F", (32, 32), 90.0), [90] * 3),
        (Image.new("CMYK", (32, 32), (255, 0, 0, 0)), [0, 255, 255]),
        (Image.new("RGBA", (32, 32), (10, 20, 30, 0)), [255] * 3),
        (Image.new("RGBA", (32, 32), (0, 0, 0, 128)), [127] * 3),
        (Image.new("LA", (32, 32), (0, 0)), [255] * 3),
        (Image.new("RGBA", (32, 32), (1, 2, 3, 255)), [1, 2, 3]),
        (Image.new("RGB", (1, 1), (9, 8, 7)), [9, 8, 7]),
        (Image.new("RGB", (3, 20000), (9, 8, 7)), [9, 8, 7]),
        (Image.new("YCbCr", (32, 32), (128, 128, 128)), [128] * 3),
    ],
)  # fmt: skip
def test_any_mode_and_size(model: VQGAN, image: Image.Image, expected: list[int]) -> None:
    assert colour(model, image) == expected


def test_a_palette_with_transparency_lies_over_white(model: VQGAN) -> None:
    image = Image.new("P", (32, 32), 3)
    image.putpalette([0, 0, 0] * 256)
    image.info["transparency"] = 3
    assert colour(model, image) == [255, 255, 255]


def test_exif_rotation_is_applied(model: VQGAN) -> None:
    image = Image.new("RGB", (32, 32), "blue")
    image.paste((255, 0, 0), (0, 0, 32, 16))
    image.getexif()[0x0112] = 6  # the camera was turned: top is at the right
    (back,) = model.pixels_to_images(model.images_to_pixels([image]))
    assert back.getpixel((28, 16)) == (255, 0, 0) and back.getpixel((4, 16)) == (0, 0, 255)


@pytest.mark.parametrize("size", [(96, 32), (32, 96)])
def test_the_centre_is_kept(model: VQGAN, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    image.paste((0, 255, 0), (left, top, left + 32, top + 32))
    pixels = np.asarray(model.pixels_to_images(model.images_to_pixels(image))[0])
    assert (pixels == [0, 255, 0]).all()


def test_shrinking_does_not_alias(model: VQGAN) -> None:
    stripes = np.zeros((512, 512), dtype=np.uint8)
    stripes[:, ::2] = 255
    shrunk = np.asarray(model.pixels_to_images(model.images_to_pixels(Image.fromarray(stripes)))[0])
    # The mean of black and white; Lanczos rings by a step or two near the border.
    assert abs(shrunk.astype(int) - 127).max() <= 6


def test_values_outside_the_range_are_clipped(model: VQGAN) -> None:
    black, white = model.config.pixel_range
    pixels = torch.tensor([black - 5.0, black, (black + white) / 2, white + 5.0]).view(1, 1, 2, 2).expand(2, 3, 2, 2)
    images = model.pixels_to_images(pixels)
    assert len(images) == 2
    assert np.asarray(images[0])[..., 0].tolist() == [[0, 0], [128, 255]]


def test_half_precision_and_gradients_are_no_obstacle(model: VQGAN) -> None:
    pixels = torch.full((3, 4, 4), model.config.pixel_range[1], dtype=torch.bfloat16, requires_grad=True)
    assert model.pixels_to_images(pixels)[0].getpixel((0, 0)) == (255, 255, 255)


def test_bad_input(model: VQGAN) -> None:
    with pytest.raises(ValueError, match="no image"):
        model.images_to_pixels([])
    with pytest.raises(ValueError, match="'La'"):
        model.images_to_pixels(Image.new("La", (32, 32)))
    with pytest.raises(ValueError, match=r"\[1, 1, 4, 4\]"):
        model.pixels_to_images(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="NaN"):
        model.pixels_to_images(torch.full((1, 3, 4, 4), float("nan")))
