"""Text from TensorFlow Datasets: `data=tfds:NAME`."""

import hashlib
import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from glob import glob
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlparse

from rope_lm import settings
from rope_lm.data.documents import (
    SPLITS,
    Corpus,
    Document,
    Request,
    divide,
    fingerprint,
    in_memory,
    on_disk,
    split_of,
)
from rope_lm.refusal import Refusal, unknown


class Archive(NamedTuple):
    """A zip that holds one text, and the place to fetch it from."""

    url: str
    size: int  # bytes of the zip
    sha256: str  # of the zip


def corpus(request: Request) -> Corpus:
    """Return a text field of a TFDS dataset, in its own three splits or with one split divided into three.

    Raises Refusal for an unknown dataset, split or field, and for a dataset that cannot be fetched or prepared here.
    """
    builder = _builder(request.argument)
    _check_downloads(builder)
    features, splits = _prepared(request.name, builder)
    field = _field(request, features)
    _check_split(request, splits)
    counts = sorted((name, split.num_examples) for name, split in splits.items())
    has_ours = not request.split and set(SPLITS) <= set(splits)
    divided = request.split or ("train" if "train" in splits else next(iter(splits)))
    content = _content(request.name, [splits[split] for split in (SPLITS if has_ours else (divided,))])
    version = f"{builder.info.full_name} {request.split} {field} {counts} {content}"

    def documents(split: str) -> Iterator[Document]:
        examples = builder.as_data_source(split=split if has_ours else divided)
        numbers = range(len(examples))

        def text(i: int) -> bytes:
            value = examples[i][field]
            return value if isinstance(value, bytes) else str(value).encode()

        if has_ours:
            yield from ([text(i)] for i in numbers)
        elif all(any(split_of(_name(i)) == part for i in numbers) for part in SPLITS):
            # As `divide` does, but one at a time: a dataset may be larger than the memory.
            yield from ([text(i)] for i in numbers if split_of(_name(i)) == split)
        else:
            yield from (document for _, document in divide([in_memory(_name(i), text(i)) for i in numbers], split))

    return Corpus(hashlib.sha256(version.encode()).hexdigest(), documents)


def reachable(url: str) -> bool:
    """Return True if the URL's host accepts a connection within two seconds."""
    parts = urlparse(url)
    try:
        socket.create_connection((parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443)), 2).close()
    except OSError:
        return False
    return True


def one_line(error: BaseException) -> str:
    """Return the first 200 characters of an error's message, on one line."""
    return " ".join(str(error).split())[:200]


def _name(number: int) -> str:
    return f"{number:09d}"


def _builder(name: str) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    try:
        return tfds.builder(name)
    except (registered.DatasetNotFoundError, ValueError, RuntimeError) as error:
        package = Path(tfds.__file__).parent / "datasets"
        names = {*registered.list_imported_builders(), *(path.name for path in package.iterdir() if path.is_dir())}
        if name.split("/")[0].split(":")[0] not in names:
            raise unknown("tfds dataset", name, names) from error
        raise Refusal(f"data=tfds:{name}: {one_line(error)}") from error


def _check_downloads(builder: Any) -> None:
    """Raise Refusal at once for a missing file that cannot be fetched; TFDS would retry for minutes."""
    from tensorflow_datasets.core.download import resource

    if builder.data_path.exists():
        return
    root = str(builder._data_dir_root)
    folder = settings.path(root, f"TFDS_DATA_DIR={root}") / "downloads"
    for url, info in (builder.url_infos or {}).items():
        file = resource.get_dl_fname(url, info.checksum)
        if not any((place / file).exists() for place in (folder, *folder.glob("*"))) and not reachable(url):
            raise Refusal(
                f"data=tfds:{builder.name} is not prepared and {urlparse(url).hostname} cannot be reached: fetch {url} "
                f"elsewhere, put it at {folder / file} with {file}.INFO beside it, or give data=text:PATH"
            )


def _prepared(name: str, builder: Any) -> tuple[Any, Any]:
    """Prepare a dataset and return its features and splits."""
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.util import DownloadError

    try:
        # Standard output is for a script's results.
        with redirect_stdout(sys.stderr), _file_functions(builder):
            builder.download_and_prepare(file_format="array_record")
        return builder.info.features, builder.info.splits
    except (DownloadError, NonMatchingChecksumError) as error:
        what = "could not be fetched" if isinstance(error, DownloadError) else "was fetched with another checksum"
        raise Refusal(
            f"data={name} {what} ({one_line(error)}): prepare it elsewhere with file_format=array_record and copy "
            f"it to {builder.data_dir}"
        ) from error
    except (OSError, ImportError, NotImplementedError, AttributeError) as error:
        raise Refusal(
            f"data={name} cannot be prepared here ({one_line(error)}): some datasets need TensorFlow or Beam; "
            f"prepare it elsewhere with file_format=array_record and copy it to {builder.data_dir}"
        ) from error


@contextmanager
def _file_functions(builder: Any) -> Iterator[None]:
    """Give a builder Python's file functions if TensorFlow is not installed: many builders need nothing more."""
    module: Any = sys.modules[type(builder).__module__]
    if not hasattr(module, "tf") or importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    functions = {"GFile": open, "exists": os.path.exists, "isdir": os.path.isdir, "listdir": os.listdir, "glob": glob}
    lazy, module.tf = module.tf, SimpleNamespace(io=SimpleNamespace(gfile=SimpleNamespace(**functions)))
    try:
        yield
    finally:
        module.tf = lazy


def _content(name: str, splits: list[Any]) -> str:
    """Return the fingerprint of the record files of these splits: different texts may have the same TFDS version."""
    paths = sorted({Path(part.filename) for split in splits for part in split.file_instructions})
    try:
        return fingerprint([on_disk(path, path.name) for path in paths])
    except OSError as error:
        raise Refusal(f"data={name}: {error.filename!r} cannot be read ({error.strerror}): prepare it again") from error


def _field(request: Request, features: Any) -> str:
    if request.field in features:
        return request.field
    if request.field:
        raise unknown(f"data.field of {request.name}", request.field, features)
    texts = [name for name, feature in features.items() if type(feature).__name__ == "Text"]
    if len(texts) != 1:
        raise Refusal(
            f"data={request.name} has the text fields {', '.join(texts) or '(none)'}: set --config.data.field"
        )
    return texts[0]


def _check_split(request: Request, splits: Any) -> None:
    try:
        if request.split:
            _ = splits[request.split]  # knows slices too: train[:10%]
    except (KeyError, ValueError) as error:
        raise unknown(f"data.split of {request.name}", request.split, splits) from error
