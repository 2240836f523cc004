"""The standard library of the running Python, `data=stdlib`: text that every machine has."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rope_lm.data.cache import alone
from rope_lm.data.documents import Corpus, Document, File, Request, divide, fingerprint, in_folder

LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


def files() -> list[File]:
    """Return the library's .py files by name, without tests and installed packages."""
    return in_folder(Path(sysconfig.get_paths()["stdlib"]), (".py",), LEFT_OUT.__contains__)


def corpus(request: Request) -> Corpus:
    """Return the library as documents, one per file, kept as a TFDS dataset."""
    library, folder = files(), request.cache / "tfds"
    digest = fingerprint(library)

    def examples(split: str, _: None) -> Iterator[bytes]:
        return (b"".join(document) for _, document in divide(library, split))

    def documents(split: str) -> Iterator[Document]:
        from rope_lm.data import builders  # only if there are no tokens yet

        with alone(folder / "stdlib"):
            config = builders.Text(name=digest[:16], version="1.0.0", examples=examples)
            builder = builders.prepare(builders.Stdlib, config, folder)
        yield from ([example["text"]] for example in builder.as_data_source(split=split))

    return Corpus(digest, documents)
