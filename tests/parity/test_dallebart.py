"""DalleBart against numbers of the original Flax model, on every architecture variant that was compared."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_torch.models.convert.flax_dallebart import flax_entries
from dalle_torch.models.dalle_bart import DalleBart
from tests.helpers import GOLDENS

VARIANTS = sorted(folder.name for folder in (GOLDENS / "dallebart").iterdir())

TOLERANCE = 1e-4
"""Float32 on both sides, at most three layers: what is seen is below 4e-6."""
ILL_CONDITIONED = {"swinv2": 3e-3}
"""Logits of scores up to 1 / tau = 20 through seven layers whose residuals are normed last. float32 itself ends here:
the original's own numbers are 1.4e-3 from the same model in float64 (see the test of it below), its operations in
another order give logits 3e-4 to 1.7e-3 away, and weights changed by a part in 2^24 up to 1.1e-3. The encoder
amplifies so; `test_the_decoder_alone` begins after it and needs no such bound."""
GRADIENT_TOLERANCE = {"swinv2": 3e-3}
"""Relative to the largest entry, for the same reason; elsewhere absolute and 1e-4."""


@cache
def golden(variant: str) -> dict[str, Tensor]:
    with np.load(GOLDENS / "dallebart" / variant / "io.npz") as arrays:
        return {
            key: torch.from_numpy(array).long() if np.issubdtype(array.dtype, np.integer) else torch.from_numpy(array)
            for key, array in arrays.items()
        }


@cache
def loaded(variant: str) -> DalleBart:
    return DalleBart.from_pretrained(GOLDENS / "dallebart" / variant)


def forward(model: torch.nn.Module, numbers: dict[str, Tensor], **more: Tensor) -> object:
    inputs = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
    return model(**{key: numbers[key] for key in inputs}, **more)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_states_and_loss(variant: str) -> None:
    numbers = golden(variant)
    with torch.no_grad():
        out = forward(loaded(variant), numbers)
    assert distance(out.encoder_last_hidden_state, numbers["encoder_last_hidden_state"]) < TOLERANCE
    assert distance(out.logits, numbers["logits"]) < ILL_CONDITIONED.get(variant, TOLERANCE)
    assert distance(out.loss, numbers["loss"]) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_decoder_alone(variant: str) -> None:
    """From the original's own encoder states, so that no bound has to make up for what the encoder amplifies."""
    numbers = golden(variant)
    with torch.no_grad():
        out = forward(loaded(variant), numbers, encoder_outputs=numbers["encoder_last_hidden_state"])
    # Of swinv2 the original's logits are 9e-5 from float64 and ours 3e-5: 1e-4 holds here, and would not everywhere.
    assert distance(out.logits, numbers["logits"]) < (2e-4 if variant in ILL_CONDITIONED else TOLERANCE)
    assert distance(out.loss, numbers["loss"]) < TOLERANCE


def test_ill_conditioned_variant_is_as_exact_as_the_original() -> None:
    numbers = golden("swinv2")
    with torch.no_grad():
        ours = forward(loaded("swinv2"), numbers).logits
        exact = forward(DalleBart.from_pretrained(GOLDENS / "dallebart" / "swinv2").double(), numbers).logits
    theirs = numbers["logits"]
    assert distance(ours, exact) < 1.5 * distance(theirs, exact)
    # Typical entries, unlike the worst one, do hold the common bound.
    assert (ours - theirs).abs().median() < TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant: str, checkpointing: bool) -> None:
    model = DalleBart.from_pretrained(GOLDENS / "dallebart" / variant)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    forward(model, golden(variant)).loss.backward()
    check_gradients(variant, model)


def check_gradients(variant: str, model: DalleBart, times: float = 1) -> None:
    """`times` widens the bound of an ill-conditioned variant, for sums in an order of their own (3.4e-3 is seen)."""
    for name, ours, theirs in gradient_pairs(variant, model):
        bound = TOLERANCE
        if variant in GRADIENT_TOLERANCE:
            bound = times * GRADIENT_TOLERANCE[variant] * max(theirs.abs().max().item(), 1)
        assert distance(ours, theirs) < bound, name


def gradient_pairs(variant: str, model: DalleBart) -> Iterator[tuple[str, Tensor, Tensor]]:
    numbers, entries = golden(variant), flax_entries(model.config)
    parameters = dict(model.named_parameters())
    assert entries.keys() == parameters.keys()
    for name, entry in entries.items():
        yield name, parameters[name].grad, entry.to_ours(numbers[f"grad:{entry.path}"])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_steps_give_the_logits_of_the_whole(variant: str, compiled: bool) -> None:
    model, numbers = loaded(variant), golden(variant)
    tokens = numbers["decoder_input_ids"]
    with torch.no_grad():
        whole = forward(model, numbers).logits
        mask = model.text_mask(numbers["input_ids"], numbers["attention_mask"])
        cache_ = model.decoder.make_cache(model.encoder(numbers["input_ids"], mask), mask, pictures=1)
        steps = [
            model.decoder(tokens[:, i : i + 1], cache=cache_, position=torch.tensor([i]) if compiled else i)
            for i in range(tokens.shape[1])
        ]
        cached = model.lm_head(torch.cat(steps, dim=1))
    # Twice the bound of the variant: both sides carry its rounding.
    assert distance(cached, whole) < 2 * ILL_CONDITIONED.get(variant, TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_drawn_tokens(variant: str) -> None:
    model, numbers = loaded(variant), golden(variant)
    prompt = {key: numbers[key] for key in ("input_ids", "attention_mask")}
    empty = {key: numbers[key] for key in ("input_ids_uncond", "attention_mask_uncond")}
    greedy = model.generate(**prompt, do_sample=False, condition_scale=1)
    assert torch.equal(greedy, numbers["greedy_tokens"])
    guided = model.generate(**prompt, **empty, do_sample=False, condition_scale=10.0)
    assert torch.equal(guided, numbers["top1_scale10_tokens"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled(variant: str) -> None:
    """Generated code from one graph without a break, forward and backward."""
    torch.compiler.reset()
    numbers = golden(variant)
    model = DalleBart.from_pretrained(GOLDENS / "dallebart" / variant)
    out = forward(torch.compile(model, fullgraph=True, dynamic=False), numbers)
    out.loss.backward()
    assert distance(out.encoder_last_hidden_state, numbers["encoder_last_hidden_state"]) < TOLERANCE
    assert distance(out.logits, numbers["logits"]) < ILL_CONDITIONED.get(variant, TOLERANCE)
    assert distance(out.loss, numbers["loss"]) < TOLERANCE
    check_gradients(variant, model, times=2)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Numbers of 8 and 11 bits: errors of 2^-9 and 2^-12 an operation, some tens of operations. Seen: 0.039 and 0.0046.
    [(torch.bfloat16, 0.08), (torch.float16, 0.01)],
    ids=["bf16", "fp16"],
)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ILL_CONDITIONED])
def test_half_precision_stays_close(variant: str, dtype: torch.dtype, bound: float) -> None:
    numbers = golden(variant)
    model = DalleBart.from_pretrained(GOLDENS / "dallebart" / variant, dtype=dtype)
    with torch.no_grad():
        logits = forward(model, numbers).logits
    assert logits.dtype == dtype
    assert distance(logits.float(), numbers["logits"]) < bound * numbers["logits"].abs().max().item()
