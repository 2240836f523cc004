"""Text to tokens and back."""

from typing import Protocol, runtime_checkable

import numpy as np

from rope_lm.refusal import unknown


@runtime_checkable
class Tokenizer(Protocol):
    """What a tokenizer is. `fingerprint` changes when any token would."""

    vocabulary: int
    separator: int  # stands after each document
    fingerprint: str

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode(self, tokens: np.ndarray) -> bytes: ...


class Bytes:
    """Every byte is a token, 256 is the separator: nothing to train, no text that cannot be encoded."""

    vocabulary = 257
    separator = 256
    fingerprint = "bytes-1"

    def encode(self, text: bytes) -> np.ndarray:
        """uint16 [len(text)]."""
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def decode(self, tokens: np.ndarray) -> bytes:
        """The bytes; separators are left out."""
        tokens = np.asarray(tokens)
        return tokens[tokens != self.separator].astype(np.uint8).tobytes()


TOKENIZERS = {"bytes": Bytes}


def make(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names. Raises Refusal for an unknown one."""
    if name not in TOKENIZERS:
        raise unknown("data.tokenizer", name, TOKENIZERS)
    return TOKENIZERS[name]()
