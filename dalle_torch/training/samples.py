"""Pictures of fixed prompts while a model trains.

Owns: drawing them with the weights as they are, and the sheet. Does not own: when (`pictures`), scores (`scores`), the
drawing itself (`pipeline`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from dalle_torch.config import PicturesConfig, SamplesConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.pipeline import DallePipeline
from dalle_torch.pipeline.output import DallePipelineOutput, make_grid, write_png
from dalle_torch.text.processor import DalleBartProcessor


class Drawer:
    """Draws the same prompts with the same seeds each time.

    Args:
        vqgan: stays where it is; codes are brought to it.
    """

    def __init__(self, model: DalleBart, processor: DalleBartProcessor, vqgan: VQGAN) -> None:
        training = model.training
        self._pipe = DallePipeline(model, processor, vqgan)
        # A pipeline is for drawing alone, and makes its model so.
        model.train(training)

    @property
    def picture_size(self) -> int:
        """Pixels of a side."""
        return self._pipe.vqgan.config.resolution

    def draw(self, config: PicturesConfig) -> DallePipelineOutput:
        """The pictures with the weights as they are now; the model's mode and torch's random states are as before
        afterwards."""
        model = self._pipe.model
        training = model.training
        try:
            with undisturbed(model.device):
                model.eval()
                return self._pipe(
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


class Sampler:
    """Sheets to look at.

    Args:
        folder: for `step-XXXXXXXX.png`, one row a prompt.
    """

    def __init__(self, config: SamplesConfig, drawer: Drawer, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._drawer = drawer

    def draw(self, step: int, write: bool = True) -> tuple[list[Image.Image], list[str]]:
        """The pictures after `step` updates and the prompt of each.

        Args:
            write: into the folder too; one process of a run does.
        """
        output = self._drawer.draw(self.config)
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet = make_grid(output.images, columns=self.config.images, labels=output.prompts)
            write_png(self.folder / f"step-{step:08d}.png", sheet, {"step": step} | asdict(self.config))
        return output.images, output.prompts


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever is drawn at random inside, on the CPU and on `device`, training goes on as if it had not been."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
