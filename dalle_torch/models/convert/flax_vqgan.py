"""The Flax VQGAN of DALL·E Mini (`dalle-mini/vqgan_imagenet_f16_16384`): its names and layout turned into ours.

Owns: names of the Flax tree and the pixel range, which its `config.json` does not tell. Does not own: reading the file
(`msgpack`), the check that everything fits (`models.weights`).
Source: `VQModel` in patil-suraj/vqgan-jax's `modeling_flax_vqgan.py`, a translation of taming-transformers.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from dalle_torch.models.configuration import VQGANConfig
from dalle_torch.models.convert.msgpack import read_tensors

WEIGHTS_NAME = "flax_model.msgpack"

PIXEL_RANGE = (0.0, 1.0)
"""The original project fed this network, and read from it, pixels in [0, 1]."""

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def flax_vqgan_tensors(tensors: Iterable[tuple[tuple[str, ...], Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(path in the Flax tree, tensor) to (our name, view in our layout: convolutions [out, in, h, w])."""
    for path, tensor in tensors:
        names = path[1:] if path[0] == "params" else path
        if not names or names[-1] not in _LEAVES:
            yield "/".join(path), tensor
            continue
        layers = _list_indices(names[:-1])
        convolution = names[-1] == "kernel" and tensor.dim() == 4
        yield ".".join([*layers, _LEAVES[names[-1]]]), tensor.permute(3, 2, 0, 1) if convolution else tensor


def read_flax_vqgan(folder: Path, config: VQGANConfig) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights of `folder/flax_model.msgpack` under our names.

    Yields:
        (our name, view on the mapped file in our layout).

    Raises:
        CheckpointError: the file is damaged.
    """
    return flax_vqgan_tensors(read_tensors(folder / WEIGHTS_NAME))


def names_pixel_range(folder: Path) -> bool:
    """Whether `folder/config.json` exists and says which pixel range the network takes."""
    path = folder / "config.json"
    return path.is_file() and "pixel_range" in json.loads(path.read_text(encoding="utf-8"))


def _list_indices(names: tuple[str, ...]) -> list[str]:
    """`down_0` stands for `down.0`; the two blocks and the attention of `mid` are attributes, not a list."""
    return [
        name if parent == "mid" else re.sub(r"^(down|up|block|attn)_(\d+)$", r"\1.\2", name)
        for parent, name in zip(("", *names), names, strict=False)
    ]
