"""Pictures drawn on a torch_xla device, here a virtual one of the CPU."""

import pytest
import torch

from tests.tiny_pipeline import tiny_pipeline


@pytest.mark.xla
def test_a_picture_is_the_same_on_xla() -> None:
    options = {"num_images": 2, "condition_scale": 3.0, "temperature": 2.0, "progress": False}
    expected = tiny_pipeline()("a cat", **options)
    drawn = tiny_pipeline().to("xla")("a cat", **options)
    assert drawn.settings["device"] == "xla"
    # Seeds are drawn from on the host, so only rounding could tip a token; with these numbers it tips none.
    assert torch.equal(drawn.tokens, expected.tokens)
    prefix = expected.tokens[0, :6]
    continued = tiny_pipeline().to("xla")("a cat", prefix=prefix, **options)
    assert torch.equal(continued.tokens[:, :6], prefix.expand(2, -1))
