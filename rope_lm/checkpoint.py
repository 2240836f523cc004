"""Checkpoints: Orbax writes them, our own sums say whether they are whole."""

import hashlib
import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rope_lm.journal import write_json
from rope_lm.refusal import Refusal

SUMS = "sha256.json"  # written last: a checkpoint without it was never finished


class Checkpoints:
    """The checkpoints of a run, in folders named by their step. A context manager.

    Orbax restores flipped bits without a word, so every file's sha256 is kept and checked. Opening removes what a
    killed save left behind.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory, self.keep = directory.absolute(), keep
        self.directory.mkdir(parents=True, exist_ok=True)
        for folder in self._folders():
            if not (folder / SUMS).exists():
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

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """The newest whole checkpoint, as (step, tree) with the shapes, dtypes and shardings of `abstract`.

        None where there are none at all. One that is not whole is named, moved to `bad/` and the one before it is
        used. Raises Refusal when none is whole, and when the tree is another one than `abstract`.
        """
        folders = self._folders()
        faults = []
        for folder in folders:
            fault = damage(folder)
            if fault is None:
                self._check_tree(folder, abstract)
                return int(folder.name), self.orbax.restore(folder / "state", abstract)
            faults.append(f"step {folder.name}: {fault}")
            print(f"checkpoint {faults[-1]}; moved to {self._set_aside(folder)}", file=sys.stderr)
        if faults:
            raise Refusal(
                f"no checkpoint in {self.directory} is whole ({'; '.join(faults)}): delete the run's folder to train "
                "from the start, or bring a whole checkpoint back"
            )
        return None

    def save(self, step: int, tree: Any) -> None:
        """Returns when Orbax holds the tree; it is written, summed and sealed behind. A failure of the save before
        it is raised here."""
        self.wait()
        folder = self.directory / str(step)
        if folder.exists():
            return  # sealed already: a run that was stopped at this very step
        folder.mkdir()
        self.orbax.save(folder / "state", tree)
        self.sealing = threading.Thread(target=self._seal, args=(folder, _describe(tree)), daemon=True)
        self.sealing.start()

    def wait(self) -> None:
        """Until everything is on disk and sealed. Raises what made a save fail (a full disk, say)."""
        if self.sealing:
            self.sealing.join()
            self.sealing = None
        if self.failure:
            failure, self.failure = self.failure, None
            raise failure

    def _seal(self, folder: Path, tree: dict[str, str]) -> None:
        try:
            self.orbax.wait_until_finished()  # the only place where Orbax tells of a full disk
            write_json(folder / SUMS, {"tree": tree, "files": _sums(folder)})
            for old in self._folders()[self.keep :]:
                shutil.rmtree(old)
        except BaseException as error:
            self.failure = error
            shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """The newest first; by step, since a clock can be wrong."""
        found = [each for each in self.directory.iterdir() if each.is_dir() and each.name.isdigit()]
        return sorted(found, key=lambda each: -int(each.name))

    def _set_aside(self, folder: Path) -> Path:
        bad = self.directory / "bad"
        bad.mkdir(exist_ok=True)
        number = sum(each.name.startswith(folder.name) for each in bad.iterdir())
        return folder.rename(bad / f"{folder.name}.{number}")

    def _check_tree(self, folder: Path, abstract: Any) -> None:
        stored, wanted = json.loads((folder / SUMS).read_text())["tree"], _describe(abstract)
        for path in sorted(stored.keys() | wanted.keys()):
            if stored.get(path) != wanted.get(path):
                raise Refusal(
                    f"checkpoint {folder} holds {path} as {stored.get(path, 'nothing')}, this program has "
                    f"{wanted.get(path, 'nothing')}: it is of another model; use another workdir"
                )


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None where each is what it was when it was written."""
    try:
        known = json.loads((folder / SUMS).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{SUMS} is missing or torn"
    for name, digest in known.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is not as it was written"
    return None


def _describe(tree: Any) -> dict[str, str]:
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in jax.tree.leaves_with_path(tree)}


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    return {each.relative_to(folder).as_posix(): _sha256(each) for each in files}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
