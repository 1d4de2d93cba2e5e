"""Training of a VQGAN's encoder, codebook and decoder on pictures of known make, without adversary.

Owns: the losses, the codebook's start and restarts, the loop. Does not own: the network (`models.vqgan`), the pictures
(any callable from step to batch). The recipe is that of VQ-VAE (van den Oord et al., arXiv 1711.00937) with the random
restarts of Jukebox (Dhariwal et al., arXiv 2005.00341).
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dalle_torch.config import CropPhase, VQGANTrainingConfig
from dalle_torch.log import get_logger, progress
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.optim.build import build_optimizer
from dalle_torch.optim.schedules import learning_rate
from dalle_torch.storage import atomic_folder
from dalle_torch.training.step import apply_gradients

logger = get_logger(__name__)

PictureSource = Callable[[int, int], np.ndarray]
"""(index of the first picture, number of pictures) -> uint8 [B, H, W, 3]."""

MINORITY_DISTANCE = 0.1
"""In the network's own range; compression noise and anti-aliasing stay below it."""
_KMEANS_ROUNDS = 10


def train_vqgan(model: VQGAN, pictures: PictureSource, config: VQGANTrainingConfig, folder: Path) -> VQGAN:
    """Train `model` in place; `folder` gets `metrics.jsonl` and, now and then and at the end, the model.

    Ctrl-C saves what there is and ends the run.
    """
    torch.manual_seed(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.train().to(memory_format=torch.channels_last)
    trainer = _Trainer(model, config)
    steps = sum(phase.steps for phase in config.phases)
    started = time.monotonic()
    try:
        with progress(total=steps, desc="VQGAN", unit="step") as bar, (folder / "metrics.jsonl").open("a") as log:
            for step, pixels in enumerate(_batches(pictures, config)):
                metrics = trainer.step(_to_network(pixels, model), step, steps)
                bar.update()
                if step % config.log_every == 0 or step == steps - 1:
                    row = {"step": step, "seconds": round(time.monotonic() - started, 1)}
                    row |= {name: float(f"{float(value):.5g}") for name, value in metrics.items()}
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    bar.set_postfix(error=row["absolute"], codes=row["codes"])
                if (step + 1) % config.save_every == 0:
                    _save(model, folder)
    except KeyboardInterrupt:
        logger.warning("interrupted: the VQGAN is saved as it is")
        _save(model.eval(), folder)
        raise
    _save(model.eval(), folder)
    return model


@torch.no_grad()
def initialise(model: VQGAN) -> None:
    """Start every residual branch at zero and every other convolution at unit gain.

    The network begins as a nearly linear autoencoder, which finds colours long before it would from torch's own
    initialisation (zero residual branches: Goyal et al., arXiv 1706.02677).
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or not name.startswith(("encoder.", "decoder.")):
            continue
        kind = name.rsplit(".", 1)[1]
        if kind in ("conv2", "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif kind not in ("conv_out", "q", "k", "v"):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)


class _Trainer:
    def __init__(self, model: VQGAN, config: VQGANTrainingConfig) -> None:
        self.model = model
        self.config = config
        self.optimizer = build_optimizer(model, config.optimizer)
        self.usage = torch.zeros(model.config.n_embed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.samples: list[Tensor] = []

    def step(self, pixels: Tensor, step: int, steps: int) -> dict[str, float | Tensor]:
        """One update; returns its metrics."""
        config = self.config
        latents = self.model.quant_conv(self.model.encoder(pixels))
        vectors = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
        if step < config.continuous_steps:
            quantized, codebook_loss = latents, latents.new_zeros(())
            if step >= config.continuous_steps - max(1, config.continuous_steps // 4):
                self.samples.append(vectors)
        else:
            if self.samples:
                self.model.codebook.data.copy_(
                    kmeans(torch.cat(self.samples), self.model.config.n_embed, self.generator)
                )
                self.samples = []
            quantized, codebook_loss, (_, _, codes) = self.model.quantize(latents)
            self.usage += torch.bincount(codes.flatten(), minlength=len(self.usage))
        reconstruction = self.model.decode_latents(quantized)
        absolute, square, edge = reconstruction_errors(reconstruction, pixels, config.minority_weight)
        loss = absolute + config.square_weight * square + config.edge_weight * edge + codebook_loss
        loss.backward()
        lr = learning_rate(config.optimizer, step, steps)
        norm = apply_gradients(self.model.parameters(), self.optimizer, lr, config.optimizer.max_grad_norm)
        used = int((self.usage > 0).sum())
        if step >= config.continuous_steps and (step + 1) % config.restart_every == 0:
            self._restart(vectors, step < config.restart_until * steps)
        return {
            "absolute": absolute.detach(), "square": square.detach(), "edge": edge.detach(),
            "codebook": codebook_loss.detach(), "grad_norm": norm, "lr": lr, "codes": used,
        }  # fmt: skip

    def _restart(self, vectors: Tensor, wanted: bool) -> None:
        dead = (self.usage == 0).nonzero().flatten()
        if wanted and len(dead):
            chosen = torch.randint(len(vectors), (len(dead),), generator=self.generator)
            codebook = self.model.codebook
            codebook.data[dead] = vectors[chosen]
            # Moments entry by entry, whatever the optimizer calls them; matrices and factors belong to all codes.
            for moment in self.optimizer.state[codebook].values():
                if moment.shape == codebook.shape:
                    moment[dead] = 0
        self.usage.zero_()


def reconstruction_errors(
    reconstruction: Tensor, pixels: Tensor, minority_weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean absolute error, mean squared error, and mean absolute error of neighbouring pixels' differences.

    Pixels [B, C, H, W] that differ from their picture's median colour count `minority_weight` times as much in the
    first two, so that small things on a large background are learnt soon.
    """
    error = reconstruction - pixels
    median = pixels.flatten(2).median(dim=2).values[:, :, None, None]
    minority = ((pixels - median).abs().amax(dim=1, keepdim=True) > MINORITY_DISTANCE).to(error.dtype)
    weight = 1 + (minority_weight - 1) * minority
    weight = weight / weight.mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return (weight * error.abs()).mean(), (weight * error.square()).mean(), edges


def kmeans(vectors: Tensor, n: int, generator: torch.Generator, rounds: int = _KMEANS_ROUNDS) -> Tensor:
    """Centres [n, C] of `vectors` [N, C] by Lloyd's algorithm from spread starts (k-means++)."""
    vectors = vectors[torch.randperm(len(vectors), generator=generator)[: 64 * n]]
    centers = vectors[:1]
    nearest = (vectors - centers).square().sum(1)
    for _ in range(n - 1):
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        chosen = vectors[torch.multinomial(weights, 1, generator=generator)]
        centers = torch.cat([centers, chosen])
        nearest = torch.minimum(nearest, (vectors - chosen).square().sum(1))
    for _ in range(rounds):
        owner = torch.cdist(vectors, centers).argmin(1)
        sums = torch.zeros_like(centers).index_add_(0, owner, vectors)
        counts = torch.bincount(owner, minlength=n)[:, None]
        centers = torch.where(counts > 0, sums / counts.clamp(min=1), centers)
    return centers


def _batches(pictures: PictureSource, config: VQGANTrainingConfig) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(config.seed)
    start = 0
    for phase in config.phases:
        for _ in range(phase.steps):
            yield crop_at_edges(pictures(start, phase.batch_size), phase, rng)
            start += phase.batch_size


def crop_at_edges(images: np.ndarray, phase: CropPhase, rng: np.random.Generator) -> np.ndarray:
    """Cut a square out of each picture [B, H, W, 3] so that it holds a random pixel where the colour changes."""
    side = images.shape[1]
    if phase.crop >= side:
        return images
    cut = np.empty((len(images), phase.crop, phase.crop, 3), dtype=images.dtype)
    for i, image in enumerate(images):
        rows, columns = np.nonzero((image[1:, 1:] != image[:-1, :-1]).any(-1))
        pick = rng.integers(len(rows)) if len(rows) else None
        y, x = (side // 2, side // 2) if pick is None else (rows[pick], columns[pick])
        # The pixel beyond, which is what differs, has to be inside too.
        back = rng.integers(max(phase.crop - 1, 1), size=2)
        top, left = (int(np.clip(at - step, 0, side - phase.crop)) for at, step in zip((y, x), back, strict=True))
        cut[i] = image[top : top + phase.crop, left : left + phase.crop]
    return cut


def _to_network(pixels: np.ndarray, model: VQGAN) -> Tensor:
    black, white = model.config.pixel_range
    values = torch.from_numpy(pixels).to(model.device).permute(0, 3, 1, 2).float()
    return values.mul_((white - black) / 255).add_(black).contiguous(memory_format=torch.channels_last)


def _save(model: VQGAN, folder: Path) -> None:
    with atomic_folder(folder / "vqgan") as target:
        model.save_pretrained(target)
