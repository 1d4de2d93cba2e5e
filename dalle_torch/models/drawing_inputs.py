"""What a drawing starts from: encoded prompts, tokens that are given, random numbers; each checked.

Shapes: P prompts, N pictures a prompt, L = image_length tokens a picture.
Owns: the checks of what `generate` is given, the encoder's one run. Does not own: the options of sampling (`sampling`),
the loop (`generation`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dalle_torch.models.configuration import DalleBartConfig

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class Prompts:
    """Encoded prompts; with super conditioning the P conditional ones, then the P unconditional ones."""

    states: Tensor
    mask: Tensor
    guided: bool

    @property
    def count(self) -> int:
        return self.states.shape[0] // (2 if self.guided else 1)


class EncoderCache:
    """What the encoder made of prompts, by their ids: drawn again with other settings, a prompt is not encoded again.

    Args:
        limit: prompts that are kept, the latest; each takes T x d_model numbers.
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self.encoded = 0
        """Prompts that went through the encoder so far."""
        self._states: dict[tuple[bytes, bytes], Tensor] = {}

    def __call__(self, encoder: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        """`encoder(ids, mask)`, [R, T, D], running it over the rows alone that are not known, each once."""
        rows = zip(ids.cpu().numpy(), mask.flatten(1).cpu().numpy(), strict=True)
        keys = [(row.tobytes(), shown.tobytes()) for row, shown in rows]
        missing = {key: row for row, key in enumerate(keys) if key not in self._states}
        if missing:
            chosen = torch.tensor(list(missing.values()), device=ids.device)
            states = encoder(ids[chosen], mask[chosen])
            self.encoded += len(missing)
            self._states |= dict(zip(missing, states, strict=True))
        result = torch.stack([self._states[key] for key in keys])
        while len(self._states) > self.limit:
            self._states.pop(next(iter(self._states)))
        return result


def encode_prompts(
    model: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    input_ids_uncond: Tensor | None,
    attention_mask_uncond: Tensor | None,
    condition_scale: float,
    cache: EncoderCache | None = None,
) -> Prompts:
    """Run the encoder once over all prompts, conditional and (if the scale is not 1) unconditional.

    Args:
        cache: of earlier calls with the same model.

    Raises:
        ValueError: no prompt, ids that the model does not know, a mask of another shape, super conditioning without an
            unconditional prompt, or one of another shape.
    """
    guided = condition_scale != 1
    vocabulary = model.config.encoder_vocab_size
    attention_mask = _checked_mask("", input_ids, attention_mask, vocabulary)
    if guided:
        if input_ids_uncond is None:
            raise ValueError(
                f"condition_scale={condition_scale} needs input_ids_uncond, the empty prompt (DalleBartProcessor "
                "gives both); without it pass condition_scale=1"
            )
        if input_ids_uncond.shape not in (input_ids.shape, (1, input_ids.shape[1])):
            raise ValueError(
                f"input_ids_uncond has shape {tuple(input_ids_uncond.shape)}, input_ids {tuple(input_ids.shape)}: "
                "they must be equal, or the first has one row"
            )
        attention_mask_uncond = _checked_mask("_uncond", input_ids_uncond, attention_mask_uncond, vocabulary)
        input_ids = torch.cat([input_ids, input_ids_uncond.expand_as(input_ids)])
        attention_mask = torch.cat([attention_mask, attention_mask_uncond.expand_as(attention_mask)])
    if input_ids.device.type == "cpu" and model.config.sinkhorn_iters == 1:
        # Padding that no row needs is hidden from every query, so leaving it out changes nothing but the work.
        # (Sinkhorn normalises over padded queries too, so there it would.)
        longest = int((attention_mask != 0).any(dim=0).nonzero().max()) + 1 if attention_mask.any() else 1
        input_ids, attention_mask = input_ids[:, :longest], attention_mask[:, :longest]
    mask = model.text_mask(input_ids, attention_mask)
    states = model.encoder(input_ids, mask) if cache is None else cache(model.encoder, input_ids, mask)
    return Prompts(states, mask, guided)


def _checked_mask(suffix: str, ids: Tensor, mask: Tensor | None, vocabulary: int) -> Tensor:
    """The mask of token ids [P, T]; all ones where there is none. Values are looked at on the CPU only."""
    if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point():
        raise ValueError(
            f"input_ids{suffix} is {ids.dtype} of shape {list(ids.shape)}; it must be integers [prompts, tokens]"
        )
    if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"input_ids{suffix} reach from {int(ids.min())} to {int(ids.max())}; "
            f"the model knows tokens from 0 to {vocabulary - 1}"
        )
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask{suffix} has shape {list(mask.shape)}; it must be {list(ids.shape)}, as input_ids{suffix}"
        )
    return torch.ones_like(ids) if mask is None else mask


def given_tokens(
    config: "DalleBartConfig", prefix: Tensor | None, forced_tokens: Tensor | None, pictures: int
) -> Tensor | None:
    """Tokens that are not to be drawn, int64 [1 or pictures, L] with -1 for those that are; None: all are drawn.

    Raises:
        ValueError: both kinds given, a wrong shape, or a token that the decoder does not know.
    """
    if prefix is not None and forced_tokens is not None:
        raise ValueError("give prefix or forced_tokens, not both")
    length = config.image_length
    if prefix is not None:
        if prefix.ndim != 2 or prefix.shape[1] > length or prefix.is_floating_point():
            raise ValueError(
                f"prefix is {prefix.dtype} of shape {list(prefix.shape)}; "
                f"it must be integers [pictures, at most {length}]"
            )
        if prefix.numel() and int(prefix.min()) < 0:
            raise ValueError(f"prefix holds {int(prefix.min())}; tokens begin at 0")
        forced_tokens = torch.nn.functional.pad(prefix, (0, length - prefix.shape[1]), value=-1)
    if forced_tokens is None:
        return None
    if forced_tokens.ndim != 2 or forced_tokens.shape[0] not in (1, pictures) or forced_tokens.shape[1] != length:
        raise ValueError(
            f"given tokens have shape {tuple(forced_tokens.shape)}; they must be [1 or {pictures}, {length}]"
        )
    if int(forced_tokens.max()) >= config.decoder_vocab_size or int(forced_tokens.min()) < -1:
        raise ValueError(
            f"given tokens reach from {int(forced_tokens.min())} to {int(forced_tokens.max())}; "
            f"they must lie in [0, {config.decoder_vocab_size - 1}]"
        )
    return forced_tokens


def uniform_noise(generator: Generators, pictures: int, length: int) -> Tensor:
    """One uniform number a token, float32 [pictures, length] on the CPU; row i depends on generator i alone.

    Raises:
        ValueError: another number of generators than pictures.
    """
    if generator is None or isinstance(generator, torch.Generator):
        seeds = torch.randint(2**62, (pictures,), generator=generator).tolist()
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    if len(generator) != pictures:
        raise ValueError(
            f"{len(generator)} generators were given for {pictures} pictures: give one each, or a single one"
        )
    return torch.stack([torch.rand(length, generator=one) for one in generator])
