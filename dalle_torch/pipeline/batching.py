"""Pictures in portions that fit memory.

Owns: how P prompts times N pictures are cut into batches, how many pictures a batch takes when nobody says, and what
counts as running out of memory. Does not own: drawing them (`pipeline`).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

MAX_AUTOMATIC = 64
"""Pictures in a batch when the size is automatic; beyond it a batch only costs memory."""

_USABLE = 0.6  # of free memory: the rest is for activations, the allocator's slack and everybody else


@dataclass(frozen=True)
class Batch:
    """A rectangle out of prompts x pictures; rows of its tensors are ordered prompt by prompt."""

    first_prompt: int
    last_prompt: int
    first_image: int
    last_image: int

    @property
    def prompts(self) -> int:
        return self.last_prompt - self.first_prompt

    @property
    def images(self) -> int:
        """Pictures of each prompt."""
        return self.last_image - self.first_image

    @property
    def size(self) -> int:
        return self.prompts * self.images

    def rows(self, num_images: int) -> list[int]:
        """Where its pictures stand among all, `num_images` a prompt."""
        return [
            prompt * num_images + image
            for prompt in range(self.first_prompt, self.last_prompt)
            for image in range(self.first_image, self.last_image)
        ]

    def split(self, limit: int) -> Iterator["Batch"]:
        """The same pictures in batches of at most `limit`, as even as they come: equal shapes need compiling once."""
        if self.size <= limit:
            yield self
        elif self.images <= limit:
            for first, last in _parts(self.first_prompt, self.last_prompt, limit // self.images):
                yield Batch(first, last, self.first_image, self.last_image)
        else:
            for prompt in range(self.first_prompt, self.last_prompt):
                for first, last in _parts(self.first_image, self.last_image, limit):
                    yield Batch(prompt, prompt + 1, first, last)


def _parts(first: int, last: int, limit: int) -> Iterator[tuple[int, int]]:
    count = -(-(last - first) // limit)
    bounds = [first + (last - first) * part // count for part in range(count + 1)]
    yield from pairwise(bounds)


def automatic_batch_size(model: torch.nn.Module, guided: bool) -> int:
    """Pictures that can be drawn at once in the memory that is free now, between 1 and `MAX_AUTOMATIC`."""
    free = free_memory(model.device)
    if free is None:
        return MAX_AUTOMATIC
    return max(1, min(MAX_AUTOMATIC, int(free * _USABLE) // bytes_per_picture(model, guided)))


def bytes_per_picture(model: torch.nn.Module, guided: bool) -> int:
    """Bytes that one more picture takes: key and value caches of every decoder layer, and logits with their copies.

    Args:
        guided: super conditioning doubles the rows.
    """
    config, rows = model.config, 2 if guided else 1
    cache = 2 * config.decoder_layers * config.image_length * config.d_model * model.dtype.itemsize
    logits = 6 * (config.image_vocab_size + 1) * 4
    return rows * (cache + logits)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on `device`; None where nobody can tell (torch_xla)."""
    if device.type == "cuda":
        # What torch's allocator keeps in store is free for us too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _free_host_memory() if device.type == "cpu" else None


def _free_host_memory() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help: each backend has its own way to say that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "RESOURCE_EXHAUSTED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
