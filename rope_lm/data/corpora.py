"""Where text comes from: TFDS builders, and files of one's own, become documents divided into three splits."""

import hashlib
import importlib.util
import os
import socket
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from glob import glob
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlparse

from rope_lm import settings
from rope_lm.data.cache import alone
from rope_lm.refusal import Refusal, unknown

SPLITS = ("train", "validation", "test")
SHARES = (0.90, 0.05, 0.05)  # of the documents, or of each document where there are few
SUFFIXES = (".txt", ".md", ".py")
PIECE = 4 * 2**20  # bytes of a document that are in memory at once
UNPACKED = 8 * 2**30  # bytes that a zip may hold
RATIO = 200  # by which a member of a zip may be compressed; text is compressed by 3 to 10

Document = Iterable[bytes]  # its pieces in order


class Corpus(NamedTuple):
    """Documents of text, read only when they are asked for."""

    fingerprint: str  # sha256 over the names and contents of everything that it is made of
    documents: Callable[[str], Iterator[Document]]  # of a split


class Source(NamedTuple):
    """One file of a corpus."""

    name: str  # relative path, "/" between the parts
    size: int  # bytes
    read: Callable[[int, int], Iterator[bytes]]  # from byte, to byte -> pieces


class Archive(NamedTuple):
    """A zip that holds one text, and where it is."""

    url: str
    size: int  # bytes of the zip
    sha256: str  # of the zip


# The Hutter Prize's file, from its own page (mattmahoney.net/dc/textdata.html), which gives the MD5 of what is in the
# zip, a1fa5ffddb56f4953e226637dabbb36a. The sha256 of the zip is the one that many projects pin, independently.
ENWIK8 = Archive(
    "http://mattmahoney.net/dc/enwik8.zip",
    36_445_475,
    "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
)


def open_corpus(name: str, split: str, field: str, cache: Path) -> Corpus:
    """The corpus that `data.name` names: stdlib, enwik8, text:PATH or tfds:NAME. `split` and `field` are for tfds.

    Raises Refusal for a name, a path or a text that cannot be used.
    """
    kind, _, rest = name.partition(":")
    if name == "stdlib":
        return _stdlib(cache)
    if name == "enwik8":
        return enwik8(ENWIK8, cache)
    if kind == "text" and rest:
        return _text(settings.path(rest, f"data={name}"))
    if kind == "tfds" and rest:
        return _tfds(rest, split, field)
    raise unknown("data", name, ["stdlib", "enwik8", "text:PATH", "tfds:NAME", "probe:NAME"])


# --- the running Python's standard library, as a TFDS dataset -------------------------------------------------------


def stdlib_sources() -> list[Source]:
    """The .py files of the running Python's standard library, without tests and installed packages, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [each for each in folders if each not in left_out]
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return sorted((_file(path, path.relative_to(root).as_posix()) for path in found), key=lambda source: source.name)


def _stdlib(cache: Path) -> Corpus:
    sources = stdlib_sources()
    fingerprint = _fingerprint(sources)

    def documents(split: str) -> Iterator[Document]:
        # TFDS takes a second to import: only when the tokens are not there yet.
        from rope_lm.data.stdlib import prepare

        with alone(cache / "tfds" / "stdlib"):
            builder = prepare(cache / "tfds", fingerprint)
        for example in builder.as_data_source(split=split):
            yield [example["text"]]

    return Corpus(fingerprint, documents)


# --- enwik8 ---------------------------------------------------------------------------------------------------------


def enwik8(archive: Archive, cache: Path) -> Corpus:
    """The text in `archive`, one document a split: its first 90%, the next 5%, the last 5% of the bytes.

    Reading it raises Refusal where the zip is not there and cannot be fetched, or is another one.
    """

    def documents(split: str) -> Iterator[Document]:
        from rope_lm.data.enwik8 import prepare

        with alone(cache / "tfds" / "enwik8"):
            builder = prepare(cache / "tfds", archive)
        yield (example["text"] for example in builder.as_data_source(split=split))

    return Corpus(hashlib.sha256(f"enwik8-1 {archive.sha256}".encode()).hexdigest(), documents)


def bounds(size: int, split: str) -> tuple[int, int]:
    """Where a split of `size` bytes begins and ends."""
    before = sum(SHARES[: SPLITS.index(split)])
    return round(size * before), round(size * (before + SHARES[SPLITS.index(split)]))


def reachable(url: str) -> bool:
    """Whether a connection to the URL's host is taken, within two seconds."""
    parts = urlparse(url)
    try:
        socket.create_connection((parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443)), 2).close()
    except OSError:
        return False
    return True


# --- files of one's own ---------------------------------------------------------------------------------------------


def _text(path: Path) -> Corpus:
    try:
        if path.is_dir():
            sources, what = _folder(path), "folder"
        elif path.suffix == ".zip":
            sources, what = _zip(path), "zip"
        else:
            sources, what = [_file(path, path.name)], "file"
        if not sources:
            raise Refusal(f"data=text:{path}: the {what} holds no {', '.join(SUFFIXES)} file")
        sources = sorted((source for source in sources if source.size), key=lambda source: source.name)
        if not sources:
            raise Refusal(f"data=text:{path}: the {what} is empty")
        for source in sources:
            _check_is_text(path, source)
        fingerprint = _fingerprint(sources)
    except FileNotFoundError as error:
        raise Refusal(f"data=text:{path}: no such file or folder; give the path of text that is there") from error
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise Refusal(f"data=text:{path}: cannot be read ({error}); give a readable file, folder or .zip") from error
    return Corpus(fingerprint, lambda split: (document for _, document in divide(sources, split)))


def _folder(root: Path) -> list[Source]:
    found = []
    for folder, _, files in os.walk(root, onerror=_raise):  # symbolic links to folders are not followed
        found += [Path(folder, file) for file in files if file.endswith(SUFFIXES)]
    found = [path for path in found if path.is_file()]  # and no link to what is not there: an editor's lock
    return [_file(path, path.relative_to(root).as_posix()) for path in found]


def _raise(error: OSError) -> None:
    raise error


def _file(path: Path, name: str) -> Source:
    def read(start: int, stop: int) -> Iterator[bytes]:
        with open(path, "rb") as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(PIECE, stop - start))):
                start += len(piece)
                yield piece

    return Source(name, path.stat().st_size, read)


def _zip(path: Path) -> list[Source]:
    archive = zipfile.ZipFile(path)  # open as long as its sources are: its list of 2,000 members takes 20 ms to read
    members = [each for each in archive.infolist() if not each.is_dir()]
    total = sum(each.file_size for each in members)
    for each in members:
        parts = each.filename.replace("\\", "/").split("/")
        if ".." in parts or each.filename.startswith(("/", "\\")) or ":" in parts[0]:
            raise Refusal(
                f"data=text:{path}: member {each.filename!r} leads out of the zip; pack it without such paths"
            )
        if total > UNPACKED or each.file_size > RATIO * max(each.compress_size, 4096):
            raise Refusal(
                f"data=text:{path}: member {each.filename!r} unpacks to {each.file_size:,} bytes from "
                f"{each.compress_size:,} ({total:,} in all), more than text does; unpack it and give the folder"
            )

    def source(member: zipfile.ZipInfo) -> Source:
        def read(start: int, stop: int) -> Iterator[bytes]:
            # Read in memory, never extracted; zipfile stops at the declared size and checks the sum.
            with archive.open(member) as file:
                at = 0
                while at < stop and (piece := file.read(PIECE)):
                    yield piece[max(0, start - at) : stop - at]
                    at += len(piece)

        return Source(member.filename, member.file_size, read)

    return [source(each) for each in members if each.filename.endswith(SUFFIXES)]


def _check_is_text(path: Path, source: Source) -> None:
    head = b"".join(source.read(0, min(source.size, 2**16)))
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Refusal(
            f"data=text:{path}: {source.name!r} is UTF-16; convert it to UTF-8 first: iconv -f UTF-16 -t UTF-8"
        )
    if b"\0" in head:
        raise Refusal(f"data=text:{path}: {source.name!r} is binary (it holds NUL bytes); give text")


def divide(sources: list[Source], split: str) -> Iterator[tuple[str, Document]]:
    """The names and documents of a split: by a hash of the names, 90/5/5; where that leaves a split without any, from
    each document its first 90%, the next 5%, the last 5%, cut after the end of a line where one is near."""
    groups = {each: [source for source in sources if _split_of(source.name) == each] for each in SPLITS}
    if all(groups.values()):
        yield from ((source.name, source.read(0, source.size)) for source in groups[split])
        return
    for source in sources:
        start, stop = (_cut(source, at) for at in bounds(source.size, split))
        if start < stop:
            yield source.name, source.read(start, stop)


def _split_of(name: str) -> str:
    share = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64
    return SPLITS[0] if share < SHARES[0] else SPLITS[1] if share < SHARES[0] + SHARES[1] else SPLITS[2]


def _cut(source: Source, at: int) -> int:
    """The end of the line at `at`."""
    if at in (0, source.size):
        return at
    near = b"".join(source.read(at, min(at + 4096, source.size)))
    return at + near.find(b"\n") + 1  # find is -1 where no line ends near: cut right here


def _fingerprint(sources: list[Source]) -> str:
    whole = hashlib.sha256()
    for source in sources:
        content = hashlib.sha256()
        for piece in source.read(0, source.size):
            content.update(piece)
        name = source.name.encode("utf-8", "surrogateescape")
        whole.update(len(name).to_bytes(8) + name + content.digest())
    return whole.hexdigest()


# --- TFDS -----------------------------------------------------------------------------------------------------------


def _tfds(name: str, split: str, field: str) -> Corpus:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.util import DownloadError

    builder = _builder(tfds, name)
    _check_downloads(builder)
    try:
        # Said where nothing but results is read from standard output.
        with redirect_stdout(sys.stderr), _file_access(builder):
            builder.download_and_prepare(file_format="array_record")
        field = field or _text_field(name, builder.info.features)
        if field not in builder.info.features:
            raise unknown(f"data.field of tfds:{name}", field, builder.info.features)
        _check_split(name, split, builder.info.splits)
    except (DownloadError, NonMatchingChecksumError) as error:
        what = "could not be fetched" if isinstance(error, DownloadError) else "was fetched with another checksum"
        raise Refusal(
            f"data=tfds:{name} {what} ({_line(error)}): prepare it elsewhere with file_format=array_record and copy it "
            f"to {builder.data_dir}"
        ) from error
    except (OSError, ImportError, NotImplementedError, AttributeError) as error:
        raise Refusal(
            f"data=tfds:{name} cannot be prepared here ({_line(error)}): some datasets need TensorFlow or Beam for it; "
            f"prepare it elsewhere with file_format=array_record and copy it to {builder.data_dir}"
        ) from error
    counts = sorted((key, value.num_examples) for key, value in builder.info.splits.items())
    version = f"{builder.info.full_name} {split} {field} {counts}"
    own = not split and set(SPLITS) <= set(builder.info.splits)

    def documents(part: str) -> Iterator[Document]:
        whole = (
            part if own else split or ("train" if "train" in builder.info.splits else next(iter(builder.info.splits)))
        )
        examples = builder.as_data_source(split=whole)
        numbers = range(len(examples))

        def text(i: int) -> bytes:
            value = examples[i][field]
            return value if isinstance(value, bytes) else str(value).encode()

        if own:
            yield from ([text(i)] for i in numbers)
        elif all(any(_split_of(_name(i)) == each for i in numbers) for each in SPLITS):
            # As `divide` does, one at a time: a dataset may be larger than the memory.
            yield from ([text(i)] for i in numbers if _split_of(_name(i)) == part)
        else:
            yield from (document for _, document in divide([_memory(_name(i), text(i)) for i in numbers], part))

    return Corpus(hashlib.sha256(version.encode()).hexdigest(), documents)


@contextmanager
def _file_access(builder: Any) -> Iterator[None]:
    """Many builders want of TensorFlow its file functions alone; where it is not installed Python's stand in."""
    module = sys.modules[type(builder).__module__]
    if not hasattr(module, "tf") or importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    files = {"GFile": open, "exists": os.path.exists, "isdir": os.path.isdir, "listdir": os.listdir, "glob": glob}
    lazy, module.tf = module.tf, SimpleNamespace(io=SimpleNamespace(gfile=SimpleNamespace(**files)))
    try:
        yield
    finally:
        module.tf = lazy


def _name(number: int) -> str:
    return f"{number:09d}"


def _memory(name: str, content: bytes) -> Source:
    return Source(name, len(content), lambda start, stop: iter([content[start:stop]]))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _builder(tfds: Any, name: str) -> Any:
    from tensorflow_datasets.core import registered

    try:
        return tfds.builder(name)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, RuntimeError) as error:
        package = Path(tfds.__file__).parent / "datasets"
        names = {*registered.list_imported_builders(), *(each.name for each in package.iterdir() if each.is_dir())}
        if name.split("/")[0].split(":")[0] not in names:
            raise unknown("tfds dataset", name, names) from error
        raise Refusal(f"data=tfds:{name}: {_line(error)}") from error


def _check_downloads(builder: Any) -> None:
    """Refuses at once what TFDS would retry for minutes: a file that is not there and cannot be fetched."""
    from tensorflow_datasets.core.download import resource

    if builder.data_path.exists():
        return
    root = str(builder._data_dir_root)
    folder = settings.path(root, f"TFDS_DATA_DIR={root}") / "downloads"
    missing = {
        url: resource.get_dl_fname(url, info.checksum)
        for url, info in (builder.url_infos or {}).items()
        if not any((at / resource.get_dl_fname(url, info.checksum)).exists() for at in (folder, *folder.glob("*")))
    }
    for url, file in missing.items():
        if not reachable(url):
            raise Refusal(
                f"data=tfds:{builder.name} is not prepared and {urlparse(url).hostname} cannot be reached: fetch {url} "
                f"elsewhere, put it at {folder / file} with {file}.INFO beside it, or give data=text:PATH"
            )


def _text_field(name: str, features: Any) -> str:
    found = [key for key, feature in features.items() if type(feature).__name__ == "Text"]
    if len(found) != 1:
        raise Refusal(f"data=tfds:{name} has the text fields {', '.join(found) or '(none)'}: set --config.data.field")
    return found[0]


def _check_split(name: str, split: str, splits: Any) -> None:
    try:
        if split:
            _ = splits[split]
    except (KeyError, ValueError) as error:
        raise unknown(f"data.split of tfds:{name}", split, splits) from error
