"""The foreign formats that a `DalleBart` can be loaded from, in order of preference."""

from functools import partial

from dalle_torch.models.convert.flax_dallebart import FLAX_WEIGHTS_NAME, read_flax_dallebart
from dalle_torch.models.convert.min_dalle import min_dalle_config, read_min_dalle
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
