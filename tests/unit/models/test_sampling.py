"""Choosing a token from logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dalle_torch.models.sampling import SamplingOptions, choose, forbid, keep_top_k, keep_top_p, super_condition

rows = hnp.arrays("float32", (2, 12), elements=st.floats(-20, 20, width=32), unique=True).map(torch.from_numpy)


@given(rows, st.integers(1, 12))
def test_top_k_keeps_the_k_best(logits: torch.Tensor, k: int) -> None:
    kept = keep_top_k(logits, k)
    assert (kept.isfinite().sum(-1) == k).all()
    assert torch.equal(kept.topk(k).indices, logits.topk(k).indices)


@given(rows, st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p(logits: torch.Tensor, p: float) -> None:
    kept = keep_top_p(logits, p).isfinite()
    probabilities = logits.double().softmax(-1)
    for row in range(2):
        inside = probabilities[row][kept[row]]
        assert len(inside) >= 1
        # Float32 cumulative sums of 12 numbers are exact to some 1e-6.
        assert inside.sum() >= p - 1e-5
        assert inside.sum() - inside.min() <= p + 1e-5
        assert inside.min() >= probabilities[row][~kept[row]].max() if (~kept[row]).any() else True


@given(rows, st.floats(0, 1, exclude_max=True, width=32), st.integers(1, 11))
def test_a_forbidden_token_is_never_chosen(logits: torch.Tensor, uniform: float, max_token: int) -> None:
    allowed = forbid(logits, max_token, 0) if max_token > 1 else forbid(logits, None, 0)
    for options in (SamplingOptions(), SamplingOptions(do_sample=False), SamplingOptions(top_k=3, top_p=0.5)):
        token = choose(allowed, options, torch.full((2,), uniform))
        assert allowed.gather(1, token[:, None]).isfinite().all()


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, 3.0]])
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n
    for temperature in (0.5, 1.0, 2.0):
        options = SamplingOptions(temperature=temperature)
        tokens = choose(logits.expand(n, -1), options, uniform)
        seen = torch.bincount(tokens, minlength=5) / n
        # Evenly spread numbers hit each interval to within two of them.
        torch.testing.assert_close(seen, (logits[0] / temperature).softmax(-1), atol=2.5 / n, rtol=0)


def test_zero_temperature_and_one_choice_are_greedy() -> None:
    logits = torch.randn(4, 30)
    for options in (SamplingOptions(temperature=0), SamplingOptions(top_k=1), SamplingOptions(do_sample=False)):
        assert torch.equal(choose(logits, options, torch.rand(4)), logits.argmax(-1))


def test_super_conditioning_extrapolates() -> None:
    a, b = torch.randn(2, 7), torch.randn(2, 7)
    torch.testing.assert_close(super_condition(a, b, 10.0), b + 10 * (a - b))
    torch.testing.assert_close(super_condition(a, b, 0.0), b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0 must be 0 \(greedy\) or a positive"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5, "top_k": -1}, r"top_k=-1 .*top_p=1.5"),
        ({"condition_scale": float("inf")}, "condition_scale=inf"),
    ],
)
def test_options_out_of_range_are_all_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


def test_top_k_above_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"top_k=31 is more than the 30 image tokens"):
        SamplingOptions(top_k=31).check_vocabulary(30)
