"""Each prompt's pictures, the best first, as the first DALL·E's were ranked (arXiv 2102.12092).

Owns: the order that scores give, and what cannot be ranked. Does not own: the scores (`evaluation`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from dalle_torch.evaluation.base import TextImageScorer
from dalle_torch.evaluation.shapes import ShapesScorer
from dalle_torch.pipeline.output import DallePipelineOutput


def rank(
    output: DallePipelineOutput, scorer: TextImageScorer, num_images: int, num_best: int | None = None
) -> DallePipelineOutput:
    """Each prompt's `num_images` pictures best first, cut to `num_best`, with their scores.

    Raises:
        ValueError: a score is not a finite number.
    """
    scores = scorer.score(output.images, output.prompts)
    for score, prompt, seed in zip(scores, output.prompts, output.seeds, strict=True):
        if not math.isfinite(score):
            raise ValueError(
                f"the score of the picture of {prompt[:80]!r} with seed {seed} is {score}, which has no rank: look at "
                f"the weights of {scorer.judge.source}, or rank with another model"
            )
    order = [
        row
        for first in range(0, len(scores), num_images)
        for row in sorted(range(first, first + num_images), key=lambda row: -scores[row])[:num_best]
    ]
    return replace(
        output,
        images=[output.images[row] for row in order],
        prompts=[output.prompts[row] for row in order],
        seeds=[output.seeds[row] for row in order],
        tokens=output.tokens[order],
        scores=[scores[row] for row in order],
        withheld=[output.withheld[row] for row in order],
    )


def check_prompts(scorer: TextImageScorer | None, prompts: Sequence[str]) -> None:
    """Refuse prompts that `scorer` could not read, before anything is drawn of them.

    Raises:
        ValueError: a prompt is no caption of shapes, and the judge of shapes reads no others.
    """
    if isinstance(scorer, ShapesScorer):
        scorer.check(prompts)
