"""Pictures of fixed prompts while a model trains.

Owns: drawing them with the weights as they are, and the sheet. Does not own: when (`loop`), the drawing itself
(`pipeline`).
"""

from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from dalle_torch.config import SamplesConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.pipeline import DallePipeline
from dalle_torch.pipeline.output import make_grid, write_png
from dalle_torch.text.processor import DalleBartProcessor


class Sampler:
    """Draws the same prompts with the same seeds each time.

    Args:
        vqgan: stays where it is; codes are brought to it.
        folder: for `step-XXXXXXXX.png`, one row a prompt.
    """

    def __init__(
        self, config: SamplesConfig, model: DalleBart, processor: DalleBartProcessor, vqgan: VQGAN, folder: Path
    ) -> None:
        self.config, self.folder = config, folder
        training = model.training
        self._pipe = DallePipeline(model, processor, vqgan)
        # A pipeline is for drawing alone, and makes its model so.
        model.train(training)

    def draw(self, step: int, write: bool = True) -> tuple[list[Image.Image], list[str]]:
        """The pictures after `step` updates and the prompt of each; the model's mode and torch's random states are as
        before afterwards.

        Args:
            write: into the folder too; one process of a run does.
        """
        config, model = self.config, self._pipe.model
        training = model.training
        try:
            with torch.random.fork_rng(enabled=True):
                model.eval()
                output = self._pipe(
                    config.prompts,
                    num_images=config.images,
                    condition_scale=config.condition_scale,
                    temperature=config.temperature,
                    top_k=config.top_k,
                    top_p=config.top_p,
                    seed=config.seed,
                )
        finally:
            model.train(training)
        prompts = [prompt for prompt in config.prompts for _ in range(config.images)]
        if write:
            self._write(step, output.images, prompts)
        return output.images, prompts

    def _write(self, step: int, images: list[Image.Image], prompts: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet = make_grid(images, columns=self.config.images, labels=prompts)
        write_png(self.folder / f"step-{step:08d}.png", sheet, {"step": step} | asdict(self.config))
