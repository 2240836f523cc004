"""Tokens on disk: exact, and intact or made again, also with several processes and after a kill."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rope_lm.data import files, tokenizer, tokens
from rope_lm.data.documents import Request
from rope_lm.refusal import Refusal


def prepare(text: Path, cache: Path) -> tokens.Tokens:
    return tokens.prepare(files.corpus(Request(f"text:{text}", 16, "", "", cache)), tokenizer.Bytes(), cache)


def test_documents_are_joined_by_the_separator(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / f"{i}.txt").write_text(f"{i}")
    made = prepare(tmp_path / "t", tmp_path)
    for split, array in made.splits.items():
        assert np.count_nonzero(array == 256) == made.documents[split]
        assert len(array) == made.bytes[split] + made.documents[split]
        assert array[-1] == 256


def test_a_changed_token_file_is_made_again(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = prepare(text, tmp_path)
    before = {split: array.copy() for split, array in made.splits.items()}
    path = next(tmp_path.glob("tokens/*/train.u16"))
    for spoil in ("flip", "truncate", "delete"):
        content = bytearray(path.read_bytes())
        if spoil == "flip":
            content[1000] ^= 1
            path.write_bytes(content)
        elif spoil == "truncate":
            path.write_bytes(content[:-100])
        else:
            path.unlink()
        again = prepare(text, tmp_path)
        assert "not as it was written; made again" in capfd.readouterr().err
        np.testing.assert_array_equal(again.splits["train"], before["train"])
    path.with_name("meta.json").write_text("{torn")
    np.testing.assert_array_equal(prepare(text, tmp_path).splits["train"], before["train"])


def test_orphans_of_a_killed_process_are_removed(tmp_path: Path, text: Path) -> None:
    prepare(text, tmp_path)
    folder = next(each for each in (tmp_path / "tokens").iterdir() if each.is_dir())
    orphan = folder.with_name(f"{folder.name}.abc.partial")
    orphan.mkdir()
    (folder / "meta.json").unlink()
    prepare(text, tmp_path)
    assert not orphan.exists() and json.loads((folder / "meta.json").read_text())


def test_concurrent_processes_all_get_the_tokens(tmp_path: Path, text: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(_count, [(text, tmp_path)] * 3)
    assert len(set(found)) == 1 and found[0] > 1000
    assert not list((tmp_path / "tokens").glob("*.partial"))


def _count(text: Path, cache: Path) -> int:
    return sum(map(len, prepare(text, cache).splits.values()))


def test_a_killed_prepare_leaves_nothing_in_use(tmp_path: Path) -> None:
    text = tmp_path / "large.txt"
    text.write_bytes(b"a line of text, and another word\n" * 6_000_000)
    code = "import sys; from tests.data.test_tokens import Path, _count; _count(*map(Path, sys.argv[1:]))"
    child = subprocess.Popen([sys.executable, "-c", code, text, tmp_path], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("tokens/*.partial/train.u16")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert list(tmp_path.glob("tokens/*.partial")), "it was killed at work"
    text.write_bytes(b"a line of text, and another word\n" * 6_000_000)
    assert _count(text, tmp_path) == 6_000_000 * 33 + 3
    assert not list(tmp_path.glob("tokens/*.partial"))


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, text: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(Refusal, match=r"data.cache=.*cannot be written .*set --config.data.cache"):
        prepare(text, tmp_path / "file")


def test_a_complete_read_only_cache_is_used(tmp_path: Path, text: Path) -> None:
    """Root may write everywhere, so a folder takes the place of the lock."""
    before = prepare(text, tmp_path)
    (lock,) = tmp_path.glob("tokens/*.lock")
    lock.unlink()
    lock.mkdir()
    assert prepare(text, tmp_path).fingerprint == before.fingerprint
    next(tmp_path.glob("tokens/*/train.u16")).unlink()
    with pytest.raises(Refusal, match=r"data.cache=.*cannot be written .*set --config.data.cache"):
        prepare(text, tmp_path)
