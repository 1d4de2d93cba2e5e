"""How different the pictures of one prompt are.

Owns: the mean distance between pictures. Does not own: the features (`features`, `shapes`).
"""

from collections.abc import Iterable

from torch import Tensor


def diversity(features: Iterable[Tensor]) -> float:
    """The mean Euclidean distance between two pictures of the same prompt, over pairs, then over prompts.

    Args:
        features: of each prompt's pictures, [pictures, D]; prompts of one picture are left out.

    Raises:
        ValueError: no prompt has two pictures.
    """
    distances = []
    for pictures in features:
        if len(pictures) > 1:
            rows = pictures.double()
            # Differences and not products: near pictures would lose all digits.
            pairs = (rows[:, None] - rows[None]).norm(dim=-1)
            distances.append(float(pairs.sum()) / (len(rows) * (len(rows) - 1)))
    if not distances:
        raise ValueError("diversity needs at least two pictures of a prompt: draw more pictures of each")
    return sum(distances) / len(distances)
