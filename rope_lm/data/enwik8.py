"""The TFDS builder `enwik8`: the first 100,000,000 bytes of the English Wikipedia's dump of 3 March 2006."""

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

from rope_lm.data import corpora
from rope_lm.data.stdlib import quiet
from rope_lm.refusal import Refusal


class Enwik8(tfds.core.GeneratorBasedBuilder):
    """The text of the zip's only file as examples of 4 MiB, in order: its first 90%, the next 5%, the last 5%.

    That is the split of those who model it, 90, 5 and 5 million bytes (Al-Rfou et al., arXiv 1808.04444; Dai et al.,
    arXiv 1901.02860). TFDS fetches the zip, or takes it from its `manual_dir`, and checks its sum. A config is one zip,
    named by that sum.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, archive: corpora.Archive, **kwargs: object):
        self.archive = archive
        super().__init__(config=tfds.core.BuilderConfig(name=archive.sha256[:16], version="1.0.0"), **kwargs)

    @property
    def url_infos(self) -> dict[str, UrlInfo]:
        """The sum that TFDS checks, and the name that it looks for in `manual_dir`."""
        return {self.archive.url: UrlInfo(self.archive.size, self.archive.sha256, Path(self.archive.url).name)}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        path = Path(dl_manager.download(self.archive.url))
        return {split: self._generate_examples(path, split) for split in corpora.SPLITS}

    def _generate_examples(self, path: Path, split: str) -> Iterator[tuple[int, dict[str, bytes]]]:
        with zipfile.ZipFile(path) as archive, archive.open(archive.infolist()[0]) as file:
            start, stop = corpora.bounds(archive.infolist()[0].file_size, split)
            file.seek(start)
            for number, at in enumerate(range(start, stop, corpora.PIECE)):
                yield number, {"text": file.read(min(corpora.PIECE, stop - at))}


def prepare(folder: Path, archive: corpora.Archive) -> Enwik8:
    """The builder, with its dataset prepared under `folder`, from the zip in `folder`/downloads/manual or its URL.

    Raises Refusal for a zip that is not the official one, and where there is none and its host cannot be reached.
    """
    tfds.disable_progress_bar()
    host, manual = urlparse(archive.url).hostname, folder / "downloads" / "manual" / Path(archive.url).name
    bring = f"fetch {archive.url} elsewhere, put it at {manual}, and run this again"
    with quiet():
        builder = Enwik8(archive=archive, data_dir=str(folder), file_format="array_record")
    if not builder.data_path.exists() and not manual.exists():
        if not corpora.reachable(archive.url):
            raise Refusal(f"data=enwik8 is not prepared and {host} cannot be reached: {bring}")
        print(f"fetching {archive.url} ({archive.size / 1e6:,.0f} MB)", file=sys.stderr)
    try:
        with quiet():
            builder.download_and_prepare()
    except NonMatchingChecksumError as error:
        where = manual if manual.exists() else archive.url
        raise Refusal(f"{where} is not the official zip, whose sha256 is {archive.sha256}: {bring}") from error
    except (DownloadError, OSError) as error:
        if getattr(error, "errno", None):  # of this machine; what a download raises has no number
            raise
        raise Refusal(f"data=enwik8 could not be fetched ({' '.join(str(error).split())[:200]}): {bring}") from error
    return builder
