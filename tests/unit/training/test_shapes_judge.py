"""The classifier of shapes learns, and is the same each time."""

import torch

from dalle_torch.config import ShapesJudgeConfig
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.storage.embedded import EMBEDDED
from dalle_torch.training.shapes_judge import train_judge


def test_a_few_steps_teach_it_something_and_repeat():
    vqgan = VQGAN.from_pretrained(EMBEDDED["shapes"] / "vqgan").eval()
    config = ShapesJudgeConfig(steps=25, batch_size=32, reconstructed=8, validation=32)
    state = torch.get_rng_state()
    (first, accuracies), (second, _) = (train_judge(vqgan, config) for _ in range(2))
    assert (torch.get_rng_state() == state).all()
    assert all((a == b).all() for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    # Chance is a third and a seventh.
    assert accuracies["background"] > 0.8 and accuracies["color_0"] > 0.3
