"""What a taming-transformers training run leaves: `model.yaml` and `last.ckpt`, of a VQ or a Gumbel model.

Owns: reading both, and what is ignored in them (losses, optimizers). Does not own: the question whether a pickle may be
read (`models.loading` asks it first), the check that everything fits (`models.weights`). Parameter names are ours.
"""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from dalle_torch.models.configuration import VQGANConfig
from dalle_torch.storage import CheckpointError

CONFIG_NAME = "model.yaml"
WEIGHTS_NAME = "last.ckpt"

MAX_CONFIG_BYTES = 1 << 20
"""A model.yaml has about a thousand."""

_QUANTIZERS = {"VQModel": "vq", "VQNoDiscModel": "vq", "GumbelVQ": "gumbel"}
_REQUIRED = ("ch", "out_ch", "ch_mult", "num_res_blocks", "attn_resolutions", "in_channels", "resolution",
             "z_channels")  # fmt: skip
_OPTIONAL = ("dropout", "double_z", "resamp_with_conv", "give_pre_end")
_DAMAGED = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError,
            AttributeError, ImportError)  # fmt: skip


def read_taming_config(folder: Path) -> VQGANConfig:
    """The configuration that `folder/model.yaml` describes; pixels are in [-1, 1], as taming's data sets give them.

    Raises:
        CheckpointError: the file is not YAML, or describes no VQ or Gumbel model that `VQGAN` can be; everything that
            is wrong is listed.
    """
    path = folder / CONFIG_NAME
    model = _mapping(_load_yaml(path), "model", path)
    target = str(model.get("target", "")).rpartition(".")[2][:80]
    if target not in _QUANTIZERS:
        raise CheckpointError(f"{path}: model.target ends in {target!r}; known are {', '.join(_QUANTIZERS)}")
    params = _mapping(model, "params", path)
    network = _mapping(params, "ddconfig", path)
    absent = [f"params.{name}" for name in ("embed_dim", "n_embed") if name not in params]
    absent += [f"params.ddconfig.{name}" for name in _REQUIRED if name not in network]
    if absent:
        raise CheckpointError(f"{path} lacks {', '.join(absent)}")
    if params.get("remap") is not None:
        raise CheckpointError(f"{path}: params.remap gives a codebook in part, which VQGAN cannot be")
    values = {name: network[name] for name in (*_REQUIRED, *_OPTIONAL) if name in network}
    values |= {name: params[name] for name in ("embed_dim", "n_embed", "kl_weight") if name in params}
    for name in ("kl_weight", "dropout"):
        if isinstance(values.get(name), str):  # YAML 1.1 takes 1e-8, without a point, for a string
            values[name] = _number(values[name], name, path)
    try:
        return VQGANConfig(quantizer=_QUANTIZERS[target], pixel_range=(-1.0, 1.0), **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} describes no usable VQGAN: {reason[:500]}") from error


def read_taming(folder: Path, config: VQGANConfig) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights of `folder/last.ckpt`, without those of the losses.

    torch's restricted unpickler is tried first. A checkpoint that holds more than it allows (callbacks, options) is
    unpickled in full, WHICH RUNS ANY CODE IT CARRIES: call this only for files that the user trusts.

    Raises:
        CheckpointError: the file is damaged, needs packages that are not installed, or holds no tensors by name.
    """
    path = folder / WEIGHTS_NAME
    held = _load(path)
    if isinstance(held, Mapping) and isinstance(held.get("state_dict"), Mapping):
        held = held["state_dict"]
    if not isinstance(held, Mapping) or not held:
        raise CheckpointError(f"{path} holds no state_dict")
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} holds something else than tensors by name in its state_dict")
        if not name.startswith("loss."):
            yield name, tensor


def _load(path: Path) -> Any:
    for weights_only in (True, False):
        for mmap in (True, False):  # files from before torch 1.6 cannot be mapped
            try:
                return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap)
            except FileNotFoundError:
                raise
            except _DAMAGED as error:
                cause = error
    reason = str(cause).strip().split("\n")[0]
    raise CheckpointError(f"{path} cannot be unpickled: {type(cause).__name__}: {reason[:200]}") from cause


def _load_yaml(path: Path) -> Any:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; the limit is {MAX_CONFIG_BYTES:,}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not plain YAML: {reason[:300]}") from error


def _mapping(parent: Any, name: str, path: Path) -> Mapping[str, Any]:
    found = parent.get(name) if isinstance(parent, Mapping) else None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} has no section {name!r}; a taming model.yaml has model, params and ddconfig")
    return found


def _number(text: str, name: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: {name}={text[:80]!r} is not a number") from error
