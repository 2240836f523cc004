"""Checkpoints: written by Orbax, verified by our own checksums.

Orbax restores flipped bits without an error, so the sha256 of every file is stored and compared.
"""

import hashlib
import json
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

from rope_lm import migrate
from rope_lm.refusal import Refusal
from rope_lm.run_directory import write_json

SUMS = "sha256.json"  # of every other file; written last, so a checkpoint without it was never finished
ABOUT = "about.json"  # shapes and dtypes of the tree, and the note


class Saved(NamedTuple):
    """The content of a checkpoint."""

    step: int
    tree: Any
    note: Any  # as given to `save`


class Checkpoints:
    """The checkpoints of a run, in folders named after their steps. A context manager.

    `saved` is the last step known to be saved, 0 before the first. `tell` is called from another thread with the step
    of each checkpoint, once it is complete on disk. Opening removes saves that were killed before they were complete.

    A checkpoint is *whole* if all of its files match their checksums.
    """

    def __init__(self, directory: Path, keep: int, saved: int = 0, tell: Callable[[int], None] = lambda step: None):
        self.directory, self.keep, self.saved, self.tell = directory.absolute(), keep, saved, tell
        self.directory.mkdir(parents=True, exist_ok=True)
        for folder in _by_step(self.directory):
            if not (folder / SUMS).exists() and int(folder.name) > saved:  # at `saved` or before, it is damage
                shutil.rmtree(folder)
        self.orbax = _checkpointer()
        self.sealing: threading.Thread | None = None
        self.failure: BaseException | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if self.sealing:
            self.sealing.join()
        self.orbax.close()

    def restore(self, abstract: Any) -> Saved | None:
        """Return the newest whole checkpoint, with the shardings of `abstract`; None if the run never saved one.

        A damaged checkpoint is reported and moved to `bad/`, and the one before it is used. Raises Refusal if the run
        has saved but no whole checkpoint is left, and if shapes or dtypes differ from `abstract`.
        """
        faults = []
        for folder in _by_step(self.directory):
            fault = damage(folder)
            if fault is None:
                return _load(self.orbax, folder, abstract)
            faults.append(f"step {folder.name}: {fault}")
            print(f"checkpoint {faults[-1]}; moved to {self._set_aside(folder)}", file=sys.stderr)
        bad = faults or [f"bad/{path.name}" for path in sorted((self.directory / "bad").glob("*"))]
        if bad:  # also if they were set aside earlier: a person decides whether to train from the start
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
        """Return the newest whole checkpoint of a run that may be training; nothing in the folder changes.

        Raises Refusal if none is whole, and if the tree differs from `abstract`.
        """
        for folder in _by_step(directory) if directory.is_dir() else ():
            if damage(folder) is None:
                with _checkpointer() as orbax:
                    return _load(orbax, folder.absolute(), abstract)
        raise Refusal(f"{str(directory)!r} holds no whole checkpoint: train the run, or let it save once")

    def save(self, step: int, tree: Any, note: Any = None) -> None:
        """Save a tree and a JSON note. Returns once Orbax has copied the tree, and writes it in the background.

        Raises the error of the previous save, if it failed.
        """
        self.wait()
        folder = self.directory / str(step)
        if folder.exists():
            return  # already sealed: the run was stopped at this step before
        folder.mkdir()
        write_json(folder / ABOUT, {"tree": _describe(tree), "note": note})
        self.orbax.save(folder / "state", args=ocp.args.PyTreeSave(tree))
        self.sealing = threading.Thread(target=self._seal, args=(folder,), daemon=True)
        self.sealing.start()

    def wait(self) -> None:
        """Wait until the last save and its checksums are on disk. Raises its error if it failed, as on a full disk."""
        if self.sealing:
            self.sealing.join()
            self.sealing = None
        if self.failure:
            failure, self.failure = self.failure, None
            raise failure

    def _seal(self, folder: Path) -> None:
        try:
            self.orbax.wait_until_finished()  # the only place where Orbax reports a full disk
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            write_json(folder / SUMS, {path.relative_to(folder).as_posix(): _sha256(path) for path in files})
            self.tell(int(folder.name))
        except BaseException as error:
            self.failure = _as_os_error(error, folder)
            shutil.rmtree(folder, ignore_errors=True)
            return
        for old in _by_step(self.directory)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)  # one that cannot be removed does no harm

    def _set_aside(self, folder: Path) -> Path:
        bad = self.directory / "bad"
        bad.mkdir(exist_ok=True)
        number = sum(path.name.startswith(folder.name) for path in bad.iterdir())
        return folder.rename(bad / f"{folder.name}.{number}")


def damage(folder: Path) -> str | None:
    """Return a description of the first damaged file of a checkpoint; None if all match their checksums."""
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


def _checkpointer() -> ocp.AsyncCheckpointer:
    """Return Orbax's writer and reader of trees of arrays.

    An array replicated over devices is written from one of them. Orbax's default writes a piece from each, and
    compiles a program per shape for that, which takes longer than compiling the step of a small model.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))


def _load(orbax: ocp.AsyncCheckpointer, folder: Path, abstract: Any) -> Saved:
    """Read a whole checkpoint. Raises Refusal if its tree differs from `abstract`, which gives the shardings."""
    about = json.loads((folder / ABOUT).read_text())
    stored, wanted = {migrate.leaf(path): kind for path, kind in about["tree"].items()}, _describe(abstract)
    for path in sorted(stored.keys() | wanted.keys()):
        if stored.get(path) != wanted.get(path):
            raise Refusal(
                f"checkpoint {folder} holds {path} as {stored.get(path, 'nothing')}, this program has "
                f"{wanted.get(path, 'nothing')}: it is of another model; use another workdir"
            )
    # The tree as it lies on disk, with our leaves: names may be of an earlier version, containers are Orbax's own.
    leaves, structure = jax.tree.flatten(abstract)
    by_name = dict(zip(wanted, leaves, strict=True))
    metadata = orbax.metadata(folder / "state").item_metadata.tree
    target = jax.tree_util.tree_map_with_path(lambda path, _: by_name[_name(path)], metadata)
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    restored = orbax.restore(folder / "state", args=ocp.args.PyTreeRestore(target, arguments))
    found = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(restored)}
    return Saved(int(folder.name), jax.tree.unflatten(structure, [found[name] for name in wanted]), about["note"])


def _name(path: tuple[Any, ...]) -> str:
    return migrate.leaf(jax.tree_util.keystr(path, simple=True, separator="/"))


def _describe(tree: Any) -> dict[str, str]:
    return {_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree.leaves_with_path(tree)}


def _by_step(directory: Path) -> list[Path]:
    """Return the checkpoints, newest first; by step, because a clock can be wrong."""
    found = [path for path in directory.iterdir() if path.is_dir() and path.name.isdigit()]
    return sorted(found, key=lambda path: -int(path.name))


def _as_os_error(error: BaseException, folder: Path) -> BaseException:
    """Return an OSError for an error of the operating system, which Orbax reports only as text."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) if code else error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
