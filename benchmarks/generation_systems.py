"""The systems that `benchmarks.generation` compares: how each is made, saved, loaded by its users, and drawn with.

All hold the same weights: an encoder of 12 layers over a text vocabulary of 50264, a decoder of 12 layers, `lm_head`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SCALE, TOP_K, FILLED, SLOTS = 10.0, 256, 20, 64
LAYERS, WIDTH, HEADS, GLU, TEXT_VOCAB, IMAGE_VOCAB, LENGTH = 12, 1024, 16, 2730, 50264, 16384, 256
Step = Callable[[int], None]
Start = Callable[[int], Step]


@dataclass(frozen=True)
class System:
    """One implementation.

    Attributes:
        build: the model with random weights.
        save: writes it as its checkpoints are written.
        load: reads that as its users do.
        drawing: (model, pictures) -> a function from the first position to the step that draws one position.
    """

    build: Callable[[], Any]
    save: Callable[[Any, Path], None]
    load: Callable[[Path], Any]
    drawing: Callable[[Any, int], Start]


def prompt() -> tuple[Tensor, Tensor]:
    """Token ids and mask of a prompt and of the empty prompt, each [2, SLOTS]."""
    ids = torch.ones(2, SLOTS, dtype=torch.long)
    ids[0, :FILLED] = torch.arange(FILLED) + 10
    ids[1, :2] = torch.tensor([0, 2])
    return ids, (ids != 1).long()


def ours(quantize: str | None = None) -> System:
    """Our model, packed for drawing as the pipeline does."""
    from dalle_torch.models.configuration import DalleBartConfig
    from dalle_torch.models.dalle_bart import DalleBart
    from dalle_torch.models.drawing_inputs import encode_prompts
    from dalle_torch.models.generation import DrawingSession
    from dalle_torch.models.packing import pack_for_drawing
    from dalle_torch.models.sampling import SamplingOptions

    config = DalleBartConfig(
        encoder_layers=LAYERS, decoder_layers=LAYERS, d_model=WIDTH, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=GLU, decoder_ffn_dim=GLU, encoder_vocab_size=TEXT_VOCAB,
        image_vocab_size=IMAGE_VOCAB, use_glu=True,
    )  # fmt: skip
    ids, mask = prompt()
    options = SamplingOptions(top_k=TOP_K, condition_scale=SCALE)

    def drawing(model: Any, pictures: int) -> Start:
        model = pack_for_drawing(model, quantize)

        def start(_: int) -> Step:
            prompts = encode_prompts(model, ids[:1], mask[:1], ids[1:], mask[1:], SCALE)
            uniform = torch.rand(pictures, LENGTH)
            return DrawingSession(model, prompts, pictures, options, max_token=IMAGE_VOCAB, uniform=uniform).step

        return start

    return System(
        lambda: DalleBart(config).eval(),
        lambda model, folder: model.save_pretrained(folder),
        lambda folder: DalleBart.from_pretrained(folder).eval(),
        drawing,
    )


def min_dalle() -> System:
    """min-dalle's own modules in the order of its `generate_raw_image_stream`, loaded as its `init_decoder` does."""
    from min_dalle.models import DalleBartDecoder, DalleBartEncoder

    shared = {"embed_count": WIDTH, "attention_head_count": HEADS, "glu_embed_count": GLU, "layer_count": LAYERS}
    ids, _ = prompt()
    both = torch.cat([ids[1:], ids[:1]])
    settings = torch.tensor([1.0, TOP_K, SCALE])

    def encoder() -> nn.Module:
        return DalleBartEncoder(**shared, text_vocab_count=TEXT_VOCAB, text_token_count=SLOTS, device="cpu").eval()

    def decoder() -> nn.Module:
        return DalleBartDecoder(**shared, image_vocab_count=IMAGE_VOCAB, device="cpu").eval()

    def save(models: tuple[nn.Module, nn.Module], folder: Path) -> None:
        folder.mkdir()
        for name, model in zip(("encoder.pt", "decoder.pt"), models, strict=True):
            torch.save(model.state_dict(), folder / name)

    def load(folder: Path) -> tuple[nn.Module, nn.Module]:
        loaded = []
        for name, make in (("encoder.pt", encoder), ("decoder.pt", decoder)):
            model = make()
            params = torch.load(folder / name)
            model.load_state_dict(params, strict=False)
            del params
            loaded.append(model)
        return loaded[0], loaded[1]

    def drawing(models: tuple[nn.Module, nn.Module], pictures: int) -> Start:
        reader, writer = models

        def start(_: int) -> Step:
            rows = [0] * pictures + [1] * pictures
            text, states = both[rows], reader(both)[rows]
            text_mask = text.not_equal(1)[:, None, None, :]
            memory = torch.zeros(LAYERS, pictures * 4, LENGTH, WIDTH)
            tokens = torch.zeros(pictures, 1, dtype=torch.long)
            positions = torch.arange(LENGTH)

            def step(position: int) -> None:
                nonlocal memory
                chosen, memory = writer.sample_tokens(
                    settings=settings, attention_mask=text_mask, encoder_state=states, attention_state=memory,
                    prev_tokens=tokens, token_index=positions[[position]],
                )  # fmt: skip
                tokens[:, 0] = chosen

            return step

        return start

    return System(lambda: (encoder(), decoder()), save, load, drawing)


def transformers_bart() -> System:
    """`BartForConditionalGeneration` with its cache and guidance by doubling the batch.

    Its two feed-forward matrices of 4095 hold as much as three of 2730.
    """
    from transformers import BartConfig, BartForConditionalGeneration
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    config = BartConfig(
        vocab_size=IMAGE_VOCAB + 1, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=GLU * 3 // 2,
        decoder_ffn_dim=GLU * 3 // 2, max_position_embeddings=LENGTH, attn_implementation="sdpa",
        tie_word_embeddings=False,
    )  # fmt: skip
    ids, mask = prompt()

    class TwoVocabularies(BartForConditionalGeneration):
        """BART knows one; a model that reads text and writes image tokens needs two."""

        def __init__(self, config: BartConfig) -> None:
            super().__init__(config)
            self.model.encoder.embed_tokens = nn.Embedding(TEXT_VOCAB, WIDTH)

    def drawing(model: Any, pictures: int) -> Start:
        def start(first: int) -> Step:
            rows = [0] * pictures + [1] * pictures
            encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
            encoded.last_hidden_state = encoded.last_hidden_state[rows]
            text_mask = mask[rows]
            cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
            tokens = torch.zeros(2 * pictures, 1, dtype=torch.long)
            if first:
                model(
                    attention_mask=text_mask, encoder_outputs=encoded, past_key_values=cache,
                    decoder_input_ids=torch.zeros(2 * pictures, first, dtype=torch.long),
                )  # fmt: skip

            def step(_: int) -> None:
                logits = model(
                    attention_mask=text_mask, encoder_outputs=encoded, past_key_values=cache, decoder_input_ids=tokens
                ).logits[:, -1]
                conditional, unconditional = logits.chunk(2)
                guided = unconditional + SCALE * (conditional - unconditional)
                best = guided.topk(TOP_K)
                chosen = best.indices.gather(1, torch.multinomial(best.values.softmax(-1), 1))
                tokens[:] = chosen.repeat(2, 1)

            return step

        return start

    return System(
        lambda: TwoVocabularies(config).eval(),
        lambda model, folder: model.save_pretrained(folder),
        lambda folder: TwoVocabularies.from_pretrained(folder).eval(),
        drawing,
    )


SYSTEMS: dict[str, Callable[[], System]] = {
    "ours": ours,
    "ours int8": lambda: ours("int8"),
    "min-dalle": min_dalle,
    "transformers": transformers_bart,
}
