"""Documents to one memory-mapped file of tokens per split, kept by fingerprint."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rope_lm.data import cache
from rope_lm.data.corpora import SPLITS, Corpus
from rope_lm.data.tokenizer import Tokenizer, blocks

DTYPE = np.dtype("<u2")
HASHED = 256 * 2**20  # a file up to this many bytes is hashed whenever it is opened, a larger one has its size checked


class Tokens(NamedTuple):
    """The tokens of a corpus, by split, and what is known of them."""

    splits: dict[str, np.ndarray]  # uint16, memory-mapped
    documents: dict[str, int]
    bytes: dict[str, int]  # of text
    fingerprint: str  # sha256 over the token files' own


def prepare(corpus: Corpus, tokenizer: Tokenizer, root: Path) -> Tokens:
    """The tokens, from the cache at `root` if they are there and whole, else made. Several processes may do so at once.

    Raises Refusal when the cache cannot be written.
    """
    name = hashlib.sha256(f"{corpus.fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()[:24]
    folder = cache.prepare(root, f"tokens/{name}", _whole, lambda partial: _build(partial, corpus, tokenizer))
    meta = _meta(folder)
    splits = {split: _map(folder / f"{split}.u16") for split in SPLITS}
    sums = "".join(meta["splits"][split]["sha256"] for split in SPLITS)
    count = lambda key: {split: meta["splits"][split][key] for split in SPLITS}  # noqa: E731
    return Tokens(splits, count("documents"), count("bytes"), hashlib.sha256(sums.encode()).hexdigest())


def _map(path: Path) -> np.ndarray:
    return np.memmap(path, DTYPE, "r") if path.stat().st_size else np.zeros(0, DTYPE)


def _meta(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return None


def _whole(folder: Path) -> bool:
    """Whether the token files are there and are what meta.json, written last, says that they are."""
    meta = _meta(folder)
    if meta is None:
        return False
    for split in SPLITS:
        path, known = folder / f"{split}.u16", meta["splits"][split]
        size = path.stat().st_size if path.exists() else -1
        if size != known["tokens"] * DTYPE.itemsize or (size <= HASHED and _sha256(path) != known["sha256"]):
            print(f"{path}: not as it was written; made again", file=sys.stderr)
            return False
    return True


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    meta = {"text": corpus.fingerprint, "tokenizer": tokenizer.fingerprint, "splits": {}}
    for split in SPLITS:
        meta["splits"][split] = _write(folder / f"{split}.u16", split, corpus, tokenizer)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))


def _write(path: Path, split: str, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    documents = size = tokens = 0
    digest, said = hashlib.sha256(), time.monotonic()
    with open(path, "wb") as file:
        for document in corpus.documents(split):
            for block in blocks(document):
                encoded = tokenizer.encode(block).astype(DTYPE, copy=False)
                tokens, size = tokens + len(encoded), size + len(block)
                digest.update(encoded)
                file.write(encoded)
            end = np.array([tokenizer.separator], DTYPE)
            digest.update(end)
            file.write(end)
            tokens, documents = tokens + 1, documents + 1
            if time.monotonic() - said > 5:
                said = time.monotonic()
                print(f"preparing text: {split}, {documents:,} documents, {size / 1e6:,.0f} MB", file=sys.stderr)
        file.flush()
        os.fsync(file.fileno())
    return {"documents": documents, "bytes": size, "tokens": tokens, "sha256": digest.hexdigest()}
