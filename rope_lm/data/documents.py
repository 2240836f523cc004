"""Documents of text and their division into training, validation and test."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "validation", "test")
SHARES = (0.90, 0.05, 0.05)  # of the documents; of each document's bytes where there are too few documents
BLOCK = 2**20  # bytes of a document that are encoded at once
PIECE = 4 * 2**20  # bytes of a document that are in memory at once

Document = Iterable[bytes]  # its pieces in order


class Corpus(NamedTuple):
    """Documents of text, read only when they are asked for."""

    fingerprint: str  # changes when any byte of the text would
    documents: Callable[[str], Iterator[Document]]  # those of a split


class Request(NamedTuple):
    """The keys of a config's `data` section that decide which text is read."""

    name: str  # "stdlib", "text:PATH", ...
    length: int  # tokens of a row
    split: str  # of a TFDS dataset; "" for its own splits
    field: str  # of a TFDS dataset; "" for its only text
    cache: Path

    @property
    def argument(self) -> str:
        """Return what follows the colon in `name`."""
        return self.name.partition(":")[2]


class File(NamedTuple):
    """One document of a corpus, readable from any byte: a file, a member of a zip, or text in memory."""

    name: str  # relative path, "/" between its parts
    size: int  # bytes
    read: Callable[[int, int], Iterator[bytes]]  # first byte, byte after the last -> pieces


def on_disk(path: Path, name: str) -> File:
    """Return the file at `path`."""

    def read(start: int, stop: int) -> Iterator[bytes]:
        with open(path, "rb") as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(PIECE, stop - start))):
                start += len(piece)
                yield piece

    return File(name, path.stat().st_size, read)


def in_folder(root: Path, suffixes: tuple[str, ...], left_out: Callable[[str], bool]) -> list[File]:
    """Return the files below `root` with these suffixes, in upper or lower case, sorted by name.

    Folders for whose names `left_out` returns True are not read.
    """

    def fail(error: OSError) -> None:
        raise error

    paths: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=fail):  # does not follow symbolic links to folders
        folders[:] = [name for name in folders if not left_out(name)]
        paths += [Path(folder, name) for name in names if name.lower().endswith(suffixes)]
    # An editor's lock is a symbolic link to nothing: not a file.
    files = [on_disk(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    return sorted(files, key=lambda file: file.name)


def in_memory(name: str, content: bytes) -> File:
    """Return `content` as a file."""
    return File(name, len(content), lambda start, stop: iter([content[start:stop]]))


def divide(files: list[File], split: str) -> Iterator[tuple[str, Document]]:
    """Yield the names and documents of a split.

    Documents are divided 90/5/5 by a hash of their names. Where that leaves a split empty, each document is divided
    instead: its first 90%, the next 5% and the last 5%, cut after the end of a line if one is near.
    """
    groups = {part: [file for file in files if split_of(file.name) == part] for part in SPLITS}
    if all(groups.values()):
        yield from ((file.name, file.read(0, file.size)) for file in groups[split])
        return
    for file in files:
        start, stop = (_end_of_line(file, at) for at in bounds(file.size, split))
        if start < stop:
            yield file.name, file.read(start, stop)


def split_of(name: str) -> str:
    """Return the split of a document, from a hash of its name."""
    share = int.from_bytes(hashlib.sha256(escaped(name)).digest()[:8]) / 2**64
    return SPLITS[0] if share < SHARES[0] else SPLITS[1] if share < SHARES[0] + SHARES[1] else SPLITS[2]


def bounds(size: int, split: str) -> tuple[int, int]:
    """Return the first byte of a split of `size` bytes and the byte after its last."""
    index = SPLITS.index(split)
    before = sum(SHARES[:index])
    return round(size * before), round(size * (before + SHARES[index]))


def fingerprint(files: list[File]) -> str:
    """Return the sha256 of the names and contents of `files`."""
    whole = hashlib.sha256()
    for file in files:
        content = hashlib.sha256()
        for piece in file.read(0, file.size):
            content.update(piece)
        name = escaped(file.name)
        whole.update(len(name).to_bytes(8) + name + content.digest())
    return whole.hexdigest()


def blocks(document: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the bytes of a document in blocks of at most 1 MiB, which do not depend on how `document` is cut.

    Each cut comes before a space or newline that follows no white space. Every tokenizer here begins a token there, so
    the tokens are those of the whole document. There are two exceptions, in which the tokens at a cut may differ,
    though they are always the same: a MiB without such a place is cut between two letters, and a SentencePiece model
    may have been trained to let its pieces span spaces.
    """
    held = b""
    for piece in document:
        held += piece
        at = 0
        while len(held) - at > BLOCK:
            size = _cut(held[at : at + BLOCK + 1])
            yield held[at : at + size]
            at += size
        held = held[at:]
    if held:
        yield held


_BEFORE_SPACE = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def _cut(text: bytes) -> int:
    """Return the last place in BLOCK + 1 bytes of text to cut at."""
    if found := _BEFORE_SPACE.match(text.decode("utf-8", "surrogateescape")):
        return len(escaped(found[0]))
    return next((at for at in range(BLOCK, BLOCK - 4, -1) if text[at] & 0xC0 != 0x80), BLOCK)


def _end_of_line(file: File, at: int) -> int:
    if at in (0, file.size):
        return at
    near = b"".join(file.read(at, min(at + 4096, file.size)))
    return at + near.find(b"\n") + 1  # find returns -1 if no line ends nearby: cut right here


def escaped(text: str) -> bytes:
    """Return the original bytes of a text or a file name, including those that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape")
