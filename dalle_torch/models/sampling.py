"""Logits -> token: super conditioning, temperature, top-k, top-p, in this order; pure functions on tensors.

Shapes: B pictures, V image tokens. No function reads a value back to the host, so all can stand in a compiled step.
Super conditioning: crowsonkb's notes and dalle-mini's `modeling.py`; top-p: arXiv 1904.09751.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a token is chosen.

    Raises:
        ValueError: an option is out of range; every offender is named.
    """

    do_sample: bool = True
    """False: the most likely token."""
    temperature: float = 1.0
    """Logits are divided by it; 0 is the same as `do_sample=False`."""
    top_k: int | None = None
    """Only the k most likely tokens; None: all."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability, always at least one; None: all."""
    condition_scale: float = 10.0
    """Weight of super conditioning; 1 is plain conditional drawing."""

    def __post_init__(self) -> None:
        problems = []
        if not (self.temperature >= 0 and self.temperature < float("inf")):
            problems.append(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            problems.append(f"top_k={self.top_k} must be a whole number of at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must lie in (0, 1], or be None for all tokens")
        if not abs(self.condition_scale) < float("inf"):
            problems.append(f"condition_scale={self.condition_scale} must be a finite number")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return not self.do_sample or self.temperature == 0 or self.top_k == 1

    def check_vocabulary(self, choices: int) -> None:
        """Refuse a `top_k` above the number of tokens there are to choose from.

        Raises:
            ValueError: with both numbers.
        """
        if self.top_k is not None and self.top_k > choices:
            raise ValueError(
                f"top_k={self.top_k} is more than the {choices} image tokens there are to choose from: "
                f"use at most {choices}, or None for all"
            )


def super_condition(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """unconditional + scale * (conditional - unconditional), all [B, V]."""
    return torch.lerp(unconditional, conditional, scale)


def forbid(logits: Tensor, max_token: int | None, *tokens: int) -> Tensor:
    """-inf for `tokens` and, if given, for every id from `max_token` up. [B, V] -> [B, V]."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    forbidden = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        forbidden = forbidden | (ids == token)
    if max_token is not None:
        forbidden = forbidden | (ids >= max_token)
    return logits.masked_fill(forbidden, -torch.inf)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k best; ties with the k-th stay. [B, V] -> [B, V]."""
    threshold = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest best tokens whose probability reaches `p`. [B, V] -> [B, V]."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The best token has nothing before it, so it always stays.
    ordered = ordered.masked_fill(before >= p, -torch.inf)
    return torch.empty_like(ordered).scatter_(-1, order, ordered)


def choose(logits: Tensor, options: SamplingOptions, uniform: Tensor | None) -> Tensor:
    """Choose a token of each row.

    Args:
        logits: [B, V] after super conditioning; ids that may not be chosen are -inf.
        options: how to choose.
        uniform: float32 [B] in [0, 1), one number a picture; not needed when greedy. The token is where the
            cumulative distribution passes it, so a picture's randomness is its own, whatever is drawn beside it.

    Returns:
        int64 [B].
    """
    if options.greedy or uniform is None:
        return logits.argmax(dim=-1)
    logits = logits.float() / options.temperature
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None and options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # Below the total even after rounding, so that some token always passes it, and never one of probability 0.
    threshold = uniform.clamp_max(1 - 2**-20)[:, None] * cumulative[:, -1:]
    return (cumulative <= threshold).sum(dim=-1).clamp_max(logits.shape[-1] - 1)
