"""Text -> tokens -> rows -> batches. Nothing here depends on the model."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32

from rope_lm import settings
from rope_lm.data import batches, probes, tokens
from rope_lm.data import tokenizer as tokenizers  # `make` has an argument of that name
from rope_lm.data.corpora import open_source
from rope_lm.data.documents import Corpus, Request
from rope_lm.data.tokenizer import Tokenizer
from rope_lm.refusal import Refusal


@dataclass(frozen=True)
class Data:
    """A text that is ready to train on."""

    vocabulary: int
    length: int  # T, tokens
    batch: int  # B, rows
    bytes_per_token: float  # of the validation text: turns nats per token into bits per byte
    coder: Tokenizer = field(repr=False)
    fingerprint: dict[str, str]  # of the text, the tokenizer and the tokens
    documents: dict[str, int]  # by split
    tokens: dict[str, int]  # by split
    train: batches.Rows = field(repr=False)
    validation: Int32[np.ndarray, "R W"] = field(repr=False)  # W = T + 1; the same rows for every arm and seed
    validation_documents: Int32[np.ndarray, "R W"] = field(repr=False)  # number of each token's document in its split

    def batches(self, seeds: Sequence[int], start: int, stop: int) -> Generator[batches.Batch, None, None]:
        """Yield the batches of steps `start` to `stop` - 1, for members of these seeds."""
        return batches.ensemble(self.train, self.batch, seeds, start, stop)


def make(
    name: str, tokenizer: str, length: int, batch: int, validation_rows: int, cache: str, split: str, field: str
) -> Data:
    """Return the data of a config.

    `name` is stdlib, enwik8, text:PATH, tfds:NAME or probe:NAME. `tokenizer` is bytes, bpe:SIZE or sentencepiece:PATH.
    `length` is in tokens, `batch` and `validation_rows` are in rows. `split` and `field` choose within a TFDS dataset
    ("" for its own splits, its only text).

    Raises Refusal for a text that is missing, too short, or not text.
    """
    for key, value in (("length", length), ("batch", batch), ("validation_rows", validation_rows)):
        if value < 1:
            raise Refusal(f"data.{key}={value}: must be at least 1")
    tokenizers.check(tokenizer)
    request = Request(name, length, split, field, settings.folder(cache, f"data.cache={cache}"))
    source = open_source(request)
    if isinstance(source, Corpus):
        return _tokenized(source, request, tokenizer, batch, validation_rows)
    if tokenizer != "bytes":
        raise Refusal(f"data.tokenizer={tokenizer}: the symbols of data={name} are bytes; leave it at bytes")
    return _generated(source, batch, validation_rows)


def _tokenized(corpus: Corpus, request: Request, tokenizer: str, batch: int, validation_rows: int) -> Data:
    coder = tokenizers.make(tokenizer, corpus, request.cache)
    text = tokens.prepare(corpus, coder, request.cache)
    train, validation = (batches.Windows(text.splits[split], request.length) for split in ("train", "validation"))
    batches.check(train, batch)
    chosen = batches.spread(validation, validation_rows)
    return Data(
        vocabulary=coder.vocabulary,
        length=request.length,
        batch=batch,
        bytes_per_token=text.bytes["validation"] / max(1, len(validation.tokens)),
        coder=coder,
        fingerprint={"text": corpus.fingerprint, "tokenizer": coder.fingerprint, "tokens": text.fingerprint},
        documents=text.documents,
        tokens={split: len(array) for split, array in text.splits.items()},
        train=train,
        validation=validation[chosen],
        validation_documents=validation.documents(chosen, coder.separator),
    )


def _generated(splits: Mapping[str, probes.Probe], batch: int, validation_rows: int) -> Data:
    coder, drawn, train = tokenizers.Bytes(), probes.fingerprint(splits.values()), splits["train"]
    chosen = batches.spread(splits["validation"], validation_rows)
    return Data(
        vocabulary=coder.vocabulary,
        length=train.length,
        batch=batch,
        bytes_per_token=1.0,
        coder=coder,
        fingerprint={"text": drawn, "tokenizer": coder.fingerprint, "tokens": drawn},
        documents={split: len(rows) for split, rows in splits.items()},
        tokens={split: len(rows) * (train.length + 1) for split, rows in splits.items()},
        train=train,
        validation=splits["validation"][chosen],
        validation_documents=chosen.astype(np.int32)[:, None].repeat(train.length + 1, 1),
    )
