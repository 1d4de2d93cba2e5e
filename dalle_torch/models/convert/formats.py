"""The foreign formats of `DalleBart`, in order of preference, and min-dalle's of `VQGAN`."""

from functools import partial

from dalle_torch.models.convert.flax_dallebart import FLAX_WEIGHTS_NAME, read_flax_dallebart
from dalle_torch.models.convert.min_dalle import (
    DETOKER_NAME,
    detoker_config,
    min_dalle_config,
    read_detoker,
    read_min_dalle,
)
from dalle_torch.models.loading import ForeignFormat

DALLE_BART_FORMATS: tuple[ForeignFormat, ...] = (
    ForeignFormat(name="Flax", files=(FLAX_WEIGHTS_NAME,), tensors=read_flax_dallebart),
    *(
        ForeignFormat(
            name="min-dalle",
            files=(f"encoder{suffix}.pt", f"decoder{suffix}.pt"),
            tensors=partial(read_min_dalle, suffix=suffix),
            config=partial(min_dalle_config, suffix=suffix),
            pickled=True,
        )
        for suffix in ("", "_mini")
    ),
)

MIN_DALLE_VQGAN = ForeignFormat(
    name="min-dalle",
    files=(DETOKER_NAME,),
    tensors=read_detoker,
    config=detoker_config,
    pickled=True,
    absent=("encoder", "quant_conv"),
)
"""Codebook and decoder alone: such a VQGAN decodes, and says so when it is to encode."""
