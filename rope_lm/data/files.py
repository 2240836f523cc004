"""Text from the user's own files: `data=text:PATH`, a file, a folder or a zip."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from rope_lm import settings
from rope_lm.data.documents import PIECE, Corpus, File, Request, divide, fingerprint, in_folder, on_disk
from rope_lm.refusal import Refusal

SUFFIXES = (".txt", ".md", ".py")
UNPACKED = 8 * 2**30  # bytes that a zip may unpack to
RATIO = 200  # highest compression of a zip's member; text is compressed 3 to 10 times


def corpus(request: Request) -> Corpus:
    """Return the text at a path. Raises Refusal if it is missing, unreadable, empty or not text."""
    path = settings.path(request.argument, f"data={request.name}")
    try:
        files = _files(path)
        for file in files:
            _check_is_text(path, file)
        return Corpus(fingerprint(files), lambda split: (document for _, document in divide(files, split)))
    except FileNotFoundError as error:
        raise Refusal(f"data=text:{path}: no such file or folder; give the path of an existing text") from error
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise Refusal(f"data=text:{path}: cannot be read ({error}); give a readable file, folder or .zip") from error


def _files(path: Path) -> list[File]:
    if path.is_dir():
        files, kind = in_folder(path, SUFFIXES), "folder"
    elif path.suffix == ".zip":
        files, kind = _zip(path), "zip"
    else:
        files, kind = [on_disk(path, path.name)], "file"
    if not files:
        raise Refusal(f"data=text:{path}: the {kind} holds no {', '.join(SUFFIXES)} file")
    files = sorted((file for file in files if file.size), key=lambda file: file.name)
    if not files:
        raise Refusal(f"data=text:{path}: the {kind} is empty")
    return files


def _zip(path: Path) -> list[File]:
    archive = zipfile.ZipFile(path)  # stays open: reading the list of 2,000 members again takes 20 ms
    members = [member for member in archive.infolist() if not member.is_dir()]
    _check_members(path, members)

    def opened(member: zipfile.ZipInfo) -> File:
        def read(start: int, stop: int) -> Iterator[bytes]:
            # Read in memory, never extracted. zipfile stops at the declared size and checks the sum.
            with archive.open(member) as file:
                at = 0
                while at < stop and (piece := file.read(PIECE)):
                    yield piece[max(0, start - at) : stop - at]
                    at += len(piece)

        return File(member.filename, member.file_size, read)

    return [opened(member) for member in members if member.filename.endswith(SUFFIXES)]


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    total = sum(member.file_size for member in members)
    for member in members:
        parts = member.filename.replace("\\", "/").split("/")
        if ".." in parts or member.filename.startswith(("/", "\\")) or ":" in parts[0]:
            raise Refusal(
                f"data=text:{path}: member {member.filename!r} leads out of the zip; pack it without such paths"
            )
        if total > UNPACKED or member.file_size > RATIO * max(member.compress_size, 4096):
            raise Refusal(
                f"data=text:{path}: member {member.filename!r} unpacks to {member.file_size:,} bytes from "
                f"{member.compress_size:,} ({total:,} in all), more than text does; unpack it and give the folder"
            )


def _check_is_text(path: Path, file: File) -> None:
    head = b"".join(file.read(0, min(file.size, 2**16)))
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Refusal(f"data=text:{path}: {file.name!r} is UTF-16; convert it to UTF-8 first: iconv -f UTF-16 -t UTF-8")
    if b"\0" in head:
        raise Refusal(f"data=text:{path}: {file.name!r} is binary (it holds NUL bytes); give text")
