"""Folders that are made once and kept: whole or not at all, by one process at a time."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rope_lm.refusal import Refusal


def prepare(cache: Path, name: str, whole: Callable[[Path], bool], build: Callable[[Path], None]) -> Path:
    """The folder `name` ("tokens/abc") in `cache`, as it is where `whole` says that it is, else made by `build`.

    Several processes may do so at once: one builds, the others wait for it. Raises Refusal when it has to be made and
    the cache cannot be written.
    """
    folder = cache / name
    try:
        with alone(folder):
            if not whole(folder):
                _build(folder, build)
    except OSError as error:
        if not whole(folder):  # in a cache that can only be read there is no lock, and nobody who writes
            raise Refusal(
                f"data.cache={str(cache)!r} cannot be written ({error.strerror or error}): free some space there or "
                "set --config.data.cache to another folder"
            ) from error
    return folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time; the operating system lets the next one in, even after a SIGKILL."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    for orphan in folder.parent.glob(f"{folder.name}.*.partial"):
        shutil.rmtree(orphan)  # of a process that was killed; nobody else is here
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        build(partial)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
