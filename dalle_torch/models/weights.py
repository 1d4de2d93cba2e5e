"""Weights that are compared with what a model needs, and then put into it, one tensor at a time.

Owns: the check of names, shapes and kinds of number before memory is taken, devices, dtypes, filling a model that was
built on the meta device. Does not own: where weights come from (`loading`), what foreign ones are called (`convert`).
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dalle_torch.storage import CheckpointError

_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """None stands for "auto"."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is no floating-point dtype: use float32, bfloat16, float16 or 'auto'")
    return found


def describe(tensors: Iterable[tuple[str, Tensor]], source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Shapes and dtypes, as meta tensors, of tensors that are not touched."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in stored:
            raise CheckpointError(f"{source} holds {name} twice")
        stored[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return stored


def check_weights(model: nn.Module, stored: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Compare names, shapes and kinds of number of `stored` with what `model` needs.

    Raises:
        CheckpointError: lists everything that differs.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in stored]
    unexpected = [f"{name} {list(tensor.shape)}" for name, tensor in stored.items() if name not in expected]
    common = [(name, wanted, stored[name]) for name, wanted in expected.items() if name in stored]
    shapes = [
        f"{name} is {list(found.shape)} instead of {list(wanted.shape)}"
        for name, wanted, found in common
        if found.shape != wanted.shape
    ]
    kinds = [
        f"{name} is {str(found.dtype).removeprefix('torch.')}"
        for name, wanted, found in common
        if found.is_floating_point() != wanted.is_floating_point()
    ]
    problems = [
        f"{len(names)} {title}: {', '.join(names)}"
        for title, names in (
            ("missing", missing), ("unexpected", unexpected), ("of another shape", shapes), ("of another kind", kinds)
        )
        if names
    ]  # fmt: skip
    if problems:
        raise CheckpointError(f"the weights in {source} do not fit {type(model).__name__}: {'; '.join(problems)}")


def check_safetensors(folder: Path, model: nn.Module, source: str | os.PathLike[str]) -> None:
    """`check_weights` by the files' headers alone."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, Tensor] = {}
    for path in _safetensors_files(folder, source):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (the handle is no mapping)
                    part = file.get_slice(name)
                    dtype = torch.float32 if part.get_dtype().startswith(("F", "BF")) else torch.int64
                    if name in stored:
                        raise CheckpointError(f"{source} holds {name} twice")
                    stored[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    check_weights(model, stored, source)


def _safetensors_files(folder: Path, source: str | os.PathLike[str]) -> list[Path]:
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise FileNotFoundError(f"{source} holds parts of weights, but not their index {SAFE_WEIGHTS_INDEX_NAME}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files") from error
    if outside:
        raise CheckpointError(f"{index} leads out of its folder: {', '.join(outside)}")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{source} lacks {len(absent)} of {len(names)} parts: {', '.join(absent)}")
    return [folder / name for name in names]


def mapped_safetensors(folder: Path, source: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of files that `check_safetensors` has passed, each in a private mapping of its own.

    What is never read takes no memory, and a tensor that is let go gives its pages back at once. Writing into one
    changes memory, not the file.
    """
    for path in _safetensors_files(folder, source):
        with path.open("rb") as file:
            start = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
            if first == last:
                yield name, torch.empty(entry["shape"], dtype=dtype)
                continue
            data = np.memmap(path, dtype=np.uint8, mode="c", offset=8 + start + first, shape=(last - first,))
            # Old writers did not align their data.
            aligned = data if data.ctypes.data % dtype.itemsize == 0 else data.copy()
            yield name, torch.from_numpy(aligned).view(dtype).view(entry["shape"])


def can_map(folder: Path, source: str | os.PathLike[str]) -> bool:
    """Whether `mapped_safetensors` knows every dtype of the files."""
    from safetensors import safe_open

    for path in _safetensors_files(folder, source):
        with safe_open(path, framework="pt") as file:
            if any(file.get_slice(name).get_dtype() not in _SAFETENSORS_DTYPES for name in file.keys()):  # noqa: SIM118
                return False
    return True


def main_dtype(stored: Mapping[str, Tensor]) -> torch.dtype:
    """The floating-point dtype of most numbers."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def place_modules(model: nn.Module, device_map: Any, max_memory: dict | None, dtype: torch.dtype) -> dict[str, Any]:
    """Module name -> device, where "" is the whole model."""
    if device_map is None:
        return {"": torch.get_default_device()}
    if isinstance(device_map, dict):
        devices = device_map
    elif device_map in _AUTOMATIC_MAPS:
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory, get_max_memory

        whole = list(model._no_split_modules or ())
        if device_map == "sequential":
            memory = get_max_memory(max_memory)
        else:
            low = device_map == "balanced_low_0"
            memory = get_balanced_memory(model, max_memory, whole, dtype=dtype, low_zero=low)
        devices = infer_auto_device_map(model, memory, whole, dtype=dtype)
    else:
        devices = {"": _named_device(device_map)}
    if "disk" in devices.values():
        raise ValueError(
            "the model does not fit into the memory that device_map may use, and foreign weights cannot be offloaded "
            "to disk: convert them first (dalle-torch convert SOURCE DEST), or raise max_memory"
        )
    return dict(devices)


def _named_device(name: Any) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        known = ", ".join(sorted(_AUTOMATIC_MAPS))
        raise ValueError(f"device_map={name!r} is neither a device, such as 'cuda:0', nor one of {known}") from error


def _device_of(name: str, devices: Mapping[str, Any]) -> Any:
    while name not in devices and name:
        name = name.rpartition(".")[0]
    if name not in devices:
        raise ValueError(f"device_map leaves a part of the model without a device; it covers {', '.join(devices)}")
    return devices[name]


def fill(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    devices: Mapping[str, Any],
    *,
    copy: bool = True,
) -> None:
    """Replace every meta tensor of `model`'s state by the checked `tensors`, one at a time.

    Args:
        copy: False takes a tensor itself where its dtype is right; all devices are the CPU then.
    """
    for name, tensor in tensors:
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        old = getattr(module, attribute)
        kind = dtype if old.is_floating_point() else old.dtype
        value = tensor
        if copy or tensor.dtype != kind:
            value = torch.empty(old.shape, dtype=kind, device=_device_of(name, devices))
            value.copy_(tensor)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(module, attribute, value)


@torch.no_grad()
def fill_other_buffers(model: PreTrainedModel, devices: Mapping[str, Any]) -> None:
    """Compute the buffers that no checkpoint holds, by the model's own `_init_weights`."""
    for module_name, module in model.named_modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not names:
            continue
        for name in names:
            value = torch.zeros_like(getattr(module, name), device=_device_of(module_name, devices))
            setattr(module, name, value)
        # An initialisation that writes in place would take the weights along.
        loaded = {name: parameter.clone() for name, parameter in module.named_parameters(recurse=False)}
        model._init_weights(module)
        for name, value in loaded.items():
            getattr(module, name).copy_(value)
