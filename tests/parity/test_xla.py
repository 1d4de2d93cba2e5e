"""The reference numbers on a torch_xla device, here a virtual one of the CPU."""

import numpy as np
import pytest
import torch

from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.parallel.runtime import pick_device
from tests.helpers import GOLDENS


@pytest.mark.xla
@pytest.mark.parametrize("variant", ["normformer-glu"])
def test_logits_and_loss_on_xla(variant: str) -> None:
    folder = GOLDENS / "dallebart" / variant
    device = pick_device("xla")
    model = DalleBart.from_pretrained(folder).to(device).eval()
    with np.load(folder / "io.npz") as io:
        names = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
        inputs = {name: torch.from_numpy(io[name]).long().to(device) for name in names}
        logits, loss = io["logits"], io["loss"]
    assert inputs["input_ids"].device.type == "xla"
    with torch.no_grad():
        out = model(**inputs)
    # The bound that the same numbers meet on the CPU: float32 sums in another order.
    np.testing.assert_allclose(out.logits.cpu(), logits, atol=1e-4)
    np.testing.assert_allclose(out.loss.cpu(), loss, atol=1e-4)
