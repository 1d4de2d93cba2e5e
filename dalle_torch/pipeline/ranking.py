"""Each prompt's pictures, the best first, as the first DALL·E's were ranked (arXiv 2102.12092).

Owns: the order that scores give. Does not own: the scores (`evaluation`).
"""

from dataclasses import replace

from dalle_torch.evaluation.base import TextImageScorer
from dalle_torch.pipeline.output import DallePipelineOutput


def rank(
    output: DallePipelineOutput, scorer: TextImageScorer, num_images: int, num_best: int | None = None
) -> DallePipelineOutput:
    """Each prompt's `num_images` pictures best first, cut to `num_best`, with their scores."""
    scores = scorer.score(output.images, output.prompts)
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
