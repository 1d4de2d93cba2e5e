"""Eight-bit weights of the embedded model choose what float32 weights choose."""

import copy

import torch

from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.packing import pack_for_drawing
from dalle_torch.models.sampling import super_condition
from dalle_torch.pipeline import DallePipeline
from dalle_torch.shapes.sampling import sample_prompts

SCALE = 1.5


@torch.no_grad()
def best_tokens(model: DalleBart, inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The likeliest token at every place of a drawn picture, given what was drawn before it: [B, image_length]."""
    conditional, unconditional = (
        model(inputs[f"input_ids{kind}"], inputs[f"attention_mask{kind}"], labels=tokens).logits
        for kind in ("", "_uncond")
    )
    return super_condition(conditional, unconditional, SCALE).argmax(-1)


def test_the_best_token_is_the_same_in_98_percent_of_steps() -> None:
    pipe = DallePipeline.from_pretrained("shapes")
    inputs = pipe.processor(sample_prompts(24, seed=5))
    generators = [torch.Generator().manual_seed(i) for i in range(24)]
    tokens = pipe.model.generate(**inputs, condition_scale=SCALE, temperature=0.5, generator=generators)[:, 1:]
    exact = best_tokens(pipe.model, inputs, tokens)
    rounded = best_tokens(pack_for_drawing(copy.deepcopy(pipe.model), "int8"), inputs, tokens)
    assert (exact == rounded).float().mean() >= 0.98
