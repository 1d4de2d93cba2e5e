"""The reference numbers on a torch_xla device, here a virtual one of the CPU."""

import numpy as np
import pytest
import torch

from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.parallel.runtime import pick_device, sync
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


@pytest.mark.xla
def test_drawing_on_xla_gives_the_reference_tokens_and_compiles_one_step() -> None:
    from torch_xla.debug import metrics

    folder = GOLDENS / "dallebart" / "normformer-glu"
    device = pick_device("xla")
    model = DalleBart.from_pretrained(folder).to(device).eval()
    names = ("input_ids", "attention_mask", "input_ids_uncond", "attention_mask_uncond")
    with np.load(folder / "io.npz") as io:
        inputs = {name: torch.from_numpy(io[name]).long().to(device) for name in names}
        expected = torch.from_numpy(io["top1_scale10_tokens"]).long()
    compiled = []

    def after_step() -> None:
        sync()
        compiled.append(metrics.counter_value("UncachedCompile"))

    tokens = model.generate(**inputs, do_sample=False, condition_scale=10.0, after_step=after_step)
    assert torch.equal(tokens.cpu(), expected)
    assert len(compiled) == model.config.image_length
    # The first step carries the encoder along, the second is the step alone; none after it is new.
    assert len(set(compiled[1:])) == 1
