"""Text from the user's own files: `data=text:PATH`, a file, a folder or a zip."""

import codecs
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from rope_lm import settings
from rope_lm.data.documents import PIECE, Corpus, File, Request, divide, fingerprint, in_folder, on_disk
from rope_lm.refusal import Refusal

SUFFIXES = (".txt", ".md", ".py")
# First bytes of a text that is not UTF-8. UTF-32's come first: they begin with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
UNPACKED = 8 * 2**30  # bytes that a zip may unpack to
RATIO = 200  # highest compression of a zip's member; text is compressed 3 to 10 times


def corpus(request: Request) -> Corpus:
    """Return the text at a path. Raises Refusal if it is missing, unreadable, empty or not text."""
    path = settings.path(request.argument, f"data={request.name}")
    try:
        files = [_checked(path, file) for file in _files(path)]
        return Corpus(fingerprint(files), lambda split: (document for _, document in divide(files, split)))
    except FileNotFoundError as error:
        raise Refusal(f"data=text:{path}: no such file or folder; give the path of an existing text") from error
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise Refusal(f"data=text:{path}: cannot be read ({error}); give a readable file, folder or .zip") from error


def _files(path: Path) -> list[File]:
    if path.is_dir():
        files, kind = in_folder(path, SUFFIXES, _is_tools), "folder"
        files = [file for file in files if _is_written(file.name)]
    elif path.suffix.lower() == ".zip":
        files, kind = _zip(path), "zip"
    else:
        files, kind = [on_disk(path, path.name)], "file"
    if not files:
        raise Refusal(f"data=text:{path}: the {kind} holds no {', '.join(SUFFIXES)} file")
    files = sorted((file for file in files if file.size), key=lambda file: file.name)
    if not files:
        raise Refusal(f"data=text:{path}: the {kind} is empty")
    return files


def _is_tools(folder: str) -> bool:
    """Return True for the name of a folder that people do not write in: hidden, of packages, or of macOS's zips."""
    return (folder.startswith(".") and folder != ".") or folder in ("__MACOSX", "site-packages", "node_modules")


def _is_written(name: str) -> bool:
    """Return False for a path in such a folder, and for ._a.txt, which macOS puts beside a.txt for its attributes."""
    *folders, file = name.split("/")
    return not file.startswith("._") and not any(map(_is_tools, folders))


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

    texts = [member for member in members if member.filename.lower().endswith(SUFFIXES)]
    return [opened(member) for member in texts if _is_written(member.filename)]


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


def _checked(path: Path, file: File) -> File:
    """Return the file with a `read` that raises Refusal when it meets bytes that are not text."""

    def read(start: int, stop: int) -> Iterator[bytes]:
        for piece in file.read(start, stop):
            for mark, encoding in MARKS.items() if start == 0 else ():
                if piece.startswith(mark):
                    raise Refusal(
                        f"data=text:{path}: {file.name!r} is {encoding}; convert it to UTF-8 first: "
                        f"iconv -f {encoding} -t UTF-8"
                    )
            if (at := piece.find(b"\0")) >= 0:
                raise Refusal(
                    f"data=text:{path}: {file.name!r} is binary, or UTF-16 without its mark (byte {start + at:,} is "
                    "NUL); give text in UTF-8"
                )
            start += len(piece)
            yield piece

    return file._replace(read=read)
