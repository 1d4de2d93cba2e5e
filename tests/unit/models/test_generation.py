"""Drawing tokens: the same picture alone and in a batch, continuation, streams, beams, one compiled step."""

import itertools

import pytest
import torch

from dalle_torch.models.beam_search import beam_search
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.generation import NonFiniteLogitsError
from tests.unit.models.conftest import small_model


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def one(prompts: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    return {key: value[row : row + 1] for key, value in prompts.items()}


def test_a_seed_gives_the_same_picture_alone_and_in_any_batch(model: DalleBart, prompts: dict) -> None:
    together = model.generate(**prompts, images_per_prompt=3, generator=seeds(*range(9)), condition_scale=3.0)
    assert together.shape == (9, 10)
    for prompt, picture in itertools.product(range(3), range(3)):
        index = 3 * prompt + picture
        alone = model.generate(**one(prompts, prompt), generator=seeds(index), condition_scale=3.0)
        assert torch.equal(alone[0], together[index])
    assert len({tuple(row.tolist()) for row in together}) == 9


def test_one_generator_repeats_and_moves_on(model: DalleBart, prompts: dict) -> None:
    generator = torch.Generator().manual_seed(5)
    first = model.generate(**prompts, generator=generator)
    second = model.generate(**prompts, generator=generator)
    again = model.generate(**prompts, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="2 generators were given for 3 pictures"):
        model.generate(**prompts, generator=seeds(1, 2))


def test_static_steps_draw_what_eager_steps_draw(prompts: dict) -> None:
    """The step that accelerators and the compiler run has fixed shapes; its pictures must not differ."""
    for options in ({}, {"use_swin_position_embeddings": True}, {"sinkhorn_iters": 3}, {"use_head_scale": True}):
        model = small_model(**options)
        eager = model.generate(**prompts, generator=seeds(1, 2, 3), temperature=0.7, top_k=8, top_p=0.9)
        torch.compiler.reset()
        static = model.generate(
            **prompts, generator=seeds(1, 2, 3), temperature=0.7, top_k=8, top_p=0.9, compile="eager"
        )
        assert torch.equal(eager, static)


def test_the_compiled_step_is_compiled_once(prompts: dict) -> None:
    model = small_model()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = model.generate(**prompts, generator=seeds(1, 2, 3), compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(compiled, model.generate(**prompts, generator=seeds(1, 2, 3)))


@pytest.mark.parametrize("length", [0, 1, 5, 9])
def test_a_prefix_is_kept_and_continued_as_it_was_drawn(model: DalleBart, prompts: dict, length: int) -> None:
    whole = model.generate(**prompts, do_sample=False)
    continued = model.generate(**prompts, do_sample=False, prefix=whole[:, 1 : 1 + length])
    assert torch.equal(continued, whole)


def test_a_foreign_prefix_changes_what_follows(model: DalleBart, prompts: dict) -> None:
    whole = model.generate(**prompts, do_sample=False)
    prefix = (whole[:1, 1:4] + 1) % 24
    continued = model.generate(**prompts, do_sample=False, prefix=prefix)
    assert torch.equal(continued[:, 1:4], prefix.expand(3, -1))
    assert not torch.equal(continued[:, 4:], whole[:, 4:])


def test_given_tokens_stay_where_they_are(model: DalleBart, prompts: dict) -> None:
    given = torch.full((3, 9), -1)
    given[:, 4] = torch.tensor([3, 4, 5])
    tokens = model.generate(**prompts, forced_tokens=given, generator=seeds(1, 2, 3))
    assert tokens[:, 5].tolist() == [3, 4, 5]
    free = model.generate(**prompts, generator=seeds(1, 2, 3))
    assert torch.equal(tokens[:, :5], free[:, :5])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prefix": torch.zeros(1, 10, dtype=torch.long)}, r"at most 9"),
        ({"prefix": torch.zeros(2, 3, dtype=torch.long)}, r"\[1 or 3, 9\]"),
        ({"prefix": torch.full((1, 3), 25)}, r"lie in \[0, 24\]"),
        ({"prefix": torch.zeros(1, 1), "forced_tokens": torch.zeros(1, 9)}, "not both"),
    ],
)
def test_impossible_given_tokens(model: DalleBart, prompts: dict, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts, **given)


def test_stream_shows_the_picture_grow(model: DalleBart, prompts: dict) -> None:
    parts = [part.clone() for part in model.generate_stream(**prompts, generator=seeds(1, 2, 3), every=4)]
    assert [part.shape[1] for part in parts] == [5, 9, 10]
    whole = model.generate(**prompts, generator=seeds(1, 2, 3))
    assert all(torch.equal(part, whole[:, : part.shape[1]]) for part in parts)
    seen = []
    model.generate(
        **prompts, generator=seeds(1, 2, 3), stream=lambda tokens: seen.append(tokens.shape[1]), stream_every=3
    )
    assert seen == [4, 7, 10]


def test_no_token_from_max_token_up_nor_the_end_token(prompts: dict) -> None:
    model = small_model(eos_token_id=2)
    for max_token in (4, 24):
        tokens = model.generate(**prompts, images_per_prompt=20, max_token=max_token, temperature=50.0)[:, 1:]
        assert tokens.max() < max_token
        assert not (tokens == 2).any()


def test_guidance_needs_an_empty_prompt(model: DalleBart, prompts: dict) -> None:
    prompt = {key: prompts[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"condition_scale=10.0 needs input_ids_uncond"):
        model.generate(**prompt)
    plain = model.generate(**prompt, condition_scale=1, do_sample=False)
    shared = {key: value[:1] if "uncond" in key else value for key, value in prompts.items()}
    assert torch.equal(plain, model.generate(**shared, condition_scale=1, do_sample=False))
    assert torch.equal(model.generate(**shared, do_sample=False), model.generate(**prompts, do_sample=False))
    shared["input_ids_uncond"] = shared["input_ids_uncond"][:, :4]
    with pytest.raises(ValueError, match=r"input_ids_uncond has shape \(1, 4\)"):
        model.generate(**shared)


def test_scale_zero_ignores_the_prompt(model: DalleBart, prompts: dict) -> None:
    tokens = model.generate(**prompts, condition_scale=0.0, do_sample=False)
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_reported(bad: float, prompts: dict) -> None:
    model = small_model()
    model.lm_head.weight.data[3] = bad
    with pytest.raises(NonFiniteLogitsError, match="logits are not finite"):
        model.generate(**prompts)
    with pytest.raises(NonFiniteLogitsError):
        model.generate(prompts["input_ids"], num_beams=2, do_sample=False, condition_scale=1)


def likelihood(model: DalleBart, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of each drawn sequence [N, L + 1], the end token left out of the choice."""
    logits = model(input_ids=ids.expand(len(tokens), -1), decoder_input_ids=tokens[:, :-1]).logits
    logits[..., model.config.eos_token_id] = -torch.inf
    return logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).sum((1, 2))


def test_beams_that_hold_everything_find_the_most_likely_picture() -> None:
    model = small_model(image_vocab_size=3, image_length=3)
    for prompt in range(5, 9):
        ids = torch.tensor([[0, prompt, 2]])
        every = torch.tensor([[3, *tokens] for tokens in itertools.product(range(3), repeat=3)])
        with torch.no_grad():
            best = every[likelihood(model, ids, every).argmax()]
        # Nine beams hold every sequence of two tokens, so nothing is lost before the last step.
        found = model.generate(ids, num_beams=9, do_sample=False, condition_scale=1)
        assert torch.equal(found[0], best)
        one_beam = beam_search(model, ids, None, beams=1, max_token=None)
        assert torch.equal(one_beam, model.generate(ids, do_sample=False, condition_scale=1))


def test_beam_search_of_several_prompts_is_that_of_each(model: DalleBart, prompts: dict) -> None:
    options = {"num_beams": 4, "do_sample": False, "condition_scale": 1}
    together = model.generate(prompts["input_ids"], prompts["attention_mask"], **options)
    for row in range(3):
        alone = model.generate(prompts["input_ids"][row : row + 1], prompts["attention_mask"][row : row + 1], **options)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "num_beams=4 draws without do_sample: it needs do_sample=False"),
        ({"condition_scale": 10.0, "top_k": 3}, "without condition_scale, top_k: it needs condition_scale=1, top_k=N"),
        ({"top_p": -4.0, "temperature": 0.5}, "without temperature, top_p"),
        ({"images_per_prompt": 2}, "without images_per_prompt"),
        ({"compile": True, "generator": torch.Generator()}, "without compile, generator"),
        ({"prefix": torch.zeros(1, 1, dtype=torch.long)}, "without prefix"),
        ({"stream": print}, "without stream"),
        ({"num_beams": 0}, "num_beams=0 must be at least 1"),
        ({"max_token": 0}, "max_token=0 leaves no image token"),
    ],
)
def test_beam_search_refuses_what_it_would_ignore(model: DalleBart, prompts: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts, **{"num_beams": 4, "do_sample": False, "condition_scale": 1} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(3, 2)}, r"attention_mask has shape \[3, 2\]; it must be \["),
        ({"attention_mask_uncond": torch.ones(3, 2)}, r"attention_mask_uncond has shape \[3, 2\]"),
        ({"input_ids": torch.full((3, 6), 10**6)}, "reach from 1000000 to 1000000; the model knows tokens from 0 to"),
        ({"input_ids": torch.zeros(0, 6, dtype=torch.long)}, r"input_ids is torch.int64 of shape \[0, 6\]"),
        ({"input_ids": torch.zeros(3, 6)}, "input_ids is torch.float32"),
        ({"prefix": torch.zeros(3, 2)}, "prefix is torch.float32"),
        ({"prefix": torch.full((3, 2), -1)}, "prefix holds -1"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
    ],
)
def test_inputs_that_would_be_misread(model: DalleBart, prompts: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts | options)
