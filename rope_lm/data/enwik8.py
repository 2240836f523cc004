"""The first 100,000,000 bytes of the English Wikipedia's dump of 3 March 2006, `data=enwik8`."""

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from rope_lm.data.cache import alone
from rope_lm.data.datasets import Archive
from rope_lm.data.documents import PIECE, Corpus, Document, Request, bounds

# The Hutter Prize's file, from its own page (mattmahoney.net/dc/textdata.html). The page gives the MD5 of the unpacked
# text, a1fa5ffddb56f4953e226637dabbb36a. The sha256 of the zip is the one that many projects pin, independently.
ENWIK8 = Archive(
    "http://mattmahoney.net/dc/enwik8.zip",
    36_445_475,
    "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
)


def corpus(request: Request, archive: Archive = ENWIK8) -> Corpus:
    """Return the text in `archive`, one document per split, kept as a TFDS dataset.

    The splits are those in common use: 90, 5 and 5 million bytes (Al-Rfou et al., arXiv 1808.04444; Dai et al., arXiv
    1901.02860). Reading them raises Refusal if the zip is missing and cannot be fetched, or has the wrong checksum.
    """
    folder = request.cache / "tfds"

    def examples(split: str, path: Path) -> Iterator[bytes]:
        with zipfile.ZipFile(path) as unpacked, unpacked.open(unpacked.infolist()[0]) as file:
            start, stop = bounds(unpacked.infolist()[0].file_size, split)
            file.seek(start)
            yield from (file.read(min(PIECE, stop - at)) for at in range(start, stop, PIECE))

    def documents(split: str) -> Iterator[Document]:
        from rope_lm.data import builders  # only if there are no tokens yet

        with alone(folder / "enwik8"):
            config = builders.Text(name=archive.sha256[:16], version="1.0.0", examples=examples, archive=archive)
            builder = builders.prepare(builders.Enwik8, config, folder)
        yield (example["text"] for example in builder.as_data_source(split=split))

    return Corpus(hashlib.sha256(f"enwik8-1 {archive.sha256}".encode()).hexdigest(), documents)
