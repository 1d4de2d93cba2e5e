"""How fast a run goes: samples and tokens a second, the share of the devices' arithmetic that is used, the time left.

Owns: these figures. Does not own: when they are logged (`loop`).
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.dalle_bart import DalleBart

PEAK_TFLOPS = {
    "H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10": 125.0, "RTX 4090": 165.0,
    "RTX 3090": 71.0, "v6e": 918.0, "v5p": 459.0, "v5e": 197.0, "v5litepod": 197.0, "v4": 275.0, "v3": 61.5, "v2": 23.0,
}  # fmt: skip
"""bfloat16, dense, 10^12 operations a second of one device as torch counts them, by a part of its name: the makers'
data sheets; of TPU v2 and v3 half a chip, which is a core."""


class Stopwatch:
    """Figures of the updates since the last look.

    Args:
        samples: of an update, over all devices.
        tokens: of a sample, text and image.
        flops: of the forward and backward pass of a sample.
        peak_flops: of all devices together; None: not known.
    """

    def __init__(self, samples: int, tokens: int, flops: float, peak_flops: float | None) -> None:
        self.samples, self.tokens, self.flops, self.peak_flops = samples, tokens, flops, peak_flops
        self.restart(0)

    def restart(self, step: int) -> None:
        """Forget what was measured; `step` updates are done."""
        self._step, self._start, self._waited, self._paused = step, time.monotonic(), 0.0, 0.0
        self._processor_start, self._processor_paused = time.process_time(), 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around what takes a batch."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no update: evaluation, saving, drawing."""
        start, processor_start = time.monotonic(), time.process_time()
        yield
        self._paused += time.monotonic() - start
        self._processor_paused += time.process_time() - processor_start

    def look(self, step: int, steps: int) -> dict[str, float]:
        """The figures of the updates from the last look to `step` of `steps`; call it when the device is done."""
        done, seconds = step - self._step, time.monotonic() - self._start - self._paused
        waited, processor = self._waited, time.process_time() - self._processor_start - self._processor_paused
        self.restart(step)
        if done <= 0 or seconds <= 0:
            return {}
        rate = done * self.samples / seconds
        found = {
            "seconds_per_step": seconds / done,
            # Of all threads of this process: on a machine that others use too, it tells the work from the waiting.
            "cpu_seconds_per_step": processor / done,
            "samples_per_second": rate,
            "tokens_per_second": rate * self.tokens,
            "input_wait": min(1.0, waited / seconds),
            "eta_seconds": (steps - step) * seconds / done,
        }
        if self.peak_flops:
            found["model_flops_utilisation"] = rate * self.flops / self.peak_flops
        return found


def line_of(row: Mapping[str, float], step: int, steps: int) -> str:
    """A log event in words, where no bar is shown."""
    words = [f"step {step}/{steps}", f"loss {row['loss']:.4f}", f"lr {row['lr']:.3g}"]
    if "samples_per_second" in row:
        left = timedelta(seconds=round(row["eta_seconds"]))
        words += [f"{row['samples_per_second']:.1f} samples/s", f"input wait {row['input_wait']:.1%}", f"{left} left"]
    return ", ".join(words)


def flops_of_sample(config: DalleBartConfig) -> float:
    """Operations of a forward and backward pass of one sample: three times the forward pass's products of matrices,
    without what gradient checkpointing computes again."""
    with torch.device("meta"):
        model = DalleBart(config)
        ids = torch.zeros(1, config.max_text_length, dtype=torch.int64)
        labels = torch.zeros(1, config.image_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=labels)
    return 3.0 * counter.get_total_flops()


def peak_flops(device: torch.device, count: int, precision: str, tflops: float | None, kind: str = "") -> float | None:
    """What `count` devices can do at most, in operations a second; None where that is not known.

    Args:
        tflops: of one device, where the user knows.
        kind: the name of the accelerator, where torch cannot tell it, as "v3-256".
    """
    if tflops is not None:
        return tflops * 1e12 * count
    if precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else kind
    found = next((value for part, value in PEAK_TFLOPS.items() if part.lower() in name.lower()), None)
    return found * 1e12 * count if found and name else None
