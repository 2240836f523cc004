"""The TFDS builder `stdlib`: the running Python's standard library as a dataset, so that every machine has text."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import tensorflow_datasets as tfds

from rope_lm.data import corpora


class Stdlib(tfds.core.GeneratorBasedBuilder):
    """One example for each source file: `path`, relative to the library, and `text`, the bytes of the file.

    A config is one state of the library, named by its fingerprint: another Python has another dataset.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, fingerprint: str, **kwargs: object):
        super().__init__(config=tfds.core.BuilderConfig(name=fingerprint[:16], version="1.0.0"), **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: object) -> dict:
        return {split: self._generate_examples(split) for split in corpora.SPLITS}

    def _generate_examples(self, split: str):
        sources = corpora.stdlib_sources()
        for number, (name, document) in enumerate(corpora.divide(sources, split)):
            yield number, {"path": name, "text": b"".join(document)}


def prepare(folder: Path, fingerprint: str) -> Stdlib:
    """The builder, with its dataset prepared under `folder`, in a second and without TFDS's bars for every split."""
    tfds.disable_progress_bar()
    with quiet():
        builder = Stdlib(fingerprint=fingerprint, data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare()
    return builder


@contextmanager
def quiet() -> Iterator[None]:
    """What TFDS says of a download that is none, and its warnings about custom configs, are left out."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
