"""Checkpoints: Orbax writes them, our own sums say whether they are whole."""

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from rope_lm.journal import write_json
from rope_lm.refusal import Refusal

SUMS = "sha256.json"  # of every other file; written last: a checkpoint without it was never finished
ABOUT = "about.json"  # shapes and dtypes of the tree, and the note


def _save_one_copy() -> None:
    """Of an array that lies whole on several devices. Orbax would cut a piece from each, by a program for every shape,
    which take longer to compile than the step of a small model (2 s of 9 from command to end)."""
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    orbax = logging.getLogger("absl")
    before = orbax.level
    orbax.setLevel(logging.ERROR)  # it warns of what is meant: that another handler is replaced
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    orbax.setLevel(before)


_save_one_copy()


class Saved(NamedTuple):
    """What a checkpoint holds."""

    step: int
    tree: Any
    note: Any  # as it was given to `save`


class Checkpoints:
    """The checkpoints of a run, in folders named by their step. A context manager.

    Orbax restores flipped bits without a word, so every file's sha256 is kept and checked. `saved` is the last step
    that was, 0 before the first; `tell` is called with each later one, in another thread, once it is whole on disk.
    Opening removes what a killed save left behind.
    """

    def __init__(self, directory: Path, keep: int, saved: int = 0, tell: Callable[[int], None] = lambda step: None):
        self.directory, self.keep, self.saved, self.tell = directory.absolute(), keep, saved, tell
        self.directory.mkdir(parents=True, exist_ok=True)
        for folder in _by_step(self.directory):
            if not (folder / SUMS).exists() and int(folder.name) > saved:  # an earlier one lost its sums: damage
                shutil.rmtree(folder)
        self.orbax = ocp.StandardCheckpointer()
        self.sealing: threading.Thread | None = None
        self.failure: BaseException | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if self.sealing:
            self.sealing.join()
        self.orbax.close()

    def restore(self, abstract: Any) -> Saved | None:
        """The newest whole checkpoint, with the shapes, dtypes and shardings of `abstract`.

        None where none was ever saved. One that is not whole is named, moved to `bad/` and the one before it is
        used. Raises Refusal when none is whole or left, and when the tree is another one than `abstract`.
        """
        folders = _by_step(self.directory)
        faults = []
        for folder in folders:
            fault = damage(folder)
            if fault is None:
                about = json.loads((folder / ABOUT).read_text())
                _check_tree(folder, about["tree"], _describe(abstract))
                return Saved(int(folder.name), self.orbax.restore(folder / "state", abstract), about["note"])
            faults.append(f"step {folder.name}: {fault}")
            print(f"checkpoint {faults[-1]}; moved to {self._set_aside(folder)}", file=sys.stderr)
        bad = faults or [f"bad/{each.name}" for each in sorted((self.directory / "bad").glob("*"))]
        if bad:  # also when they were set aside before: training from the start is for a person to decide
            raise Refusal(
                f"no checkpoint in {self.directory} is whole ({'; '.join(bad)}): delete the run's folder to train "
                "from the start, or bring a whole checkpoint back"
            )
        if self.saved:
            raise Refusal(
                f"the run was saved at step {self.saved} and its checkpoints are gone: bring them back into "
                f"{self.directory}, or delete the run's folder to train from the start"
            )
        return None

    @staticmethod
    def read(directory: Path, abstract: Any) -> Saved:
        """The newest whole checkpoint of a run that another process may be training; changes nothing in the folder.

        Raises Refusal when there is none that is whole, and when the tree is another one than `abstract`.
        """
        for folder in _by_step(directory) if directory.is_dir() else ():
            if damage(folder) is None:
                about = json.loads((folder / ABOUT).read_text())
                _check_tree(folder, about["tree"], _describe(abstract))
                with ocp.StandardCheckpointer() as orbax:
                    return Saved(int(folder.name), orbax.restore(folder.absolute() / "state", abstract), about["note"])
        raise Refusal(f"{str(directory)!r} holds no whole checkpoint: train the run, or let it save once")

    def save(self, step: int, tree: Any, note: Any = None) -> None:
        """Returns when Orbax holds the tree; it is written, summed and sealed behind, with a note that is JSON. A
        failure of the save before it is raised here."""
        self.wait()
        folder = self.directory / str(step)
        if folder.exists():
            return  # sealed already: a run that was stopped at this very step
        folder.mkdir()
        write_json(folder / ABOUT, {"tree": _describe(tree), "note": note})
        self.orbax.save(folder / "state", tree)
        self.sealing = threading.Thread(target=self._seal, args=(folder,), daemon=True)
        self.sealing.start()

    def wait(self) -> None:
        """Until everything is on disk and sealed. Raises what made a save fail (a full disk, say)."""
        if self.sealing:
            self.sealing.join()
            self.sealing = None
        if self.failure:
            failure, self.failure = self.failure, None
            raise failure

    def _seal(self, folder: Path) -> None:
        try:
            self.orbax.wait_until_finished()  # the only place where Orbax tells of a full disk
            write_json(folder / SUMS, _sums(folder))
            self.tell(int(folder.name))
        except BaseException as error:
            self.failure = _of_the_system(error, folder)
            shutil.rmtree(folder, ignore_errors=True)
            return
        for old in _by_step(self.directory)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)  # one that stays is in nobody's way

    def _set_aside(self, folder: Path) -> Path:
        bad = self.directory / "bad"
        bad.mkdir(exist_ok=True)
        number = sum(each.name.startswith(folder.name) for each in bad.iterdir())
        return folder.rename(bad / f"{folder.name}.{number}")


def _by_step(directory: Path) -> list[Path]:
    """The checkpoints, the newest first; by step, since a clock can be wrong."""
    found = [each for each in directory.iterdir() if each.is_dir() and each.name.isdigit()]
    return sorted(found, key=lambda each: -int(each.name))


def _check_tree(folder: Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
    for path in sorted(stored.keys() | wanted.keys()):
        if stored.get(path) != wanted.get(path):
            raise Refusal(
                f"checkpoint {folder} holds {path} as {stored.get(path, 'nothing')}, this program has "
                f"{wanted.get(path, 'nothing')}: it is of another model; use another workdir"
            )


def _of_the_system(error: BaseException, folder: Path) -> BaseException:
    """As an OSError what the operating system refused: Orbax tells of it in words only."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) if code else error


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None where each is what it was when it was written."""
    try:
        known = dict(json.loads((folder / SUMS).read_text()))
    except (OSError, ValueError, TypeError):
        return f"{SUMS} is missing or torn"
    for name in sorted({ABOUT, *known}):
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            if _sha256(folder / name) != known.get(name):
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _describe(tree: Any) -> dict[str, str]:
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in jax.tree.leaves_with_path(tree)}


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    return {each.relative_to(folder).as_posix(): _sha256(each) for each in files}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
