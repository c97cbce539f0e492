"""Bytes as the vocabulary: 256 ids, no training, nothing out of vocabulary."""

from __future__ import annotations

import numpy as np


class ByteTokenizer:
    """UTF-8 bytes as token ids 0..255."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """Text to ids: uint8 array of shape (number of UTF-8 bytes,)."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def describe(self) -> dict:
        """What a file needs to say so that the vocabulary can be checked on loading."""
        return {"name": self.name, "vocab_size": self.vocab_size}
