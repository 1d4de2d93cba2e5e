"""Drawing image tokens: encode prompts once, then one decoder step of fixed shape a token.

Shapes: P prompts, N pictures a prompt, L = image_length tokens a picture, V = image_vocab_size + 1.
Owns: the loop, its caches' life, randomness. Does not own: how a token is chosen (`sampling`), pictures (`vqgan`).
Super conditioning follows `DalleBart.generate` of borisdayma/dalle-mini, with both prompts in one batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from dalle_torch.models.sampling import SamplingOptions, choose, forbid, super_condition

if TYPE_CHECKING:
    from dalle_torch.models.configuration import DalleBartConfig
    from dalle_torch.models.dalle_bart import DecoderCache

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


class NonFiniteLogitsError(ValueError):
    """The model's logits are NaN or infinite, so there is nothing to draw."""


@dataclass
class _Prompts:
    """Encoded prompts; with super conditioning the P conditional ones, then the P unconditional ones."""

    states: Tensor
    mask: Tensor
    guided: bool

    @property
    def count(self) -> int:
        return self.states.shape[0] // (2 if self.guided else 1)


class ImageTokenGeneration:
    """`generate` and `generate_stream` for a `DalleBart`."""

    config: Any

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        input_ids_uncond: Tensor | None = None,
        attention_mask_uncond: Tensor | None = None,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        condition_scale: float = 10.0,
        images_per_prompt: int = 1,
        num_beams: int = 1,
        generator: Generators = None,
        prefix: Tensor | None = None,
        forced_tokens: Tensor | None = None,
        max_token: int | None = None,
        stream: Callable[[Tensor], None] | None = None,
        stream_every: int = 1,
        compile: bool = False,
        after_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Draw `images_per_prompt` pictures for each prompt.

        Args:
            input_ids: int64 [P, T], with `attention_mask` [P, T].
            input_ids_uncond: the empty prompt, [P, T] or [1, T], with its mask; needed unless `condition_scale` is 1.
            do_sample: False, or `temperature=0`: always the most likely token.
            temperature, top_k, top_p, condition_scale: see `sampling.SamplingOptions`.
            images_per_prompt: N.
            num_beams: more than 1: beam search, only with `do_sample=False`, `condition_scale=1` and one picture.
            generator: one CPU generator a picture (P * N of them, a prompt's pictures side by side), so that a
                picture is the same alone and in any batch; or a single one, from which each picture's is seeded.
            prefix: image tokens [1 or P * N, n] that the pictures begin with.
            forced_tokens: int64 [1 or P * N, L]: tokens that are given, -1 where one is to be drawn.
            max_token: ids from it up are never drawn.
            stream: called with the tokens so far, [P * N, n + 1], after every `stream_every` tokens.
            compile: run the step through `torch.compile` (CUDA graphs on a GPU).
            after_step: called after each step; where work is recorded lazily (torch_xla) it has to flush it.

        Returns:
            int64 [P * N, L + 1]; the first column is the start token.

        Raises:
            ValueError: an option is out of range or contradicts another; `NonFiniteLogitsError` for NaN logits.
        """
        if num_beams > 1:
            from dalle_torch.models.beam_search import beam_search

            if do_sample or condition_scale != 1 or images_per_prompt != 1:
                raise ValueError(
                    f"num_beams={num_beams} needs do_sample=False, condition_scale=1 and images_per_prompt=1 "
                    f"(got {do_sample}, {condition_scale}, {images_per_prompt})"
                )
            if any(option is not None for option in (prefix, forced_tokens, stream)):
                raise ValueError(f"num_beams={num_beams} works without prefix, forced_tokens and stream")
            return beam_search(self, input_ids, attention_mask, num_beams, max_token)
        tokens = None
        for tokens in self.generate_stream(
            input_ids,
            attention_mask,
            input_ids_uncond=input_ids_uncond,
            attention_mask_uncond=attention_mask_uncond,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            condition_scale=condition_scale,
            images_per_prompt=images_per_prompt,
            generator=generator,
            prefix=prefix,
            forced_tokens=forced_tokens,
            max_token=max_token,
            every=self.config.image_length if stream is None else stream_every,
            compile=compile,
            after_step=after_step,
        ):
            if stream is not None:
                stream(tokens)
        return tokens

    @torch.no_grad()
    def generate_stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        input_ids_uncond: Tensor | None = None,
        attention_mask_uncond: Tensor | None = None,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        condition_scale: float = 10.0,
        images_per_prompt: int = 1,
        generator: Generators = None,
        prefix: Tensor | None = None,
        forced_tokens: Tensor | None = None,
        max_token: int | None = None,
        every: int = 32,
        compile: bool = False,
        after_step: Callable[[], None] | None = None,
    ) -> Iterator[Tensor]:
        """As `generate`, yielding the tokens so far, int64 [P * N, n + 1], every `every` tokens and at the end."""
        options = SamplingOptions(
            do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, condition_scale=condition_scale
        )
        choices = self.config.decoder_vocab_size if max_token is None else max_token
        options.check_vocabulary(choices)
        if images_per_prompt < 1 or every < 1 or choices < 1:
            raise ValueError(
                f"images_per_prompt={images_per_prompt}, every={every}, max_token={max_token}: each must be at least 1"
            )
        prompts = encode_prompts(
            self, input_ids, attention_mask, input_ids_uncond, attention_mask_uncond, condition_scale
        )
        pictures = prompts.count * images_per_prompt
        length, device = self.config.image_length, input_ids.device
        given = given_tokens(self.config, prefix, forced_tokens, pictures, device)
        uniform = None if options.greedy else uniform_noise(generator, pictures, length).to(device)
        session = DrawingSession(self, prompts, images_per_prompt, options, max_token, compile)
        yield from session.run(given, uniform, every, after_step)


class DrawingSession:
    """The state of one batch of pictures while it is drawn."""

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: _Prompts,
        images_per_prompt: int,
        options: SamplingOptions,
        max_token: int | None,
        compile: bool,
    ) -> None:
        self.model, self.options, self.guided = model, options, prompts.guided
        self.forbidden = (model.config.eos_token_id,)
        self.max_token = max_token
        self.length = model.config.image_length
        self.pictures = prompts.count * images_per_prompt
        self.device = prompts.states.device
        self.cache: DecoderCache = model.decoder.make_cache(prompts.states, prompts.mask, images_per_prompt)
        # Where shapes are free (eager CPU) a step attends to what is there; elsewhere every step has the same shapes.
        self.static = compile or self.device.type != "cpu"
        self.step = self._step
        if compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self.step = torch.compile(self._step, mode=mode, fullgraph=True, dynamic=False)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)

    def run(
        self, given: Tensor | None, uniform: Tensor | None, every: int, after_step: Callable[[], None] | None
    ) -> Iterator[Tensor]:
        """Draw all tokens; yields what there is, [P * N, n + 1], every `every` tokens and at the end."""
        tokens = torch.full(
            (self.pictures, self.length + 1), self.model.config.decoder_start_token_id, device=self.device
        )
        first = self._prefill(tokens, given)
        if uniform is None:
            uniform = torch.zeros(self.pictures, self.length, device=self.device)
        if given is None:
            given = torch.full((1, self.length), -1, device=self.device)
        for n in range(first, self.length):
            position = torch.tensor([n], device=self.device) if self.static else n
            column = tokens[:, n].clone()
            chosen, finite = self.step(column, position, uniform[:, n].contiguous())
            self.finite = self.finite & finite
            tokens[:, n + 1] = torch.where(given[:, n] >= 0, given[:, n], chosen)
            if after_step is not None:
                after_step()
            if (n + 1) % every == 0 and n + 1 < self.length:
                self._check_finite()
                yield tokens[:, : n + 2]
        self._check_finite()
        yield tokens

    def _prefill(self, tokens: Tensor, given: Tensor | None) -> int:
        """Put the given leading tokens in place, run the decoder over them at once; returns how many there are."""
        if given is None:
            return 0
        known = (given >= 0).all(dim=0).long().cumprod(dim=0).sum().item()
        if known:
            tokens[:, 1 : known + 1] = given[:, :known]
        if 0 < known < self.length:
            self.model.decoder(self._rows(tokens[:, :known]), cache=self.cache, position=0)
        return int(known)

    def _rows(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens, tokens]) if self.guided else tokens

    def _step(self, tokens: Tensor, position: int | Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [P * N] at `position` -> (next tokens [P * N], whether all logits were finite [])."""
        states = self.model.decoder(self._rows(tokens)[:, None], cache=self.cache, position=position)[:, -1]
        if self.guided:
            # lm_head is linear, so conditioning its input is the same and halves the largest product of a step.
            conditional, unconditional = states.float().chunk(2)
            scale = self.options.condition_scale
            states = super_condition(conditional, unconditional, scale).to(states.dtype)
        logits = self.model.lm_head(states)
        finite = logits.isfinite().all()
        logits = forbid(logits, self.max_token, *self.forbidden)
        return choose(logits, self.options, uniform), finite

    def _check_finite(self) -> None:
        if not self.finite.item():
            raise NonFiniteLogitsError(
                "the model's logits are not finite: its weights hold NaN or infinity, "
                f"or dtype {self.model.dtype} overflows (try float32 or bfloat16)"
            )


def encode_prompts(
    model: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    input_ids_uncond: Tensor | None,
    attention_mask_uncond: Tensor | None,
    condition_scale: float,
) -> _Prompts:
    """Run the encoder once over all prompts, conditional and (if the scale is not 1) unconditional.

    Raises:
        ValueError: super conditioning without an unconditional prompt, or one of another shape.
    """
    guided = condition_scale != 1
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if guided:
        if input_ids_uncond is None:
            raise ValueError(
                f"condition_scale={condition_scale} needs input_ids_uncond, the empty prompt (DalleBartProcessor "
                "gives both); without it pass condition_scale=1"
            )
        if attention_mask_uncond is None:
            attention_mask_uncond = torch.ones_like(input_ids_uncond)
        if input_ids_uncond.shape not in (input_ids.shape, (1, input_ids.shape[1])):
            raise ValueError(
                f"input_ids_uncond has shape {tuple(input_ids_uncond.shape)}, input_ids {tuple(input_ids.shape)}: "
                "they must be equal, or the first has one row"
            )
        input_ids = torch.cat([input_ids, input_ids_uncond.expand_as(input_ids)])
        attention_mask = torch.cat([attention_mask, attention_mask_uncond.expand_as(attention_mask)])
    if input_ids.device.type == "cpu" and model.config.sinkhorn_iters == 1:
        # Padding that no row needs is hidden from every query, so leaving it out changes nothing but the work.
        # (Sinkhorn normalises over padded queries too, so there it would.)
        longest = int((attention_mask != 0).any(dim=0).nonzero().max()) + 1 if attention_mask.any() else 1
        input_ids, attention_mask = input_ids[:, :longest], attention_mask[:, :longest]
    mask = model.text_mask(input_ids, attention_mask)
    return _Prompts(model.encoder(input_ids, mask), mask, guided)


def given_tokens(
    config: "DalleBartConfig", prefix: Tensor | None, forced_tokens: Tensor | None, pictures: int, device: torch.device
) -> Tensor | None:
    """Tokens that are not to be drawn, int64 [1 or pictures, L] with -1 for those that are; None: all are drawn.

    Raises:
        ValueError: both kinds given, a wrong shape, or a token that the decoder does not know.
    """
    if prefix is not None and forced_tokens is not None:
        raise ValueError("give prefix or forced_tokens, not both")
    length = config.image_length
    if prefix is not None:
        if prefix.ndim != 2 or prefix.shape[1] > length:
            raise ValueError(f"prefix has shape {tuple(prefix.shape)}; it must be [pictures, at most {length}]")
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
    return forced_tokens.to(device)


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
