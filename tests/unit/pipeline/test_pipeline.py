"""Promises of the pipeline: seeds, batches, continuing, tiling, streaming, codes only, parts that belong together."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_torch import DalleBartConfig, DallePipeline
from dalle_torch.pipeline.loading import check_match, load_vqgan, show_notice, weights_hash
from tests.helpers import GOLDENS
from tests.tiny_pipeline import (
    CODEBOOK,
    CODES_A_SIDE,
    save_tiny,
    tiny_model,
    tiny_pipeline,
    tiny_processor,
    tiny_vqgan,
)

# Hot enough for seeds to matter, cool enough for prompts to.
LIVELY = {"condition_scale": 3.0, "temperature": 2.0, "progress": False}
LENGTH = CODES_A_SIDE**2


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipe):
    return save_tiny(tmp_path_factory.mktemp("tiny"), pipe)


def test_pictures_come_prompt_by_prompt(pipe):
    output = pipe(["a cat", "a dog"], num_images=3, seed=7, **LIVELY)
    assert output.prompts == ["a cat"] * 3 + ["a dog"] * 3
    assert output.seeds == [7, 8, 9] * 2
    assert [image.size for image in output.images] == [(16, 16)] * 6
    assert {image.mode for image in output.images} == {"RGB"}
    assert output.tokens.shape == (6, LENGTH)
    assert output.tokens.dtype == torch.int64
    assert output.progress == 1
    assert output.withheld == [False] * 6
    assert len({tuple(row) for row in output.tokens.tolist()}) == 6, "prompts and seeds both matter"


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 4])
def test_a_picture_is_its_prompt_and_seed(pipe, batch_size):
    alone = {
        (prompt, seed): pipe(prompt, seed=seed, **LIVELY).tokens[0] for prompt in ("a cat", "b") for seed in (3, 4, 5)
    }
    together = pipe(["a cat", "b"], num_images=3, seed=3, batch_size=batch_size, **LIVELY)
    for prompt, seed, tokens in zip(together.prompts, together.seeds, together.tokens, strict=True):
        assert torch.equal(tokens, alone[prompt, seed])


def test_a_random_seed_is_told(pipe):
    first, second = (pipe("a cat", seed=None, **LIVELY) for _ in range(2))
    assert first.seeds != second.seeds
    assert torch.equal(pipe("a cat", seed=first.seeds[0], **LIVELY).tokens, first.tokens)


def test_temperature_zero_is_greedy(pipe):
    output = pipe("a cat", num_images=2, condition_scale=3.0, temperature=0, progress=False)
    assert torch.equal(output.tokens[0], output.tokens[1])
    assert torch.equal(output.tokens, pipe("a cat", num_images=2, condition_scale=3.0, top_k=1, progress=False).tokens)


def test_only_codes_are_drawn(pipe):
    # So hot that all tokens are about equally likely, the special ones too.
    tokens = pipe("a cat", num_images=64, temperature=100.0, condition_scale=1.0, progress=False).tokens
    assert tokens.unique().tolist() == list(range(CODEBOOK))


def test_the_empty_prompt_is_the_unconditional_one(pipe):
    guided, plain = (pipe("", condition_scale=scale, temperature=2.0, progress=False).tokens for scale in (10.0, 1.0))
    assert torch.equal(guided, plain)


def test_a_prefix_is_kept_and_drawn_on(pipe):
    prefix = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    output = pipe(["a", "b"], num_images=2, prefix=prefix, **LIVELY)
    assert torch.equal(output.tokens[:, :6], prefix.repeat_interleave(2, dim=0))
    assert output.settings["given_codes"] == 6
    alone = pipe("b", seed=1, prefix=prefix[1], **LIVELY)
    assert torch.equal(alone.tokens[0], output.tokens[3])


def test_the_upper_part_of_a_picture_is_kept(pipe):
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    codes = pipe.vqgan.encode(pipe.vqgan.images_to_pixels(image))
    for keep_rows, kept in ((None, CODES_A_SIDE // 2), (1, 1), (3, 3)):
        tokens = pipe("a cat", num_images=2, init_image=image, keep_rows=keep_rows, **LIVELY).tokens
        assert torch.equal(tokens[:, : kept * CODES_A_SIDE], codes[:, : kept * CODES_A_SIDE].expand(2, -1))
        assert not torch.equal(tokens[0], tokens[1])


def test_a_tiled_picture_is_larger_and_its_windows_go_on(pipe):
    output = pipe(["a cat", "b"], num_images=2, tile=(2, 3), **LIVELY)
    rows, columns = 6, 8  # two and three windows of 4 codes that overlap by 2
    assert output.tokens.shape == (4, rows * columns)
    assert (output.tokens >= 0).all()
    assert output.images[0].size == (4 * columns, 4 * rows)
    grid = output.tokens.unflatten(1, (rows, columns))
    whole = pipe.vqgan.decode(output.tokens, grid=(rows, columns))
    assert pipe.vqgan.pixels_to_images(whole)[3].tobytes() == output.images[3].tobytes()
    # The first window is the picture without tiling; every other one starts from what its neighbours drew.
    plain = pipe(["a cat", "b"], num_images=2, **LIVELY).tokens
    assert torch.equal(grid[:, :4, :4].flatten(1), plain)
    generator = torch.Generator().manual_seed(0)
    torch.rand(LENGTH, generator=generator)  # what the first window took
    forced = torch.full((1, 4, 4), -1)
    forced[:, :, :2] = grid[0, :4, 2:4]
    second = pipe.model.generate(
        **pipe.processor("a cat"), forced_tokens=forced.flatten(1), generator=[generator], max_token=CODEBOOK,
        condition_scale=3.0, temperature=2.0,
    )  # fmt: skip
    assert torch.equal(second[0, 1:].view(4, 4), grid[0, :4, 2:6])
    alone = pipe("b", seed=1, tile=(2, 3), **LIVELY)
    assert torch.equal(alone.tokens[0], output.tokens[3])


def test_tiling_goes_on_from_a_picture(pipe):
    prefix = torch.arange(8)
    tokens = pipe("a", tile=(1, 2), tile_overlap=1, prefix=prefix, **LIVELY).tokens.view(4, 7)
    assert torch.equal(tokens[:2, :4].flatten(), prefix)


def test_a_stream_ends_with_the_picture_and_greys_the_rest(pipe):
    options = {name: value for name, value in LIVELY.items() if name != "progress"}
    partials = list(pipe.stream(["a cat", "b"], num_images=2, every=6, **options))
    whole = pipe(["a cat", "b"], num_images=2, **LIVELY)
    assert [round(partial.progress * LENGTH) for partial in partials] == [6, 12, 16]
    for partial in partials:
        drawn = round(partial.progress * LENGTH)
        assert torch.equal(partial.tokens[:, :drawn], whole.tokens[:, :drawn])
        assert (partial.tokens[:, drawn:] == -1).all()
    first = partials[0].images[0]
    assert first.getpixel((15, 15)) == first.getpixel((8, 4)) == (128, 128, 128)
    assert partials[-1].images[3].tobytes() == whole.images[3].tobytes()


def test_a_stream_of_batches_shows_what_waits_in_grey(pipe):
    partials = list(pipe.stream("a cat", num_images=2, every=8, batch_size=1, condition_scale=3.0))
    assert [partial.progress for partial in partials] == [0.25, 0.5, 0.75, 1]
    assert partials[1].images[1].getextrema() == ((128, 128),) * 3


def test_a_stream_refuses_at_once(pipe):
    with pytest.raises(ValueError, match="num_images=0"):
        pipe.stream("a", num_images=0)
    with pytest.raises(ValueError, match="every=0"):
        pipe.stream("a", every=0)


def test_progress_reaches_its_end(pipe):
    seen = []
    pipe(["a", "b"], num_images=2, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4 * LENGTH, 4 * LENGTH)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == 2 * LENGTH


def test_a_bar_tells_the_time_left(pipe, capsys):
    pipe("a", progress=True)
    assert "token/s" in capsys.readouterr().err
    pipe("a")
    assert capsys.readouterr().err == "", "not where stderr is no terminal"


def test_out_of_memory_halves_the_batch_and_changes_nothing(pipe, monkeypatch, caplog):
    expected = pipe(["a cat", "b"], num_images=4, **LIVELY)
    real, sizes = pipe.model.generate_stream, []

    def limited(input_ids, *args, images_per_prompt, **options):
        sizes.append(len(input_ids) * images_per_prompt)
        for number, tokens in enumerate(real(input_ids, *args, images_per_prompt=images_per_prompt, **options)):
            if sizes[-1] > 2 and number == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield tokens

    monkeypatch.setattr(pipe.model, "generate_stream", limited)
    done = []
    options = LIVELY | {"progress": lambda *state: done.append(state)}
    output = pipe(["a cat", "b"], num_images=4, batch_size=8, **options)
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert torch.equal(output.tokens, expected.tokens)
    assert done[-1] == (8 * LENGTH, 8 * LENGTH)
    assert "going on with 4" in caplog.text


def test_out_of_memory_with_one_picture_is_the_end(pipe, monkeypatch):
    def never(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(pipe.model, "generate_stream", never)
    with pytest.raises(torch.OutOfMemoryError):
        pipe("a", num_images=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_images": 0, "seed": -1}, ["num_images=0", "seed=-1"]),
        ({"num_images": 1.5}, ["num_images=1.5"]),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"seed": 2**63}, [str(2**63)]),
        ({"seed": 2**63 - 1, "num_images": 2}, [str(2**63 - 1), f"between 0 and {2**63 - 2}"]),
        ({"seed": 1.0}, ["seed=1.0"]),
        ({"init_image": "photo.png"}, ["init_image is a str"]),
        ({"top_k": CODEBOOK + 1}, [f"top_k={CODEBOOK + 1}", str(CODEBOOK)]),
        ({"top_k": -1}, ["top_k=-1"]),
        ({"top_p": 0.0}, ["top_p=0.0"]),
        ({"top_p": 1.1}, ["top_p=1.1"]),
        ({"temperature": -1.0}, ["temperature=-1.0"]),
        ({"temperature": float("nan")}, ["temperature=nan"]),
        ({"condition_scale": float("inf")}, ["condition_scale=inf"]),
        ({"keep_rows": 2}, ["keep_rows=2", "init_image"]),
        ({"keep_rows": 4, "init_image": Image.new("RGB", (9, 9))}, ["keep_rows=4"]),
        ({"prefix": torch.arange(3), "init_image": Image.new("RGB", (9, 9))}, ["prefix", "init_image"]),
        ({"prefix": torch.tensor([CODEBOOK])}, [str(CODEBOOK)]),
        ({"prefix": torch.zeros(LENGTH, dtype=torch.int64)}, ["prefix", str(LENGTH - 1)]),
        ({"prefix": torch.zeros(2)}, ["prefix", "float32"]),
        ({"prefix": torch.zeros(5, 2, dtype=torch.int64)}, ["prefix", "[5, 2]"]),
        ({"tile": (0, 2)}, ["tile=(0, 2)"]),
        ({"tile": (2, 2), "tile_overlap": 4}, ["tile_overlap=4"]),
        ({"tile_overlap": 2}, ["tile_overlap=2"]),
        ({"num_best": 1}, ["num_best=1", "rank_with"]),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(pipe, options, words):
    with pytest.raises(ValueError) as caught:
        pipe("a cat", **options)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("options", [{"progress": True}, {"rank_with": "clip"}, {"every": 1.5}, {"every": 0}], ids=str)
def test_a_stream_refuses_what_it_does_not_do(pipe, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        pipe.stream("a cat", **options)


def test_a_seed_may_be_a_number_of_numpy(pipe):
    assert torch.equal(pipe("a", seed=np.int64(3), **LIVELY).tokens, pipe("a", seed=3, **LIVELY).tokens)


def test_weights_that_are_not_numbers_are_noticed():
    pipe = tiny_pipeline()
    torch.nn.init.constant_(pipe.model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        pipe("a cat")


def test_a_safety_hook_sees_every_picture(pipe):
    def only_first(images, prompts):
        assert prompts == ["a"] * 3
        return [index == 0 for index in range(len(images))]

    output = pipe("a", num_images=3, safety=only_first, **LIVELY)
    assert output.withheld == [False, True, True]
    partials = list(pipe.stream("a", num_images=3, every=8, safety=only_first))
    assert [partial.withheld for partial in partials] == [[False, True, True]] * 2


@pytest.mark.parametrize(
    ("model", "vqgan", "words"),
    [
        ({"image_vocab_size": CODEBOOK + 65}, {}, [f"{CODEBOOK} entries", f"{CODEBOOK + 65} image tokens"]),
        ({"image_vocab_size": CODEBOOK - 1}, {}, [f"{CODEBOOK} entries", f"{CODEBOOK - 1} image tokens"]),
        ({}, {"resolution": 8 * CODES_A_SIDE}, [f"{4 * LENGTH} codes", f"draws {LENGTH}"]),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(model, vqgan, words):
    with pytest.raises(ValueError) as caught:
        DallePipeline(tiny_model(**model), tiny_processor(), tiny_vqgan(**vqgan))
    assert all(word in str(caught.value) for word in words)


def test_special_tokens_beyond_the_codebook_are_normal():
    check_match(tiny_model(image_vocab_size=CODEBOOK), tiny_vqgan())
    check_match(tiny_model(image_vocab_size=CODEBOOK + 64), tiny_vqgan())


def test_a_saved_pipeline_draws_the_same(pipe, folder):
    loaded = DallePipeline.from_pretrained(folder)
    expected, drawn = (one(["a cat", "b"], num_images=2, **LIVELY) for one in (pipe, loaded))
    assert torch.equal(drawn.tokens, expected.tokens)
    assert [image.tobytes() for image in drawn.images] == [image.tobytes() for image in expected.images]
    assert drawn.settings["model"] == str(folder)
    assert loaded.model.dtype == torch.float32
    half = DallePipeline.from_pretrained(folder, dtype="bfloat16")
    assert (half.model.dtype, half.vqgan.dtype) == (torch.bfloat16, torch.float32)
    assert half("a cat", **LIVELY).tokens.shape == (1, LENGTH)


def test_packed_weights_draw_the_same(pipe, folder):
    packed = DallePipeline.from_pretrained(folder).pack()
    # Sums in another order may tip one token in thousands; none of these.
    assert torch.equal(packed("a cat", num_images=4, **LIVELY).tokens, pipe("a cat", num_images=4, **LIVELY).tokens)
    assert packed("a").settings["quantize"] is None
    with pytest.raises(ValueError, match="packed"):
        packed.pack("int8")
    small = DallePipeline.from_pretrained(folder).pack("int8")
    assert small("a cat", **LIVELY).settings["quantize"] == "int8"
    with pytest.raises(ValueError, match="float32"):
        DallePipeline.from_pretrained(folder, dtype="bfloat16").pack("int8")


def test_the_hash_tells_weights_apart(pipe, folder, tmp_path):
    first = DallePipeline.from_pretrained(folder).model_hash
    other = save_tiny(tmp_path / "other", tiny_pipeline(init_std=0.2))
    assert first.startswith("sha256:")
    assert len(first) == len("sha256:") + 64
    assert DallePipeline.from_pretrained(folder).model_hash == first
    assert DallePipeline.from_pretrained(other).model_hash != first
    assert pipe.model_hash is None
    snapshot = save_tiny(tmp_path / "models--a--b" / "snapshots" / ("0a" * 20), pipe)
    assert weights_hash(snapshot) == "commit:" + "0a" * 20


def test_a_vqgan_may_come_from_elsewhere(folder, tmp_path):
    other = tiny_vqgan(pixel_range=(-1.0, 1.0))
    other.save_pretrained(tmp_path / "vqgan")
    by_name = DallePipeline.from_pretrained(folder, tmp_path / "vqgan")
    assert by_name.vqgan.config.pixel_range == (-1.0, 1.0)
    assert DallePipeline.from_pretrained(folder, other).vqgan is other
    assert load_vqgan(folder, None, None).config.pixel_range == (0.0, 1.0)


def test_weights_of_min_dalle_draw(tmp_path):
    folder = shutil.copytree(GOLDENS / "min-dalle", tmp_path / "min-dalle")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "\u0120", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder")
             for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))}  # fmt: skip
    config = DalleBartConfig(
        encoder_vocab_size=50, image_vocab_size=40, d_model=32, use_glu=True, normalize_text=True, **sizes
    )
    vqgan = tiny_vqgan(resolution=64, n_embed=40)
    pipe = DallePipeline.from_pretrained(folder, vqgan, config=config, trust_pickle=True)
    assert pipe.processor.normalizer is not None
    output = pipe("a cat", progress=False)
    assert output.tokens.shape == (1, 256)
    assert pipe.model_hash.startswith("sha256:")
    (folder / "vocab.json").write_text(json.dumps({f"{index}": index for index in range(60)} | {"<s>": 60, "</s>": 61}))
    with pytest.raises(ValueError, match="62 tokens"):
        DallePipeline.from_pretrained(folder, vqgan, config=config, trust_pickle=True)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"device": "tpu9"}, ValueError, "tpu9"),
        ({"device": "cpu", "device_map": "cpu"}, ValueError, "device_map"),
        ({"dtype": "int4"}, ValueError, "int4"),
        ({"model": "/nowhere/at/all"}, OSError, "/nowhere/at/all"),
    ],
)
def test_loading_mistakes_are_refused(folder, options, error, word):
    with pytest.raises(error, match=word):
        DallePipeline.from_pretrained(**{"model": folder} | options)


def test_the_notice_of_the_published_models_comes_once(caplog):
    for _ in range(2):
        for source in ("dalle-mini/dalle-mega", "me/dalle-mega", "shapes", "/home/me/dalle-mini/shapes"):
            show_notice(source)
    assert caplog.text.count("research") == 1
    assert "dalle-mini/dalle-mega" in caplog.text
