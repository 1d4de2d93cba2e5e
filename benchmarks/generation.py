"""Drawing image tokens at DALL·E Mini's size: ours, min-dalle, and transformers' BART with guidance by batch.

    python -m benchmarks.generation                      # 64 tokens in the middle of a picture, 1 and 4 pictures
    python -m benchmarks.generation --whole              # all 256 tokens instead
    python -m benchmarks.generation --only ours          # peak memory of one system in a process of its own

Random weights, float32, CPU, super conditioning of 10, top-k 256. Every system draws from a prompt of 64 token slots,
20 of them filled. The runs are interleaved in one process: system A, B, C, A, B, C. Times are CPU seconds, so other
work on the machine counts little, over as many threads as `--threads` says. min-dalle is installed by
`pip install 'dalle-torch[bench]'`; transformers' BART has the same decoder weights (two feed-forward matrices of 4095
instead of three of 2730) and, like ours, is run as its users would: cached, conditional and unconditional rows in one
batch.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SCALE, TOP_K, FILLED, SLOTS = 10.0, 256, 20, 64
LAYERS, WIDTH, HEADS, GLU, TEXT_VOCAB, IMAGE_VOCAB, LENGTH = 12, 1024, 16, 2730, 50264, 16384, 256
SYSTEMS = ("ours", "ours int8", "min-dalle", "transformers")
Step = Callable[[int], None]


def ours(pictures: int, quantize: str | None = None) -> Callable[[int], Step]:
    """Our model, packed for drawing as the pipeline does."""
    import torch

    from dalle_torch.models.configuration import DalleBartConfig
    from dalle_torch.models.dalle_bart import DalleBart
    from dalle_torch.models.generation import DrawingSession, encode_prompts
    from dalle_torch.models.packing import pack_for_drawing
    from dalle_torch.models.sampling import SamplingOptions

    config = DalleBartConfig(
        encoder_layers=LAYERS, decoder_layers=LAYERS, d_model=WIDTH, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=GLU, decoder_ffn_dim=GLU, encoder_vocab_size=TEXT_VOCAB,
        image_vocab_size=IMAGE_VOCAB, use_glu=True,
    )  # fmt: skip
    model = pack_for_drawing(DalleBart(config).eval(), quantize)
    ids, mask = _prompt(torch)
    options = SamplingOptions(top_k=TOP_K, condition_scale=SCALE)

    def start(_: int) -> Step:
        prompts = encode_prompts(model, ids[:1], mask[:1], ids[1:], mask[1:], SCALE)
        uniform = torch.rand(pictures, LENGTH)
        return DrawingSession(model, prompts, pictures, options, max_token=IMAGE_VOCAB, uniform=uniform).step

    return start


def min_dalle(pictures: int) -> Callable[[int], Step]:
    """min-dalle's own modules in the order of its `generate_raw_image_stream`."""
    import torch
    from min_dalle.models import DalleBartDecoder, DalleBartEncoder

    shared = {"embed_count": WIDTH, "attention_head_count": HEADS, "glu_embed_count": GLU, "layer_count": LAYERS}
    encoder = DalleBartEncoder(**shared, text_vocab_count=TEXT_VOCAB, text_token_count=SLOTS, device="cpu").eval()
    decoder = DalleBartDecoder(**shared, image_vocab_count=IMAGE_VOCAB, device="cpu").eval()
    ids, _ = _prompt(torch)
    both = torch.cat([ids[1:], ids[:1]])
    settings = torch.tensor([1.0, TOP_K, SCALE])

    def start(_: int) -> Step:
        rows = [0] * pictures + [1] * pictures
        text, states = both[rows], encoder(both)[rows]
        text_mask = text.not_equal(1)[:, None, None, :]
        memory = torch.zeros(LAYERS, pictures * 4, LENGTH, WIDTH)
        tokens = torch.zeros(pictures, 1, dtype=torch.long)
        positions = torch.arange(LENGTH)

        def step(position: int) -> None:
            nonlocal memory
            chosen, memory = decoder.sample_tokens(
                settings=settings, attention_mask=text_mask, encoder_state=states, attention_state=memory,
                prev_tokens=tokens, token_index=positions[[position]],
            )  # fmt: skip
            tokens[:, 0] = chosen

        return step

    return start


def transformers_bart(pictures: int) -> Callable[[int], Step]:
    """`BartForConditionalGeneration` with a static cache of the whole length and guidance by doubling the batch."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    config = BartConfig(
        vocab_size=IMAGE_VOCAB + 1, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=GLU * 3 // 2,
        decoder_ffn_dim=GLU * 3 // 2, max_position_embeddings=LENGTH, attn_implementation="sdpa",
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    ids, mask = _prompt(torch)
    ids = ids % (IMAGE_VOCAB + 1)

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


MAKERS: dict[str, Callable[[int], Callable[[int], Step]]] = {
    "ours": ours,
    "ours int8": lambda pictures: ours(pictures, "int8"),
    "min-dalle": min_dalle,
    "transformers": transformers_bart,
}


def _prompt(torch: Any) -> tuple[Any, Any]:
    """Token ids and mask of a prompt and of the empty prompt, each [2, SLOTS]."""
    ids = torch.ones(2, SLOTS, dtype=torch.long)
    ids[0, :FILLED] = torch.arange(FILLED) + 10
    ids[1, :2] = torch.tensor([0, 2])
    return ids, (ids != 1).long()


def run_once(start: Callable[[int], Step], first: int, tokens: int) -> float:
    """CPU seconds a token of drawing `tokens` tokens from position `first` on; the encoder is not counted."""
    step = start(first)
    step(first)
    begun = time.process_time()
    for position in range(first + 1, first + tokens):
        step(position)
    return (time.process_time() - begun) / (tokens - 1)


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Interleaved runs of every system for each number of pictures."""
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    first, tokens = (0, LENGTH) if arguments.whole else ((LENGTH - arguments.tokens) // 2, arguments.tokens)
    rows = []
    floor = weight_reading_floor(torch)
    for pictures in arguments.pictures:
        with torch.inference_mode():
            starts = {name: MAKERS[name](pictures) for name in arguments.systems}
            times: dict[str, list[float]] = {name: [] for name in starts}
            for _ in range(arguments.rounds):
                for name, start in starts.items():
                    times[name].append(run_once(start, first, tokens))
                    print(f"{pictures} pictures, {name}: {times[name][-1]:.4f} s/token", file=sys.stderr, flush=True)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            rows.append({
                "pictures": pictures, "system": name, "seconds_a_token": median, "times_floor": median / floor,
                "seconds_a_picture": median * LENGTH / pictures, "spread": [min(seconds), max(seconds)],
            })  # fmt: skip
    return rows


def weight_reading_floor(torch: Any) -> float:
    """Seconds to read the decoder's and `lm_head`'s float32 weights once, at the rate of a matrix-vector product."""
    weights = [torch.randn(4096, WIDTH) for _ in range(16)]
    vector = torch.randn(WIDTH)
    seconds = []
    for _ in range(7):
        begun = time.process_time()
        for weight in weights:
            weight.mv(vector)
        seconds.append(time.process_time() - begun)
    numbers = LAYERS * (8 * WIDTH**2 + 3 * WIDTH * GLU) + WIDTH * (IMAGE_VOCAB + 1) - LAYERS * 2 * WIDTH**2
    return statistics.median(seconds) * numbers / (len(weights) * weights[0].numel())


def peak_memory(system: str, pictures: int, threads: int) -> float:
    """Peak resident GB of a fresh process that draws 16 tokens with `system`."""
    command = [sys.executable, "-m", "benchmarks.generation", "--only", system, "--pictures", str(pictures)]
    out = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])["peak_gb"]


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table, with how many times faster each system is than the two peers."""
    by_key = {(row["pictures"], row["system"]): row["seconds_a_token"] for row in rows}
    print(f"{'pictures':>8} {'system':<13} {'s/token':>8} {'s/picture':>9} {'x floor':>7} {'vs min-dalle':>12} "
          f"{'vs transformers':>15} {'peak GB':>8}")  # fmt: skip
    for row in rows:
        ratios = [
            f"{by_key[row['pictures'], peer] / row['seconds_a_token']:.2f}x"
            if (row["pictures"], peer) in by_key
            else "-"
            for peer in ("min-dalle", "transformers")
        ]
        memory = f"{row['peak_gb']:.2f}" if "peak_gb" in row else "-"
        times = f"{row['seconds_a_token']:>8.4f} {row['seconds_a_picture']:>9.1f} {row['times_floor']:>7.2f}"
        print(f"{row['pictures']:>8} {row['system']:<13} {times} {ratios[0]:>12} {ratios[1]:>15} {memory:>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 4], help="pictures drawn at once")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--tokens", type=int, default=64, help="tokens drawn in the middle of a picture")
    parser.add_argument("--whole", action="store_true", help="draw all tokens of a picture")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system; the median is shown")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of each system")
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--only", choices=SYSTEMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["USE_TORCH_XLA"] = "0"
    if arguments.only:
        arguments.systems, arguments.rounds, arguments.tokens = [arguments.only], 1, 16
        compare(arguments)
        print(json.dumps({"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
        return
    rows = compare(arguments)
    if not arguments.no_memory:
        for row in rows:
            row["peak_gb"] = peak_memory(row["system"], row["pictures"], arguments.threads)
    report(rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
