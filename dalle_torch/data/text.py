"""Captions to token ids in bulk, equal to what `DalleBartProcessor` makes of them one by one.

Owns: speed (the processor's own call takes several times longer), the fingerprint that says whether stored ids may be
used, padding of stored ids. Does not own: normalisation and tokens (`dalle_torch.text`).
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dalle_torch.text.processor import DalleBartProcessor


class TextEncoder:
    """Normalises, tokenises, cuts and pads captions.

    Args:
        processor: whose tokenizer, normalisation and length are taken over.
    """

    def __init__(self, processor: DalleBartProcessor) -> None:
        backend = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        # What the last call set, not what the tokenizer is.
        backend["truncation"] = backend["padding"] = None
        description = json.dumps(backend, sort_keys=True)
        self.max_length = processor.max_text_length
        self.pad_id = int(processor.tokenizer.pad_token_id)
        self.vocabulary = len(processor.tokenizer)
        """Ids are below it."""
        self.fingerprint = hashlib.sha256(
            f"{description} normalize={processor.normalizer is not None} length={self.max_length}".encode()
        ).hexdigest()
        """Equal for processors that give equal ids. Of the normalizer it knows only whether there is one."""
        self._normalizer = processor.normalizer
        self._backend_text = description
        self._backend: Tokenizer | None = None
        self.blank = self([""])[0]
        """Ids of the empty caption."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_backend": None}

    def normalize(self, caption: str) -> str:
        """A caption as the tokenizer is given it."""
        if not caption.isascii():
            caption = caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self._normalizer is not None:
            caption = self._normalizer(caption)
        return caption if caption.strip() else ""

    def __call__(self, captions: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each caption, its ends included and the padding not."""
        return self.tokenize([self.normalize(caption) for caption in captions])

    def tokenize(self, normalized: Sequence[str]) -> list[np.ndarray]:
        """As the call, of captions that `normalize` has seen."""
        if self._backend is None:
            self._backend = Tokenizer.from_str(self._backend_text)
            self._backend.enable_truncation(self.max_length)
        encodings = self._backend.encode_batch_fast(list(normalized))
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def pad(self, ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `attention_mask`, int32 and int8 [B, max_length]."""
        lengths = np.fromiter((len(row) for row in ids), dtype=np.int64, count=len(ids))
        mask = np.arange(self.max_length) < lengths[:, None]
        padded = np.full(mask.shape, self.pad_id, dtype=np.int32)
        if len(ids):
            padded[mask] = np.concatenate(ids)
        return padded, mask.astype(np.int8)
