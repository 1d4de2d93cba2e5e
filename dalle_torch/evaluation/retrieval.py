"""Whether a picture tells its own prompt from others.

Owns: the choice of the other prompts, the share of pictures that find theirs. Does not own: similarities (`base`).
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dalle_torch.evaluation.base import TextImageScorer
from dalle_torch.hashing import permutation

CANDIDATES = 32
"""Prompts that a picture chooses from, its own among them."""


def retrieval_accuracy(
    scorer: TextImageScorer,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    candidates: int = CANDIDATES,
    seed: int = 0,
) -> float:
    """The share of pictures whose own prompt scores above all others of their group; a tie finds nothing.

    Pictures are dealt at random into groups of `candidates` with different prompts, the last ones being smaller. Chance
    is one out of `candidates`.

    Args:
        prompts: of each picture. Pictures of equal prompts are never in one group.

    Raises:
        ValueError: fewer than two different prompts, or `candidates` below 2.
    """
    if candidates < 2:
        raise ValueError(f"candidates={candidates} must be at least 2: the picture's own prompt and another")
    if len(set(prompts)) < 2:
        raise ValueError("retrieval needs at least two different prompts")
    right = total = 0
    for group in _groups(prompts, candidates, seed):
        texts = [prompts[index] for index in group]
        table = scorer.similarities([images[index] for index in group], texts)
        own = table.diagonal()
        others = table.masked_fill(_diagonal(len(group)), float("-inf")).amax(dim=1)
        right += int((own > others).sum())
        total += len(group)
    return right / total


def _groups(prompts: Sequence[str], size: int, seed: int) -> list[list[int]]:
    """Indices of pictures in groups of different prompts; groups of one are left out."""
    groups: list[list[int]] = []
    texts: list[set[str]] = []
    unfilled = 0
    for index in permutation((seed, 0x9E7), len(prompts)).tolist():
        place = next((n for n in range(unfilled, len(groups)) if prompts[index] not in texts[n]
                      and len(groups[n]) < size), None)  # fmt: skip
        if place is None:
            groups.append([])
            texts.append(set())
            place = len(groups) - 1
        groups[place].append(index)
        texts[place].add(prompts[index])
        while unfilled < len(groups) and len(groups[unfilled]) == size:
            unfilled += 1
    return [group for group in groups if len(group) > 1]


def _diagonal(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.bool)
