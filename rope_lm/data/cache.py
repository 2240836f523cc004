"""Folders that are built once and kept. Each is built atomically, by one process at a time."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rope_lm.refusal import Refusal


def prepare(cache: Path, name: str, intact: Callable[[Path], bool], build: Callable[[Path], None]) -> Path:
    """Return the folder `name` ("tokens/abc") in `cache`, built by `build` unless it is there and `intact`.

    If several processes ask at once, one builds and the others wait. Raises Refusal if the folder has to be built and
    the cache cannot be written.
    """
    folder = cache / name
    try:
        with alone(folder):
            if not intact(folder):
                _build(folder, build)
    except OSError as error:
        if not intact(folder):  # a read-only cache has no lock, and nobody writes to it
            raise Refusal(
                f"data.cache={str(cache)!r} cannot be written ({error.strerror or error}): free some space there or "
                "set --config.data.cache to another folder"
            ) from error
    return folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the operating system releases when the process ends, even by SIGKILL."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    for orphan in folder.parent.glob(f"{folder.name}.*.partial"):
        shutil.rmtree(orphan)  # left by a killed process; the lock says that no other is at work
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        build(partial)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
