"""The texts that `data.name` can name. To add one, write a function that opens it and a row in SOURCES."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rope_lm.data import datasets, enwik8, files, probes, stdlib
from rope_lm.data.documents import Corpus, Request
from rope_lm.refusal import Refusal, unknown


class Source(NamedTuple):
    """A kind of text."""

    form: str  # of `data.name`
    open: Callable[[Request], Corpus | Mapping[str, probes.Probe]]  # text to tokenize, or rows of tokens by split
    divisible: bool = False  # True if `data.split` and `data.field` apply


SOURCES = {
    "stdlib": Source("stdlib", stdlib.corpus),
    "enwik8": Source("enwik8", enwik8.corpus),
    "text": Source("text:PATH", files.corpus),
    "tfds": Source("tfds:NAME", datasets.corpus, divisible=True),
    "probe": Source("probe:NAME", probes.splits),
}


def open_source(request: Request) -> Corpus | Mapping[str, probes.Probe]:
    """Return the text that a config's `data` section names, or a probe's rows by split.

    Raises Refusal for an unknown name, for a `split` or `field` that does not apply, and for a text that cannot be
    used.
    """
    source = SOURCES.get(request.name.partition(":")[0])
    if source is None or not (request.name == source.form or (":" in source.form and request.argument)):
        raise unknown("data", request.name, [row.form for row in SOURCES.values()])
    if (request.split or request.field) and not source.divisible:
        raise Refusal(
            f"data.split={request.split!r}, data.field={request.field!r}: only data="
            f"{' or '.join(row.form for row in SOURCES.values() if row.divisible)} has them; leave both empty"
        )
    return source.open(request)
