"""The device that work runs on; torch_xla is imported here, and only when it is asked for.

Owns: names of devices, whether they are there, flushing lazily recorded work. Does not own: meshes and sharding.
"""

import os

import torch

DEVICES = ("auto", "cpu", "cuda", "mps", "xla")
"""Names of devices; "cuda:1" and the like are understood too."""


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device of a name, checked to be there.

    Args:
        device: one of `DEVICES`; "auto" is an NVIDIA or AMD GPU if there is one, else Apple's, else the CPU.

    Raises:
        ValueError: the name is unknown, or there is no such device here.
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not index.isdecimal()):
        raise ValueError(f"device={name!r} is not one of {', '.join(DEVICES)} (or cuda:1 and the like)")
    if kind == "xla":
        return _xla_device(int(index) if index else None)
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"device={name!r} is not here (CUDA devices found: {found}): use 'cpu' or 'auto'")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name!r} is not here: it needs a Mac with Apple silicon; use 'cpu' or 'auto'")
    return torch.device(name)


def let_devices_wait() -> None:
    """Have XLA take threads enough where a CPU stands for several devices; before anything else asks for a device.

    A device that takes part in a collective waits in a thread for the others, in several at once where one does not
    need the other's result. Of threads there are as many as devices; where all of them wait nobody arrives, and after
    ten seconds XLA ends the process.
    """
    devices = os.environ.get("CPU_NUM_DEVICES", "1")
    if os.environ.get("PJRT_DEVICE") == "CPU" and devices.isdecimal() and int(devices) > 1:
        os.environ.setdefault("PJRT_NPROC", str(8 * int(devices)))


def sync() -> None:
    """Run what torch_xla has recorded since the last call, without waiting for it."""
    import torch_xla

    torch_xla.sync()


def _xla_device(index: int | None) -> torch.device:
    try:
        import torch_xla
    except ImportError as error:
        raise ValueError(f"device='xla' needs torch_xla (pip install 'dalle-torch[xla]'): {error}") from error
    let_devices_wait()
    try:
        return torch_xla.device(index)
    except (RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"device='xla' cannot be used here: {reason} (PJRT_DEVICE=CPU or TPU names the hardware)"
        ) from error
