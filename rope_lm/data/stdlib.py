"""The TFDS builder `stdlib`: the running Python's standard library as a dataset, so that every machine has text."""

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
    """The builder, with its dataset prepared under `folder`."""
    builder = Stdlib(fingerprint=fingerprint, data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return builder
