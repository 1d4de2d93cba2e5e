"""Where a name leads: folder, Hugging Face hub id, wandb artifact or fsspec URL, brought into a local folder; and
writes that are whole or absent.

Owns: downloads and their caches, the choice of one weight format out of several, atomic writes, `CheckpointError`.
Does not own: reading what the files hold (`models.loading`, `models.convert`).
"""

from dalle_torch.storage.atomic import atomic_file, atomic_folder, sha256_of
from dalle_torch.storage.places import Place
from dalle_torch.storage.sources import (
    COMPANIONS,
    WEIGHT_FORMATS,
    CheckpointError,
    choose_weights,
    resolve,
    resolve_model,
)

__all__ = [
    "COMPANIONS",
    "WEIGHT_FORMATS",
    "CheckpointError",
    "Place",
    "atomic_file",
    "atomic_folder",
    "choose_weights",
    "resolve",
    "resolve_model",
    "sha256_of",
]
