"""enwik8 from a small zip in its format; only the official one's sum is in the code."""

import hashlib
import time
import zipfile
from pathlib import Path

import pytest

from rope_lm.data import enwik8, tokens
from rope_lm.data.datasets import Archive
from rope_lm.data.documents import SPLITS, Corpus, Request, bounds
from rope_lm.data.tokenizer import Bytes
from rope_lm.refusal import Refusal
from tests.data.conftest import Make

# Longer than a piece, with letters of several bytes, and without an end of a line near the cuts.
TEXT = "".join(f'<page id="{i}">[[東京]] is the {i}th &amp; ' for i in range(200_000)).encode()[:6_000_000]
NOBODY = "http://127.0.0.1:9/enwik8.zip"  # nothing listens on the discard port


def packed(path: Path, url: str, text: bytes = TEXT) -> Archive:
    """Write a zip to `path` and return its facts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            zipfile.ZipInfo("enwik8"), text, zipfile.ZIP_DEFLATED
        )  # without a date, for the same bytes each time
    return Archive(url, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def opened(archive: Archive, cache: Path) -> Corpus:
    return enwik8.corpus(Request("enwik8", 16, "", "", cache), archive)


def everything(corpus: Corpus) -> list[bytes]:
    documents = [[b"".join(document) for document in corpus.documents(split)] for split in SPLITS]
    assert [len(each) for each in documents] == [1, 1, 1], "a document for each split"
    return [each for (each,) in documents]


def test_the_official_zip_is_pinned_and_divided_into_90_5_and_5_million_bytes() -> None:
    assert enwik8.ENWIK8.url == "http://mattmahoney.net/dc/enwik8.zip"
    assert len(enwik8.ENWIK8.sha256) == 64 and enwik8.ENWIK8.size == 36_445_475
    found = [bounds(100_000_000, split) for split in SPLITS]
    assert found == [(0, 90_000_000), (90_000_000, 95_000_000), (95_000_000, 100_000_000)]


def test_a_zip_in_the_manual_dir(tmp_path: Path) -> None:
    archive = packed(tmp_path / "tfds/downloads/manual/enwik8.zip", NOBODY)
    train, validation, test = everything(opened(archive, tmp_path))
    assert train == TEXT[:5_400_000] and validation == TEXT[5_400_000:5_700_000] and test == TEXT[5_700_000:]
    made = tokens.prepare(opened(archive, tmp_path), Bytes(), tmp_path)
    assert made.bytes == {"train": 5_400_000, "validation": 300_000, "test": 300_000}
    assert made.documents == {"train": 1, "validation": 1, "test": 1}


def test_a_zip_is_fetched_once(tmp_path: Path, served: tuple[Path, str], capfd: pytest.CaptureFixture[str]) -> None:
    folder, url = served
    archive = packed(folder / "enwik8.zip", f"{url}/enwik8.zip")
    assert b"".join(everything(opened(archive, tmp_path))) == TEXT
    assert capfd.readouterr().err.count("fetching http://127.0.0.1") == 1
    (folder / "enwik8.zip").unlink()
    assert b"".join(everything(opened(archive, tmp_path))) == TEXT


def test_without_a_network_it_is_refused_at_once(tmp_path: Path) -> None:
    archive = packed(tmp_path / "elsewhere.zip", NOBODY)
    refusal(archive, tmp_path, "cannot be reached")  # the first time TFDS is imported
    began = time.monotonic()
    said = refusal(archive, tmp_path, r"127.0.0.1 cannot be reached: fetch http://.*/enwik8.zip elsewhere, put it at")
    assert time.monotonic() - began < 10, "a second, on a machine that does nothing else; TFDS alone tries for minutes"
    where = said.split("put it at ")[1].split(",")[0]
    packed(Path(where), NOBODY)
    assert b"".join(everything(opened(archive, tmp_path))) == TEXT, "the advice is enough"


def test_another_zip_is_refused_wherever_it_comes_from(tmp_path: Path, served: tuple[Path, str]) -> None:
    folder, url = served
    archive = packed(folder / "enwik8.zip", f"{url}/enwik8.zip")
    packed(folder / "enwik8.zip", f"{url}/enwik8.zip", TEXT[:-1] + b"!")
    refusal(archive, tmp_path / "a", "/enwik8.zip is not the official zip, whose sha256 is")
    packed(tmp_path / "b/tfds/downloads/manual/enwik8.zip", f"{url}/enwik8.zip", TEXT[1:])
    refusal(archive, tmp_path / "b", "manual/enwik8.zip is not the official zip, whose sha256 is")
    (folder / "enwik8.zip").unlink()
    refusal(archive, tmp_path / "c", "could not be fetched .*404.* put it at")
    assert not list(tmp_path.glob("*/tfds/enwik8/*/1.0.0")), "nothing was prepared"


def refusal(archive: Archive, cache: Path, words: str) -> str:
    with pytest.raises(Refusal, match=words) as refused:
        next(opened(archive, cache).documents("train"))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_name_in_a_config(make: Make, tmp_path: Path) -> None:
    """data=enwik8 is the official zip: another one in its place is refused."""
    packed(tmp_path / "tfds/downloads/manual/enwik8.zip", NOBODY)
    with pytest.raises(Refusal, match=r"is not the official zip, whose sha256 is 547994d9980ebed1"):
        make("enwik8", cache=str(tmp_path))
