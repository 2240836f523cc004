"""Text -> tokens -> batches. Nothing here knows of the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rope_lm import settings
from rope_lm.data import batches, corpora, probes, tokens
from rope_lm.data import tokenizer as tokenizers  # `make` has an argument of that name
from rope_lm.data.batches import Order
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
    train: batches.Source = field(repr=False)
    validation: np.ndarray = field(repr=False)  # int32 [R T+1], the same rows for every arm and seed
    orders: dict[int, Order] = field(default_factory=dict, repr=False)

    def batch_of(self, seed: int, step: int) -> np.ndarray:
        """int32 [B T+1]: the batch that takes the state from `step` to `step + 1`; a pure function of its arguments."""
        return self._order(seed)[step]

    def batches(self, seeds: Sequence[int], start: int, stop: int) -> Iterator[batches.Batch]:
        """The batches of steps start to stop - 1, for members of these seeds, read ahead."""
        return batches.ensemble([self._order(seed) for seed in seeds], start, stop)

    def _order(self, seed: int) -> Order:
        if seed not in self.orders:
            self.orders[seed] = Order(self.train, self.batch, seed)
        return self.orders[seed]


def make(
    name: str, tokenizer: str, length: int, batch: int, validation_rows: int, cache: str, split: str, field: str
) -> Data:
    """The data of a config: `name` is stdlib, enwik8, text:PATH, tfds:NAME or probe:NAME; `tokenizer` is bytes,
    bpe:SIZE or sentencepiece:PATH; `length` in tokens, `batch` and `validation_rows` in rows; `split` and `field` choose
    within a TFDS dataset ("" is its own splits, its only text).

    Raises Refusal for text that is not there, is no text, or is too short.
    """
    for key, value in (("length", length), ("batch", batch), ("validation_rows", validation_rows)):
        if value < 1:
            raise Refusal(f"data.{key}={value}: must be at least 1")
    if not name.startswith("tfds:") and (split or field):
        raise Refusal(f"data.split={split!r}, data.field={field!r}: only data=tfds:NAME has them; leave both empty")
    tokenizers.check(tokenizer)
    if name.startswith("probe:"):
        return _probe(name.removeprefix("probe:"), tokenizer, length, batch, validation_rows)
    folder = settings.path(cache, f"data.cache={cache}")
    corpus = corpora.open_corpus(name, split, field, folder)
    coder = tokenizers.make(tokenizer, corpus, folder)
    made = tokens.prepare(corpus, coder, folder)
    train = batches.Rows(made.splits["train"], length)
    Order(train, batch, 0)  # refuses text that is too short
    return Data(
        vocabulary=coder.vocabulary,
        length=length,
        batch=batch,
        coder=coder,
        bytes_per_token=made.bytes["validation"] / max(1, len(made.splits["validation"])),
        fingerprint={"text": corpus.fingerprint, "tokenizer": coder.fingerprint, "tokens": made.fingerprint},
        documents=made.documents,
        tokens={split: len(array) for split, array in made.splits.items()},
        train=train,
        validation=batches.spread(batches.Rows(made.splits["validation"], length), validation_rows),
    )


def _probe(name: str, tokenizer: str, length: int, batch: int, validation_rows: int) -> Data:
    if tokenizer != "bytes":
        raise Refusal(f"data.tokenizer={tokenizer}: the symbols of data=probe:{name} are bytes; leave it at bytes")
    splits = {split: probes.Probe(name, length, split) for split in corpora.SPLITS}
    coder, drawn = tokenizers.Bytes(), probes.fingerprint(splits.values())
    return Data(
        vocabulary=coder.vocabulary,
        length=length,
        batch=batch,
        coder=coder,
        bytes_per_token=1.0,
        fingerprint={"text": drawn, "tokenizer": coder.fingerprint, "tokens": drawn},
        documents={split: len(rows) for split, rows in splits.items()},
        tokens={split: len(rows) * (length + 1) for split, rows in splits.items()},
        train=splits["train"],
        validation=batches.spread(splits["validation"], validation_rows),
    )
