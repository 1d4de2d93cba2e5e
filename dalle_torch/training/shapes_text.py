"""The tokenizer of the embedded model, made from the captions of its shapes.

Owns: its vocabulary and normalisation. Does not own: captions (`shapes.drawing`), tokenizers in general (`text`).
"""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dalle_torch.text.tokenizer import DalleBartTokenizer

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def build_tokenizer(captions: Sequence[str]) -> DalleBartTokenizer:
    """Byte-level BPE in which each word of `captions` is one token and any other text falls apart into bytes.

    Case, punctuation and the spellings "center" and "grey" make no difference.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "),
            normalizers.Replace("center", "centre"),
            normalizers.Replace("grey", "gray"),
            normalizers.Strip(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return DalleBartTokenizer(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
