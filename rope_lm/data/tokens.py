"""Documents to one memory-mapped file of tokens per split, cached by fingerprint."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt16

from rope_lm.data import cache
from rope_lm.data.documents import SPLITS, Corpus, blocks
from rope_lm.data.tokenizer import Tokenizer

DTYPE = np.dtype("<u2")
HASHED = 256 * 2**20  # bytes: files up to this size are hashed when opened; of larger ones only the size is checked


class Tokens(NamedTuple):
    """The tokens of a corpus, and facts about them, by split."""

    splits: dict[str, UInt16[np.ndarray, "tokens"]]  # memory-mapped
    documents: dict[str, int]
    bytes: dict[str, int]  # of text
    fingerprint: str  # sha256 of the token files' own


def prepare(corpus: Corpus, tokenizer: Tokenizer, root: Path) -> Tokens:
    """Return the tokens of a corpus, from the cache at `root` or newly encoded. Several processes may call it at once.

    Raises Refusal if the cache cannot be written.
    """
    name = hashlib.sha256(f"{corpus.fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()[:24]
    folder = cache.prepare(root, f"tokens/{name}", _intact, lambda partial: _build(partial, corpus, tokenizer))
    facts = _facts(folder)
    return Tokens(
        splits={split: _map(folder / f"{split}.u16") for split in SPLITS},
        documents={split: facts[split]["documents"] for split in SPLITS},
        bytes={split: facts[split]["bytes"] for split in SPLITS},
        fingerprint=hashlib.sha256("".join(facts[split]["sha256"] for split in SPLITS).encode()).hexdigest(),
    )


def _map(path: Path) -> np.ndarray:
    return np.memmap(path, DTYPE, "r") if path.stat().st_size else np.zeros(0, DTYPE)


def _facts(folder: Path) -> dict[str, Any]:
    """Return the entries of meta.json by split; none if it is missing or torn."""
    try:
        return json.loads((folder / "meta.json").read_text())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _intact(folder: Path) -> bool:
    """Return True if the token files match meta.json, which is written last."""
    facts = _facts(folder)
    for split, known in facts.items():
        path = folder / f"{split}.u16"
        size = path.stat().st_size if path.exists() else -1
        if size != known["tokens"] * DTYPE.itemsize or (size <= HASHED and _sha256(path) != known["sha256"]):
            print(f"{path}: not as it was written; made again", file=sys.stderr)
            return False
    return bool(facts)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    splits = {split: _write(folder / f"{split}.u16", split, corpus, tokenizer) for split in SPLITS}
    meta = {"text": corpus.fingerprint, "tokenizer": tokenizer.fingerprint, "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))


def _write(path: Path, split: str, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    documents = size = tokens = 0
    digest, reported = hashlib.sha256(), time.monotonic()
    with open(path, "wb") as file:

        def write(encoded: np.ndarray) -> None:
            nonlocal tokens
            digest.update(encoded.tobytes())
            file.write(encoded.tobytes())
            tokens += len(encoded)

        for document in corpus.documents(split):
            for block in blocks(document):
                write(tokenizer.encode(block).astype(DTYPE, copy=False))
                size += len(block)
            write(np.array([tokenizer.separator], DTYPE))
            documents += 1
            if time.monotonic() - reported > 5:
                reported = time.monotonic()
                print(f"preparing text: {split}, {documents:,} documents, {size / 1e6:,.0f} MB", file=sys.stderr)
        file.flush()
        os.fsync(file.fileno())
    return {"documents": documents, "bytes": size, "tokens": tokens, "sha256": digest.hexdigest()}
