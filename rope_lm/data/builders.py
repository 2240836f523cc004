"""TFDS builders for the texts that this project knows by name. Importing TFDS takes a second."""

import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

from rope_lm.data.datasets import Archive, one_line, reachable
from rope_lm.data.documents import SPLITS
from rope_lm.refusal import Refusal


@dataclass(eq=False, kw_only=True)
class Text(tfds.core.BuilderConfig):
    """One version of a text, named by its fingerprint."""

    examples: Callable[[str, Any], Iterable[bytes]]  # split, path of the archive (None if there is none) -> texts
    archive: Archive | None = None


class _Texts:
    VERSION = tfds.core.Version("1.0.0")

    builder_config: Text

    @property
    def url_infos(self) -> dict[str, UrlInfo]:
        """The checksum that TFDS verifies, and the file name that it looks for in its `manual_dir`."""
        archives = filter(None, [self.builder_config.archive])
        return {archive.url: UrlInfo(archive.size, archive.sha256, Path(archive.url).name) for archive in archives}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        path = next((Path(dl_manager.download(url)) for url in self.url_infos), None)
        return {split: self._generate_examples(split, path) for split in SPLITS}

    def _generate_examples(self, split: str, path: Any) -> Iterator[tuple[int, dict[str, bytes]]]:
        for number, text in enumerate(self.builder_config.examples(split, path)):
            yield number, {"text": text}


class Stdlib(_Texts, tfds.core.GeneratorBasedBuilder):
    """The running Python's standard library, one example per source file."""


class Enwik8(_Texts, tfds.core.GeneratorBasedBuilder):
    """The beginning of the English Wikipedia in examples of 4 MiB."""


def prepare(kind: type[Stdlib | Enwik8], config: Text, folder: Path) -> Any:
    """Return a builder with its dataset prepared in `folder`.

    Its archive is taken from `folder`/downloads/manual, or fetched. Raises Refusal if the archive's checksum is wrong,
    and if there is no archive and its host cannot be reached.
    """
    with _quiet():
        builder = kind(config=config, data_dir=str(folder), file_format="array_record")
        if config.archive is None:
            builder.download_and_prepare()
            return builder
    url, size, sha256 = config.archive
    manual = folder / "downloads" / "manual" / Path(url).name
    advice = f"fetch {url} elsewhere, put it at {manual}, and run this again"
    if not builder.data_path.exists() and not manual.exists():
        if not reachable(url):
            raise Refusal(
                f"data={builder.name} is not prepared and {urlparse(url).hostname} cannot be reached: {advice}"
            )
        print(f"fetching {url} ({size / 1e6:,.0f} MB)", file=sys.stderr)
    try:
        with _quiet():
            builder.download_and_prepare()
    except NonMatchingChecksumError as error:
        where = manual if manual.exists() else url
        raise Refusal(f"{where} is not the official zip, whose sha256 is {sha256}: {advice}") from error
    except (DownloadError, OSError) as error:
        if getattr(error, "errno", None):  # an error of this machine; one of a download has no number
            raise
        raise Refusal(f"data={builder.name} could not be fetched ({one_line(error)}): {advice}") from error
    return builder


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence TFDS's progress bars, its notes on downloads and its warnings about custom configs."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
