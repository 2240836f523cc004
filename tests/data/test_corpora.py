"""Text from real files, zips and TFDS builders, and common mistakes with them."""

import hashlib
import json
import shutil
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rope_lm.data import stdlib
from rope_lm.data.corpora import open_source
from rope_lm.data.documents import SPLITS, Corpus, Request, divide, in_memory
from rope_lm.refusal import Refusal
from tests.data.conftest import Make

SHARED = Path(__file__).parents[3] / "shared" / "data"  # text that is not part of the project
SHAKESPEARE, REVIEWS = SHARED / "tiny_shakespeare.txt", SHARED / "movie_reviews.zip"


def open_corpus(name: str, cache: Path | str, field: str = "", split: str = "") -> Corpus:
    corpus = open_source(Request(name, 16, split, field, Path(cache)))
    assert isinstance(corpus, Corpus)
    return corpus


def everything(corpus: Corpus) -> dict[str, list[bytes]]:
    return {split: [b"".join(document) for document in corpus.documents(split)] for split in SPLITS}


def test_stdlib_is_the_running_pythons_own_library(make: Make) -> None:
    made = make("stdlib")
    assert 300 < sum(made.documents.values()) < 2000
    assert 5e6 < sum(made.tokens.values()) < 3e7
    names = [source.name for source in stdlib.files()]
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    shares = [made.documents[split] / sum(made.documents.values()) for split in SPLITS]
    assert shares[0] == pytest.approx(0.9, abs=0.04) and shares[1] == pytest.approx(0.05, abs=0.03)


def test_stdlib_through_tfds_is_the_files_themselves(cache: str) -> None:
    kept = everything(open_corpus("stdlib", cache))
    files = {b"".join(source.read(0, source.size)) for source in stdlib.files()}
    assert {text for texts in kept.values() for text in texts} == files
    assert not set(kept["train"]) & (set(kept["validation"]) - {b""})


def test_the_second_time_is_quick_and_imports_no_tfds(make: Make) -> None:
    make("stdlib")
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("tensorflow_datasets")}
    try:
        make("stdlib")
        assert "tensorflow_datasets" not in sys.modules
    finally:
        sys.modules.update(kept)


def test_a_folder_is_divided_by_document_and_a_file_by_position(tmp_path: Path, cache: str) -> None:
    for i in range(200):
        (tmp_path / "many" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "many" / str(i % 3) / f"{i}.md").write_text(f"document {i}\n" * 5)
    (tmp_path / "many" / "left-out.bin").write_bytes(b"\0\1")
    kept = everything(open_corpus(f"text:{tmp_path / 'many'}", cache))
    assert [len(kept[split]) for split in SPLITS] == [180, 10, 10] or sum(map(len, kept.values())) == 200
    assert all(text.count(b"document") == 5 for texts in kept.values() for text in texts)
    one = tmp_path / "one.txt"
    one.write_text("".join(f"line {i}\n" for i in range(1000)))
    kept = everything(open_corpus(f"text:{one}", cache))
    assert b"".join(kept["train"] + kept["validation"] + kept["test"]) == one.read_bytes()
    assert all(text.endswith(b"\n") and text.startswith(b"line") for texts in kept.values() for text in texts)


def test_a_zip_is_read_like_its_folder(tmp_path: Path, cache: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(100):
            (tmp_path / "a").mkdir(exist_ok=True)
            (tmp_path / "a" / f"{i}.txt").write_text(f"text {i} " * 50)
            archive.write(tmp_path / "a" / f"{i}.txt", f"{i}.txt")
    folder, packed = (open_corpus(f"text:{tmp_path / each}", cache) for each in ("a", "a.zip"))
    assert folder.fingerprint == packed.fingerprint
    assert everything(folder) == everything(packed)


def test_what_no_person_wrote_is_left_out(tmp_path: Path, cache: str) -> None:
    """A folder and a zip of it from macOS's Finder hold the same text as the folder without what programs put there."""
    names = ("a.txt", "sub/B.TXT", ".notes.md", "sub/c.Py")
    put = ("._a.txt", "__MACOSX/._a.txt", "__MACOSX/a.txt", ".git/x.md", "sub/.venv/x.py", "v/site-packages/x.py")
    for folder, chosen in (("clean", names), ("used", (*names, *put))):
        for name in chosen:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            binary = b"\0\5\26\7" if "._" in name else b""
            path.write_bytes(binary + f"text of {name}\n".encode() * 100)
    with zipfile.ZipFile(tmp_path / "used.ZIP", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (*names, *put):
            archive.write(tmp_path / "used" / name, name)
    clean, used, packed = (open_corpus(f"text:{tmp_path / name}", cache) for name in ("clean", "used", "used.ZIP"))
    assert clean.fingerprint == used.fingerprint == packed.fingerprint
    assert everything(clean) == everything(used) == everything(packed)
    assert sum(text.count(b"text of") for texts in everything(clean).values() for text in texts) == 400
    assert open_corpus(f"text:{tmp_path / 'used' / '.git'}", cache).fingerprint, "named by a person"


@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_that_is_no_text_is_found_anywhere(tmp_path: Path, cache: str, packed: bool) -> None:
    content = b"a line\n" * 2_000_000 + b"\0" + b"a line\n"
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    if packed:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as archive:
            archive.write(path, "a.txt")
        path = tmp_path / "a.zip"
    with pytest.raises(Refusal, match=r"'a.txt' is binary, or UTF-16 without its mark \(byte 14,000,000 is NUL\)"):
        open_corpus(f"text:{path}", cache)


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16-BE", "UTF-32", "UTF-32-BE"])
def test_another_encoding_is_named(tmp_path: Path, cache: str, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("BE") else ""
    (tmp_path / "a.txt").write_bytes(f"{mark}a line\n".encode(encoding))
    name = encoding.removesuffix("-BE")
    with pytest.raises(Refusal, match=f"is {name}; convert it to UTF-8 first: iconv -f {name} -t UTF-8"):
        open_corpus(f"text:{tmp_path / 'a.txt'}", cache)


def test_a_change_of_one_byte_is_another_fingerprint(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc\n" * 500)
    before = make(f"text:{path}").fingerprint
    path.write_text("abc\n" * 499 + "abd\n")
    after = make(f"text:{path}").fingerprint
    assert before["text"] != after["text"] and before["tokens"] != after["tokens"]


def test_one_huge_line_is_read_in_pieces(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    with open(path, "wb") as file:
        for _ in range(60):
            file.write(b"x" * 2**20)
    tracemalloc.start()
    made = make(f"text:{path}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(made.tokens.values()) == 60 * 2**20 + 3
    assert peak < 40 * 2**20, f"{peak / 2**20:.0f} MiB at once"


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("stdlb", {}, "unknown data 'stdlb': did you mean stdlib"),
        ("text:", {}, "unknown data 'text:'"),
        ("text:~no-one/a.txt", {}, "data=text:~no-one/a.txt: there is no home folder ~no-one here"),
        ("stdlib", {"cache": "~no-one/a"}, "data.cache=~no-one/a: there is no home folder ~no-one here"),
        ("stdlib", {"tokenizer": "byte"}, "unknown data.tokenizer 'byte': did you mean bytes"),
        ("stdlib", {"length": 0}, "data.length=0: must be at least 1"),
        ("stdlib", {"split": "train"}, "only data=tfds:NAME has them"),
        ("tfds:tiny_shakespere", {}, "unknown tfds dataset 'tiny_shakespere': did you mean tiny_shakespeare"),
    ],
)
def test_a_mistake_in_the_data_section_is_refused_in_one_line(
    make: Make, name: str, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(Refusal, match=words):
        make(name, **changes)


def test_a_dataset_that_cannot_be_fetched_is_refused_at_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TFDS would retry for minutes."""
    import socket

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))

    def unreachable(*_: object) -> None:
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(
        Refusal,
        match=r"cannot be reached: fetch https://.*/input.txt elsewhere, put it at .*downloads/.*or give data=text",
    ):
        make("tfds:tiny_shakespeare")


def test_a_missing_or_different_dataset_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: tuple[Path, str]
) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo

    folder, host = served

    class Fetched(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        @property
        def url_infos(self) -> dict[str, UrlInfo]:
            return {f"{host}/a.txt": UrlInfo(1, hashlib.sha256(b"a").hexdigest(), "a.txt")}

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples(dl_manager.download(f"{host}/a.txt"))}

        def _generate_examples(self, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
            yield 0, {"text": Path(path).read_bytes()}

    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(Refusal, match=r"tfds:fetched could not be fetched \(.*404.*\): prepare it elsewhere"):
        make("tfds:fetched")
    (folder / "a.txt").write_bytes(b"b")
    with pytest.raises(Refusal, match=r"tfds:fetched was fetched with another checksum \(.*a.txt.*\): prepare"):
        make("tfds:fetched")


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="the source text of tiny_shakespeare is not here")
def test_tiny_shakespeare_through_its_real_builder(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorflow_datasets.core.download import resource

    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    name = resource.get_dl_fname(url, hashlib.sha256(SHAKESPEARE.read_bytes()).hexdigest())
    (tmp_path / "downloads").mkdir()
    shutil.copy(SHAKESPEARE, tmp_path / "downloads" / name)
    (tmp_path / "downloads" / f"{name}.INFO").write_text(json.dumps({"original_fname": "input.txt", "urls": [url]}))
    made = make("tfds:tiny_shakespeare", validation_rows=4)
    assert sum(made.tokens.values()) == SHAKESPEARE.stat().st_size + 3
    assert made.documents == {"train": 1, "validation": 1, "test": 1}
    for changes, words in [({"split": "trian"}, "unknown data.split"), ({"field": "txt"}, "unknown data.field")]:
        with pytest.raises(Refusal, match=words):
            make("tfds:tiny_shakespeare", **changes)
    half = make("tfds:tiny_shakespeare", split="train[:100%]")
    assert half.tokens["train"] < made.tokens["train"]


def test_a_large_tfds_dataset_is_divided_without_holding_it(
    make: Make, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """lm1b and c4 lack one of the three splits, and are larger than the memory."""
    import tensorflow_datasets as tfds

    class OnlyTrain(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "url": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            yield from ((i, {"text": _long(i), "url": f"{i}"}) for i in range(400))

    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(Refusal, match=r"has the text fields text, url: set --config.data.field"):
        make("tfds:only_train")
    assert capfd.readouterr().out == "", "standard output is for results"
    corpus = open_corpus("tfds:only_train", cache, "text")
    tracemalloc.start()
    kept = {split: [next(iter(document))[:9] for document in corpus.documents(split)] for split in SPLITS}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20, f"{peak / 2**20:.0f} MiB of 38 at once"
    sources = [in_memory(f"{i:09d}", _long(i)) for i in range(400)]
    for split, documents in kept.items():
        assert documents == [next(iter(document))[:9] for _, document in divide(sources, split)]
    few = everything(open_corpus("tfds:only_train", cache, "text", "train[:2]"))
    assert b"".join(few["train"] + few["validation"] + few["test"]).count(b"x") == 200_000 - 18


def test_the_fingerprint_of_a_tfds_dataset_is_of_its_text(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders hold the same version of a dataset, of the same lengths, with one letter changed."""
    import tensorflow_datasets as tfds

    class Edited(tfds.core.GeneratorBasedBuilder):
        VERSION, words = tfds.core.Version("1.0.0"), "first words\n" * 99

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples(), "extra": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            yield from ((i, {"text": self.words}) for i in range(3))

    def prepared(folder: str) -> dict[str, str]:
        monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / folder))
        return make("tfds:edited", split="train").fingerprint

    first = prepared("a")
    assert prepared("again") == first, "the same text, prepared elsewhere"
    monkeypatch.setattr(Edited, "words", "other words\n" * 99)
    assert prepared("a") == first, "prepared before"
    other = prepared("b")
    assert other["text"] != first["text"] and other["tokens"] != first["tokens"]
    (records,) = (tmp_path / "b").glob("edited/1.0.0/*-train.*")
    records.unlink()
    with pytest.raises(Refusal, match=r"data=tfds:edited: '/.*-train.* cannot be read .*prepare it again"):
        prepared("b")


def _long(i: int) -> bytes:
    return f"{i:09d}".encode().ljust(100_000, b"x")


@pytest.mark.all
@pytest.mark.skipif(not REVIEWS.exists(), reason="the zip of film reviews is not here")
def test_a_zip_of_two_thousand_documents(make: Make) -> None:
    made = make(f"text:{REVIEWS}")
    assert sum(made.documents.values()) == 2000 and min(made.documents.values()) > 80
    assert sum(made.tokens.values()) == pytest.approx(7.8e6, rel=0.01)
    fewer = make(f"text:{REVIEWS}", tokenizer="bpe:2000")
    assert fewer.documents == made.documents and 3 < fewer.bytes_per_token < 5
