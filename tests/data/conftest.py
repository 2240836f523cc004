"""Fixtures of the tests of data."""

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rope_lm import data

Make = Callable[..., data.Data]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its address on this machine."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def make(cache: str) -> Make:
    """`data.make` with small values for everything that a test does not choose."""
    section = {"tokenizer": "bytes", "length": 16, "batch": 2, "validation_rows": 2, "split": "", "field": ""}

    def made(name: str, **changes: object) -> data.Data:
        return data.make(**{"name": name, "cache": cache} | section | changes)

    return made
