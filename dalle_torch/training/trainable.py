"""What of a model is trained: all of it, its embeddings, or parameters chosen by patterns.

Owns: which parameters ask for gradients, drawing embeddings anew. Does not own: optimizers, loading of weights.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from dalle_torch.models.dalle_bart import DalleBart

EMBEDDINGS = ("*.embed_tokens.weight", "*.embed_positions.weight", "lm_head.weight")
"""Tables of tokens and positions, and the rows that image tokens are chosen by."""
WORDS = {"all": ("*",), "embeddings": EMBEDDINGS}


def choose_trained(model: DalleBart, patterns: Sequence[str]) -> list[str]:
    """Let the parameters that any pattern matches, and no others, ask for gradients; returns their names.

    Args:
        patterns: "all", "embeddings", or names in which `*` stands for anything.

    Raises:
        ValueError: patterns that match nothing; all are named.
    """
    names = [name for name, _ in model.named_parameters()]
    wanted = {pattern: WORDS.get(pattern, (pattern,)) for pattern in patterns}
    unused = [
        pattern
        for pattern, expanded in wanted.items()
        if not any(fnmatchcase(name, single) for single in expanded for name in names)
    ]
    if unused:
        raise ValueError(
            f"model.train has patterns that match no parameter: {', '.join(unused)}; the names begin with "
            f"{', '.join(names[:3])}; 'all' and 'embeddings' are understood too"
        )
    chosen = []
    for name, parameter in model.named_parameters():
        trained = any(fnmatchcase(name, single) for expanded in wanted.values() for single in expanded)
        parameter.requires_grad_(trained)
        chosen += [name] if trained else []
    return chosen


@torch.no_grad()
def reinitialize_embeddings(model: DalleBart, seed: int) -> list[str]:
    """Draw the tables of `EMBEDDINGS` anew, as in a new model; returns their names."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in EMBEDDINGS):
            fresh = torch.empty(parameter.shape).normal_(std=model.config.init_std, generator=generator)
            parameter.copy_(fresh)
            drawn.append(name)
    return drawn
