"""Drawing image tokens: encode prompts once, then one decoder step of fixed shape a token.

Shapes: P prompts, N pictures a prompt, L = image_length tokens a picture, V = image_vocab_size + 1.
Owns: the loop, its caches' life. Does not own: what it starts from (`drawing_inputs`), how a token is chosen
(`sampling`), pictures (`vqgan`).
Super conditioning follows `DalleBart.generate` of borisdayma/dalle-mini, with both prompts in one batch.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle_torch.models.drawing_inputs import (
    EncoderCache,
    Generators,
    Prompts,
    encode_prompts,
    given_tokens,
    uniform_noise,
)
from dalle_torch.models.sampling import SamplingOptions, choose, forbid, super_condition

if TYPE_CHECKING:
    from dalle_torch.models.dalle_bart import DalleBart, DecoderCache


class NonFiniteLogitsError(ValueError):
    """The model's logits are NaN or infinite, so there is nothing to draw."""


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
        compile: bool | str = False,
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
            compile: run the step through `torch.compile` (CUDA graphs on a GPU), or through the backend of this name.
            after_step: called after each step; where work is recorded lazily (torch_xla) it has to flush it.

        Returns:
            int64 [P * N, L + 1]; the first column is the start token.

        Raises:
            ValueError: an option is out of range or contradicts another; `NonFiniteLogitsError` for NaN logits.
        """
        if num_beams != 1:
            from dalle_torch.models.beam_search import beam_search, refuse_with_beams

            refuse_with_beams(
                num_beams, choices=self.config.decoder_vocab_size if max_token is None else max_token,
                do_sample=do_sample, condition_scale=condition_scale, images_per_prompt=images_per_prompt,
                temperature=temperature, compile=compile, top_k=top_k, top_p=top_p, generator=generator, prefix=prefix,
                forced_tokens=forced_tokens, stream=stream, after_step=after_step,
            )  # fmt: skip
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
        compile: bool | str = False,
        after_step: Callable[[], None] | None = None,
        encoder_cache: EncoderCache | None = None,
    ) -> Iterator[Tensor]:
        """As `generate`, yielding the tokens so far, int64 [P * N, n + 1], every `every` tokens and at the end.

        What is yielded is a view of the memory that is drawn into; `clone` it to keep it.

        Args:
            encoder_cache: keeps what the encoder makes of the prompts, for further calls with the same prompts.
        """
        options = SamplingOptions(
            do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, condition_scale=condition_scale
        )
        choices = self.config.decoder_vocab_size if max_token is None else max_token
        options.check_vocabulary(choices)
        if min(images_per_prompt, every, choices) < 1:
            raise ValueError(
                f"images_per_prompt={images_per_prompt}, every={every}, max_token={max_token}: each must be at least 1"
            )
        prompts = encode_prompts(
            self, input_ids, attention_mask, input_ids_uncond, attention_mask_uncond, condition_scale, encoder_cache
        )
        pictures = prompts.count * images_per_prompt
        session = DrawingSession(
            self,  # type: ignore[arg-type]  # a mixin of DalleBart
            prompts,
            images_per_prompt,
            options,
            max_token=max_token,
            given=given_tokens(self.config, prefix, forced_tokens, pictures),
            uniform=None if options.greedy else uniform_noise(generator, pictures, self.config.image_length),
            compile=compile,
        )
        yield from session.run(every, after_step)


class DrawingSession:
    """The state of one batch of pictures while it is drawn: all of it tensors that are written in place.

    Attributes:
        tokens: int64 [P * N, L + 1], the start token first.
        finite: bool [], whether all logits so far were.
    """

    def __init__(
        self,
        model: "DalleBart",
        prompts: Prompts,
        images_per_prompt: int,
        options: SamplingOptions,
        *,
        max_token: int | None = None,
        given: Tensor | None = None,
        uniform: Tensor | None = None,
        compile: bool | str = False,
    ) -> None:
        self.model, self.options, self.guided, self.max_token = model, options, prompts.guided, max_token
        self.length, device = model.config.image_length, prompts.states.device
        self.eos_token_id = int(model.config.eos_token_id or 0)
        pictures = prompts.count * images_per_prompt
        self.cache: DecoderCache = model.decoder.make_cache(prompts.states, prompts.mask, images_per_prompt)
        self.tokens = torch.full((pictures, self.length + 1), model.config.decoder_start_token_id, device=device)
        self.given = torch.full((1, self.length), -1, device=device) if given is None else given.to(device)
        self.uniform = torch.zeros(pictures, self.length) if uniform is None else uniform
        self.uniform = self.uniform.to(device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        # Where shapes are free (eager CPU) a step attends to what is there; elsewhere every step has the same shapes.
        self.static = bool(compile) or device.type != "cpu"
        self.step = self._compiled(compile) if compile else self._step

    def run(self, every: int, after_step: Callable[[], None] | None) -> Iterator[Tensor]:
        """Draw all tokens; yields what there is, [P * N, n + 1], every `every` tokens and at the end."""
        first = self.prefill()
        position = torch.tensor([first], device=self.tokens.device)
        for n in range(first, self.length):
            if self.static:
                self.step(position)
                position += 1
            else:
                self.step(n)
            if after_step is not None:
                after_step()
            if (n + 1) % every == 0 and n + 1 < self.length:
                self.check_finite()
                yield self.tokens[:, : n + 2]
        self.check_finite()
        yield self.tokens

    def prefill(self) -> int:
        """Put the given leading tokens in place, run the decoder over them at once; returns how many there are."""
        known = int((self.given >= 0).all(dim=0).long().cumprod(dim=0).sum())
        if known:
            self.tokens[:, 1 : known + 1] = self.given[:, :known]
        if 0 < known < self.length:
            self.model.decoder(self._rows(self.tokens[:, :known]), cache=self.cache, position=0)
        return known

    def check_finite(self) -> None:
        """Raise `NonFiniteLogitsError` if any logits so far were not finite; waits for the device."""
        if not self.finite.item():
            raise NonFiniteLogitsError(
                "the model's logits are not finite: its weights hold NaN or infinity, "
                f"or dtype {self.model.dtype} overflows (try float32 or bfloat16)"
            )

    def _compiled(self, backend: bool | str) -> Callable[[int | Tensor], None]:
        cuda = self.tokens.device.type == "cuda"
        for layer in self.cache.self_attention:
            # CUDA graphs may only write to memory that stays where it is.
            torch._dynamo.mark_static_address(layer.keys)
            torch._dynamo.mark_static_address(layer.values)
        for state in (self.tokens, self.finite):
            torch._dynamo.mark_static_address(state)
        options = {"backend": backend} if isinstance(backend, str) else {"mode": "reduce-overhead" if cuda else None}
        return torch.compile(self._step, fullgraph=True, dynamic=False, **options)

    def _rows(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens, tokens]) if self.guided else tokens

    def _step(self, position: int | Tensor) -> None:
        """Draw the token after `position`: an int, or an int64 tensor [1] for a step of static shape."""
        at = torch.tensor([position]) if isinstance(position, int) else position
        last = self._rows(self.tokens.index_select(1, at))
        states = self.model.decoder(last, cache=self.cache, position=position)[:, -1]
        if self.guided:
            # lm_head is linear, so conditioning its input is the same and halves the largest product of a step.
            conditional, unconditional = states.float().chunk(2)
            states = super_condition(conditional, unconditional, self.options.condition_scale).to(states.dtype)
        logits = self.model.lm_head(states)
        self.finite.logical_and_(logits.isfinite().all())
        logits = forbid(logits, self.max_token, self.eos_token_id)
        chosen = choose(logits, self.options, self.uniform.index_select(1, at)[:, 0])
        given = self.given.index_select(1, at)[:, 0]
        self.tokens.index_copy_(1, at + 1, torch.where(given >= 0, given, chosen)[:, None])
