"""Training of the classifier of shapes that judges drawn pictures.

Owns: its pictures (clean, degraded, reconstructed by the codebook, broken) and its loop. Does not own: the network
(`shapes.classifier`), scores (`evaluation.shapes`).

It sees all pairs of colour and shape, those too that the drawing model never does: it has to judge them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_torch.config import ShapesJudgeConfig
from dalle_torch.log import progress
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.shapes.classifier import BROKEN, IGNORED, ShapesClassifier, labels_of
from dalle_torch.shapes.drawing import render
from dalle_torch.shapes.grammar import Scene
from dalle_torch.shapes.sampling import sample_scenes

Labels = dict[str, Tensor]

_VALIDATION_SEED = 0xA11
_CHUNK = 32


def train_judge(vqgan: VQGAN, config: ShapesJudgeConfig) -> tuple[ShapesClassifier, dict[str, float]]:
    """A classifier, and its accuracy by head on scenes that it was not trained on.

    Args:
        vqgan: the codebook whose pictures will be judged; half of the training pictures went through it, and broken
            ones are made by it from codes that were replaced at random.

    Returns:
        The network, ready to judge, and "NAME" and "NAME/reconstructed" -> share of right answers, for clean and for
        reconstructed pictures; "broken": the share of broken pictures that are seen as such.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = ShapesClassifier().train()
        pool = _pool(vqgan, config.seed, config.reconstructed)
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps, pct_start=0.1)
        for step in progress(range(config.steps), desc="judge", unit="step"):
            pixels, labels = _batch(pool, config, step)
            logits = network(_degraded(pixels))
            loss = torch.stack([_loss(logits[name], labels[name]) for name in logits]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    network.scale_features(_to_tensor(render(_scenes(_VALIDATION_SEED, 0, config.validation), _VALIDATION_SEED)))
    return network, accuracies(network, vqgan, config.validation)


@torch.no_grad()
def accuracies(network: ShapesClassifier, vqgan: VQGAN, count: int = 256) -> dict[str, float]:
    """The share of right answers of each head; see `train_judge`."""
    scenes = _scenes(_VALIDATION_SEED, 0, count)
    clean = _to_tensor(render(scenes, _VALIDATION_SEED))
    labels = labels_of(scenes)
    codes = _encode(vqgan, clean)
    found: dict[str, float] = {}
    for suffix, pixels in (("", clean), ("/reconstructed", _decode(vqgan, codes))):
        for name, logits in network(pixels).items():
            known = labels[name] != IGNORED
            found[f"{name}{suffix}"] = float((logits.argmax(dim=1) == labels[name])[known].float().mean())
    broken = _decode(vqgan, _broken(codes, vqgan, _VALIDATION_SEED))
    found["broken"] = float((network(broken)["layout"].argmax(dim=1) == BROKEN["layout"]).float().mean())
    return found


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    # A batch may have no label at all for a head, and the mean of nothing is not a number.
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=0.02, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _scenes(seed: int, start: int, count: int) -> list[Scene]:
    """Half of them with one part; half of them name a pair that the drawing model never sees."""
    seen, unseen = (
        sample_scenes(count, seed + held, start=start, unseen=bool(held), single=0.5, open_shapes=0.25)
        for held in range(2)
    )
    return [pair[index % 2] for index, pair in enumerate(zip(seen, unseen, strict=True))]


def _pool(vqgan: VQGAN, seed: int, count: int) -> tuple[Tensor, Labels]:
    """Pictures that went through the codebook: three of four whole, one broken; they serve again and again."""
    scenes = _scenes(seed, 1 << 24, count)
    pixels = _to_tensor(render(scenes, seed, start=1 << 24))
    labels = labels_of(scenes)
    codes = _encode(vqgan, pixels)
    whole = _decode(vqgan, codes)
    n_broken = count // 4
    broken = _decode(vqgan, _broken(codes[:n_broken], vqgan, seed))
    lost = {name: torch.full((n_broken,), BROKEN[name]) for name in labels}
    return torch.cat([whole, broken]), {name: torch.cat([labels[name], lost[name]]) for name in labels}


def _batch(pool: tuple[Tensor, Labels], config: ShapesJudgeConfig, step: int) -> tuple[Tensor, Labels]:
    """One half drawn for this step alone, the other from the pool."""
    fresh = config.batch_size // 2
    scenes = _scenes(config.seed, step * fresh, fresh)
    pixels, labels = _to_tensor(render(scenes, config.seed, start=step * fresh)), labels_of(scenes)
    rows = torch.randint(len(pool[0]), (config.batch_size - fresh,))
    return torch.cat([pixels, pool[0][rows]]), {name: torch.cat([labels[name], pool[1][name][rows]]) for name in labels}


def _degraded(pixels: Tensor) -> Tensor:
    """Noise, blur and a shift of brightness, each on some of the pictures."""
    chance = torch.rand(3, len(pixels), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pixels = torch.where(chance[0] < 0.2, blurred, pixels)
    pixels = pixels + (chance[1] < 0.5) * torch.rand_like(chance[1]) * 0.08 * torch.randn_like(pixels)
    return (pixels + (chance[2] < 0.5) * 0.04 * torch.randn_like(chance[2])).clamp(0, 1)


@torch.no_grad()
def _encode(vqgan: VQGAN, pixels: Tensor) -> Tensor:
    """The codes of pictures in [0, 1]."""
    low, high = vqgan.config.pixel_range
    return torch.cat([vqgan.encode(chunk * (high - low) + low) for chunk in pixels.split(_CHUNK)])


@torch.no_grad()
def _decode(vqgan: VQGAN, codes: Tensor) -> Tensor:
    """The pictures of codes, in [0, 1]."""
    low, high = vqgan.config.pixel_range
    parts = [(vqgan.decode(chunk) - low) / (high - low) for chunk in codes.split(_CHUNK)]
    return torch.cat(parts).clamp(0, 1).contiguous()


def _broken(codes: Tensor, vqgan: VQGAN, seed: int) -> Tensor:
    """Codes of which many are replaced at random, of each picture another share."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.empty(len(codes), 1).uniform_(0.05, 0.6, generator=generator)
    junk = torch.randint(vqgan.config.n_embed, codes.shape, generator=generator)
    return torch.where(torch.rand(codes.shape, generator=generator) < share, junk, codes)


def _to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [B, 64, 64, 3] to float32 [B, 3, 64, 64] in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).contiguous()
