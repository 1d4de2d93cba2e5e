"""Whether codes were made by a VQGAN: decoded by another they are pictures of nothing.

Owns: a VQGAN's fingerprint, the comparison with manifests. Does not own: the manifests (`manifest`).
"""

import hashlib
import json
from collections.abc import Sequence

import torch

from dalle_torch.data.manifest import ShardFolder
from dalle_torch.data.shards import find_shards
from dalle_torch.models.vqgan import VQGAN


def fingerprint(vqgan: VQGAN) -> str:
    """SHA-256 over everything that decides which codes a network gives: its shape and the encoder's weights."""
    config = vqgan.config
    names = ("ch", "ch_mult", "num_res_blocks", "resolution", "attn_resolutions", "z_channels", "n_embed", "embed_dim",
             "norm_groups", "quantizer", "pixel_range", "resamp_with_conv", "double_z")  # fmt: skip
    digest = hashlib.sha256(json.dumps([getattr(config, name) for name in names]).encode())
    for name, tensor in sorted(vqgan.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            data = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{name} {list(data.shape)}".encode() + data.numpy().tobytes())
    return digest.hexdigest()


def check_made_by(inputs: Sequence[str], vqgan: VQGAN, name: str) -> None:
    """Compare a VQGAN with what the folders of shards say; those without a manifest say nothing.

    Args:
        name: of the VQGAN, for the error.

    Raises:
        OSError: no shard matches.
        ValueError: a folder's codes were made by another one.
    """
    own = fingerprint(vqgan)
    for folder in dict.fromkeys(shard.folder for shard in find_shards(list(inputs))):
        manifest = ShardFolder(folder).manifest()
        if manifest is not None and manifest.settings.vqgan != own:
            raise ValueError(
                f"{folder} has codes of another VQGAN than {name}, which cannot decode them: name the one that they "
                f"were encoded with (fingerprint {manifest.settings.vqgan[:12]}, and {name} has {own[:12]})"
            )
