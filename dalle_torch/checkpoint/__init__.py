"""Checkpoints of a run, in parts that several processes write and any number of them read, and the way out of them to a
Hugging Face folder.

Owns: the format on disk, what makes a checkpoint whole, which ones stay; export and model card. Does not own: what is
saved and when (`training`).
"""

from dalle_torch.checkpoint.reading import Checkpoint
from dalle_torch.checkpoint.sharded import CheckpointFolder

__all__ = ["Checkpoint", "CheckpointFolder"]
