"""min-dalle's weights give the numbers that min-dalle computes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.convert.formats import MIN_DALLE_VQGAN
from dalle_torch.models.convert.min_dalle import min_dalle_config, read_min_dalle
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.storage import CheckpointError
from tests.helpers import GOLDENS

FOLDER = GOLDENS / "min-dalle"
TEXT_PADDING = 1

CONFIG = DalleBartConfig(
    encoder_vocab_size=50, image_vocab_size=40, max_text_length=64, image_length=256, d_model=32,
    encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=40, decoder_ffn_dim=40, use_glu=True, ln_positions="normformer", dropout=0.0,
)  # fmt: skip


def test_states_and_logits() -> None:
    model = DalleBart.from_pretrained(FOLDER, config=CONFIG, trust_pickle=True)
    expected = np.load(FOLDER / "io.npz")
    text = torch.from_numpy(expected["text_tokens"])
    with torch.no_grad():
        output = model(
            input_ids=text,
            attention_mask=(text != TEXT_PADDING).long(),
            decoder_input_ids=torch.from_numpy(expected["decoder_input_ids"]),
        )
    # float32, sums in another order.
    for found, name in ((output.encoder_last_hidden_state, "encoder_state"), (output.logits, "logits")):
        torch.testing.assert_close(found, torch.from_numpy(expected[name]), atol=1e-4, rtol=0)


def test_files_of_the_small_model_have_their_own_names(tmp_path: Path) -> None:
    for side in ("encoder", "decoder"):
        (tmp_path / f"{side}_mini.pt").symlink_to(FOLDER / f"{side}.pt")
    found = DalleBart.from_pretrained(tmp_path, config=CONFIG, trust_pickle=True).state_dict()
    expected = dict(read_min_dalle(FOLDER, CONFIG))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_other_sizes_need_a_configuration() -> None:
    with pytest.raises(CheckpointError, match=r"2 \+ 2 layers of width 32, .* pass config=DalleBartConfig"):
        DalleBart.from_pretrained(FOLDER, trust_pickle=True)


def write_shapes(folder: Path, config: DalleBartConfig) -> None:
    """min-dalle files of the right shapes whose every tensor is a single zero on the disk."""
    names = {
        "feed_forward.gate_proj": "glu.fc0", "feed_forward.up_proj": "glu.fc1", "feed_forward.down_proj": "glu.fc2",
        "feed_forward.pre_norm": "glu.ln0", "feed_forward.mid_norm": "glu.ln1", "final_norm": "final_ln",
        "self_attn_pre_norm": "pre_self_attn_layer_norm", "self_attn_post_norm": "self_attn_layer_norm",
        "cross_attn_pre_norm": "pre_encoder_attn_layer_norm", "cross_attn_post_norm": "encoder_attn_layer_norm",
        "cross_attn.": "encoder_attn.",
    }  # fmt: skip
    with torch.device("meta"):
        expected = DalleBart(config).state_dict()
    files: dict[str, dict[str, torch.Tensor]] = {"encoder": {}, "decoder": {}}
    for ours, tensor in expected.items():
        side, _, theirs = ours.partition(".") if not ours.startswith("lm_head") else ("decoder", "", ours)
        for one, other in names.items():
            theirs = theirs.replace(one, other)
        files[side][theirs] = torch.zeros(()).expand(tensor.shape)
    for side, tensors in files.items():
        torch.save(tensors, folder / f"{side}.pt")


@pytest.mark.parametrize(
    ("layers", "width", "inner", "heads", "text", "image", "special"),
    [(12, 1024, 2730, 16, 50264, 16384, 16384), (24, 2048, 4096, 32, 50272, 16415, 16385)],
    ids=["mini", "mega"],
)
def test_published_sizes_need_none(
    tmp_path: Path, layers: int, width: int, inner: int, heads: int, text: int, image: int, special: int
) -> None:
    published = DalleBartConfig(
        encoder_layers=layers, decoder_layers=layers, d_model=width, encoder_ffn_dim=inner, decoder_ffn_dim=inner,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_vocab_size=text, image_vocab_size=image,
        use_glu=True, ln_positions="normformer", normalize_text=True, dropout=0.0, decoder_start_token_id=16384,
        bos_token_id=special, pad_token_id=special, eos_token_id=special,
    )  # fmt: skip
    write_shapes(tmp_path, published)
    config = min_dalle_config(tmp_path)
    assert config.to_dict() == published.to_dict()
    with torch.device("meta"):
        expected = DalleBart(config).state_dict()
    assert {name: tensor.shape for name, tensor in read_min_dalle(tmp_path, config)} == {
        name: tensor.shape for name, tensor in expected.items()
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a file of tensors"),
        (b"not a pickle at all", "is not a file of tensors"),
        ({"embed_tokens.weight": 3}, "holds something else than tensors by name"),
        ([1, 2], "holds something else than tensors by name"),
        ({"weights": torch.ones(2)}, "holds no min-dalle weights"),
        (None, "is not a file of tensors"),
    ],
    ids=["empty", "no pickle", "numbers", "list", "other names", "truncated"],
)
def test_damaged_or_other_files(tmp_path: Path, content: object, message: str) -> None:
    for side in ("encoder", "decoder"):
        path = tmp_path / f"{side}.pt"
        if content is None:
            path.write_bytes((FOLDER / f"{side}.pt").read_bytes()[:5000])
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        DalleBart.from_pretrained(tmp_path, trust_pickle=True)
    assert "\n" not in str(error.value)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code in a pickle was run')",)


def test_code_in_a_trusted_pickle_is_not_run_all_the_same(tmp_path: Path) -> None:
    for side in ("encoder", "decoder"):
        torch.save({"x": Payload()}, tmp_path / f"{side}.pt")
    with pytest.raises(CheckpointError, match="is not a file of tensors"):
        DalleBart.from_pretrained(tmp_path, trust_pickle=True)


# --- The VQGAN: codebook and decoder ---------------------------------------------------------------------------------


class DecoderOnly(VQGAN):
    """A VQGAN that knows min-dalle's format, whatever others it has."""

    foreign_formats = (MIN_DALLE_VQGAN,)


def test_a_detoker_decodes_and_says_that_it_cannot_encode(tmp_path: Path) -> None:
    whole = VQGAN.from_pretrained(GOLDENS / "vqgan" / "flax")
    weights = {
        name.replace("quantize.embedding.", "embedding."): tensor
        for name, tensor in whole.state_dict().items()
        if not name.startswith(("encoder.", "quant_conv."))
    }
    torch.save(weights, tmp_path / "detoker.pt")
    with pytest.raises(CheckpointError, match=r"detoker\.pt\), which are pickles"):
        DecoderOnly.from_pretrained(tmp_path)
    found = DecoderOnly.from_pretrained(tmp_path, config=whole.config, trust_pickle=True)
    codes = torch.randint(whole.config.n_embed, (2, whole.config.image_length))
    assert torch.equal(found.decode(codes), whole.decode(codes))
    found.save_pretrained(tmp_path / "saved")
    for model in (found, VQGAN.from_pretrained(tmp_path / "saved")):
        assert torch.equal(model.decode(codes), whole.decode(codes))
        side = whole.config.resolution
        with pytest.raises(ValueError, match="this checkpoint has no encoder"):
            model.encode(torch.zeros(1, 3, side, side))


def test_a_detoker_is_the_published_vqgan_by_default(tmp_path: Path) -> None:
    torch.save({"embedding.weight": torch.ones(3, 2)}, tmp_path / "detoker.pt")
    with pytest.raises(CheckpointError) as error:
        DecoderOnly.from_pretrained(tmp_path, trust_pickle=True)
    assert "quantize.embedding.weight is [3, 2] instead of [16384, 256]" in str(error.value)
    assert "decoder.conv_out.weight" in str(error.value)
    assert "encoder." not in str(error.value).replace("decoder.", "")
