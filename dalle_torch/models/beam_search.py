"""Beam search over image tokens, for prompts without super conditioning.

All sequences have `image_length` tokens and none ends early, so no length penalty is needed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dalle_torch.models.drawing_inputs import encode_prompts
from dalle_torch.models.generation import NonFiniteLogitsError
from dalle_torch.models.sampling import forbid

_NEEDED: Mapping[str, Any] = {
    "do_sample": False, "condition_scale": 1, "images_per_prompt": 1, "temperature": 1, "compile": False,
}  # fmt: skip
"""What goes with beams; of any other option None."""


def refuse_with_beams(num_beams: int, choices: int, **options: object) -> None:
    """Refuse options of `generate` that beam search does not follow.

    Args:
        choices: image tokens there are to choose from.

    Raises:
        ValueError: `num_beams` is out of range, or an option is set that would be ignored; every offender is named.
    """
    problems = []
    if num_beams < 1:
        problems.append(f"num_beams={num_beams} must be at least 1 (1: no beam search)")
    if choices < 1:
        problems.append(f"max_token={choices} leaves no image token to choose")
    wrong = [name for name, value in options.items() if value != _NEEDED.get(name)]
    if wrong and num_beams > 1:
        given = ", ".join(f"{name}={_NEEDED.get(name)}" for name in wrong)
        problems.append(f"num_beams={num_beams} draws without {', '.join(wrong)}: it needs {given}")
    if problems:
        raise ValueError("; ".join(problems))


def beam_search(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, beams: int, max_token: int | None
) -> Tensor:
    """The most likely of `beams` sequences kept at every step, for each of P prompts.

    Args:
        model: a `DalleBart`.
        input_ids, attention_mask: [P, T].
        beams: sequences kept.
        max_token: ids from it up are never chosen.

    Returns:
        int64 [P, image_length + 1]; the first column is the start token.

    Raises:
        NonFiniteLogitsError: the model's logits are NaN or infinite.
    """
    config = model.config
    prompts = encode_prompts(model, input_ids, attention_mask, None, None, condition_scale=1)
    cache = model.decoder.make_cache(prompts.states, prompts.mask, beams)
    count, device = prompts.count, input_ids.device
    tokens = torch.full((count * beams, 1), config.decoder_start_token_id, device=device)
    # All beams start equal: only the first counts, or the same sequence would be kept several times.
    scores = torch.full((count, beams), -torch.inf, device=device)
    scores[:, 0] = 0
    row_starts = torch.arange(count, device=device)[:, None] * beams
    for position in range(config.image_length):
        states = model.decoder(tokens[:, -1:], cache=cache, position=position)[:, -1]
        logits = forbid(model.lm_head(states).float(), max_token, config.eos_token_id)
        likelihoods = scores[..., None] + logits.log_softmax(dim=-1).unflatten(0, (count, beams))
        scores, best = likelihoods.flatten(1).topk(beams, dim=-1)
        if not scores[:, 0].isfinite().all():
            raise NonFiniteLogitsError("the model's logits are not finite: its weights hold NaN or infinity")
        rows = (row_starts + best // logits.shape[-1]).flatten()
        tokens = torch.cat([tokens[rows], (best % logits.shape[-1]).flatten()[:, None]], dim=1)
        for layer in cache.self_attention:
            filled = slice(0, position + 1)
            layer.keys[:, :, filled] = layer.keys[rows][:, :, filled]
            layer.values[:, :, filled] = layer.values[rows][:, :, filled]
    return tokens.unflatten(0, (count, beams))[:, 0]
