"""What a run writes besides its checkpoints: config, manifest, metrics, TensorBoard events, status."""

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from rope_lm.refusal import Refusal

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "ml-collections",
    "numpy",
)
# What may change when a run goes on: none of it changes what a step computes, but for `steps`, which is the point.
MAY_CHANGE = ("steps", "every.log", "every.save", "mesh", "data.cache")
UNSHOWN = ("step", "member", "split", "tokens", "seconds")  # what TensorBoard gets no curve of
FACTS = (
    "host",
    "python",
    "versions",
    "device",
    "deterministic",
    "commit",
    "diff",
)  # of a segment; a change of one is told


def provenance(argv: Sequence[str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of the command, the code and the machine."""
    return {
        "commit": _git("rev-parse", "HEAD").decode().strip(),
        "diff": _digest(_git("diff", "HEAD")),
        "argv": list(argv),
        "overrides": {key: _plain(value) for key, value in overrides.items()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def _git(*arguments: str) -> bytes:
    """What git says of this checkout; nothing where it is none, or git is not there."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return b""
    try:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if content else ""


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


class Board:
    """One TensorBoard event file; what it hides of the files before it begins at step `purge`.

    Written by the thread that calls: tensorboardX's own writer has a thread and a queue of ten, and on a full disk the
    thread ends and the caller waits for ever. Raises OSError when an event does not fit on the disk.
    """

    def __init__(self, folder: Path, segment: int, purge: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files by name: a later segment comes later, also where the clock was moved back.
        stamps = [int(time.time()), *(int(each.name.split(".")[3]) for each in folder.glob("events.out.tfevents.*.*"))]
        name = f"events.out.tfevents.{max(stamps):010d}.{segment:04d}.{socket.gethostname()}"
        self.file = RecordWriter(str(folder / name))
        for fields in ({"file_version": "brain.Event:2"}, {"session_log": SessionLog(status=SessionLog.START)}):
            self._event(step=purge, **fields)
        self.file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each of the curves."""
        for tag, value in values.items():
            self._event(step=step, summary=scalar(tag, value))
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def _event(self, **fields: Any) -> None:
        self.file.write(Event(wall_time=time.time(), **fields).SerializeToString())


class Journal:
    """The writer of one run directory. A context manager; use `Journal.open`."""

    def __init__(self, workdir: Path, config: dict, manifest: dict, lock: Any):
        self.workdir, self.config, self.manifest, self.lock = workdir, config, manifest, lock
        self.boards: list[Board] = []
        self.seconds = 0.0  # of training, up to the step that the run began or went on from

    @classmethod
    def open(cls, workdir: str | Path, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> "Journal":
        """The journal of `workdir`, which is made if it is not there; writes nothing in it yet.

        Raises Refusal when it cannot be written, is in use by a process, or holds a run of another config or text.
        """
        workdir = Path(workdir).absolute()
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = open(workdir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held until the run ends)
        except OSError as error:
            raise Refusal(f"workdir {str(workdir)!r} cannot be written ({error.strerror}): choose another") from error
        try:
            _take(lock, workdir)
            journal = cls(workdir, _plain(config), _plain(manifest), lock)
            journal._check_same_run()
        except BaseException:
            lock.close()
            raise
        return journal

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        for board in self.boards:
            with suppress(OSError):  # what a full disk did not take was raised when it was written
                board.close()
        self.lock.close()  # lets go of it

    @property
    def begun(self) -> bool:
        """Whether `begin` was called, and so whether the status is this process's."""
        return bool(self.boards)

    @property
    def status(self) -> dict[str, Any] | None:
        """What status.json says; None before the first run."""
        return read_json(self.workdir / "status.json")

    @property
    def saved(self) -> int:
        """The last step of which a whole checkpoint was on disk; 0 before the first."""
        said = self.status or {"step": 0}
        return said.get("saved", said["step"])  # earlier versions did not say it

    def begin(self, step: int, diverged: Mapping[str, int]) -> None:
        """Says that the run begins, or goes on, from `step`, at which these members had `diverged`: a segment in the
        manifest, and status "running"."""
        before = read_json(self.workdir / "manifest.json") or {}
        segment = {"step": step, "time": _now(), "pid": os.getpid(), "argv": self.manifest.get("argv", [])}
        segment |= {key: self.manifest.get(key) for key in FACTS}
        config = read_json(self.workdir / "config.json") or self.config
        segment["changed"] = {key: [was, now] for key, was, now in differences(config, self.config)}
        segments = before.get("segments", [])
        if segments:
            for key in FACTS:
                if segments[-1].get(key) != segment[key]:
                    was, now = segments[-1].get(key), segment[key]
                    print(f"{self.workdir.name}: goes on with another {key}: {was} -> {now}", file=sys.stderr)
        if (stood := (self.status or {"step": 0})["step"]) > step:
            print(f"{self.workdir.name}: stood at step {stood}, goes on from step {step}", file=sys.stderr)
        # A field that only a later moment knows (compile_seconds) is kept from the segment before.
        self.manifest = {**before, **self.manifest, "segments": [*segments, segment]}
        # The config last: a kill between the two must not lose what `changed` says.
        write_json(self.workdir / "manifest.json", self.manifest)
        write_json(self.workdir / "config.json", self.config)
        self._status("running", "", step, diverged, step)
        path = self.workdir / "metrics.jsonl"
        _cut_torn_line(path)
        # Of the rows that count, the last that was written: an attempt that was given up may have taken longer.
        rows = [row for row in read_rows(path) if row["step"] <= step]
        self.seconds = next((row["seconds"] or 0.0 for row in reversed(rows)), 0.0)
        folders = [self.workdir / "tensorboard" / f"member_{each['member']}" for each in self.manifest["members"]]
        self.boards = [Board(folder, len(segments), step + 1) for folder in folders]

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to metrics.jsonl and to TensorBoard. Raises OSError when they do not fit on the disk."""
        rows = [{key: _finite(value) for key, value in row.items()} for row in rows]
        append(self.workdir / "metrics.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        for row in rows:
            shown = {key: value for key, value in row.items() if key not in UNSHOWN and value is not None}
            self.boards[row["member"]].write(
                row["step"], {f"{row['split']}/{key}": value for key, value in shown.items()}
            )

    def note_saved(self, step: int) -> None:
        """Says that the checkpoint of `step` is whole on disk: a run that is killed, or fails, was saved there."""
        write_json(self.workdir / "status.json", {**self.status, "saved": step})

    def update(self, **fields: Any) -> None:
        """Adds to the manifest what is known only now."""
        self.manifest |= fields
        write_json(self.workdir / "manifest.json", self.manifest)

    def finish(self, status: str, why: str, step: int, diverged: Mapping[str, int]) -> dict[str, Any]:
        """Writes how the run ended, and returns it. On a full disk the status is lost, what ended the run is not."""
        try:
            return self._status(status, why, step, diverged, self.saved)
        except OSError as error:
            print(f"{self.workdir}: status.json cannot be written: {error}", file=sys.stderr)
            return {"status": status, "why": why, "step": step}

    def _status(self, status: str, why: str, step: int, diverged: Mapping[str, int], saved: int) -> dict[str, Any]:
        said = {"status": status, "why": why, "step": step, "saved": saved, "steps": self.config.get("steps")}
        said |= {"diverged": dict(diverged), "time": _now()}
        write_json(self.workdir / "status.json", said)
        return said

    def _check_same_run(self) -> None:
        config = read_json(self.workdir / "config.json")
        manifest = read_json(self.workdir / "manifest.json")
        if config is None or manifest is None:
            return
        changed = [
            f"{key}: {was} -> {now}"
            for key, was, now in differences(config, self.config)
            if not any(key == each or key.startswith(each + ".") for each in MAY_CHANGE)
        ]
        for key, was, now in differences(manifest["data"]["fingerprint"], self.manifest["data"]["fingerprint"]):
            changed.append(f"fingerprint of {key}: {was[:16]} -> {now[:16]}")
        if changed:
            raise Refusal(
                f"workdir {str(self.workdir)!r} holds a run of another config ({'; '.join(changed)}): use another "
                "--workdir, or give the config of that run"
            )


def differences(a: Any, b: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) for every leaf in which two nested dicts differ; a missing one is None."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = dict.fromkeys([*a, *b])
        return [each for key in keys for each in differences(a.get(key), b.get(key), f"{at}.{key}" if at else key)]
    return [] if a == b else [(at, a, b)]


def append(path: Path, text: str) -> None:
    """Appends all of the text or, where the disk is full, none of it. Raises OSError then."""
    with open(path, "ab", buffering=0) as file:
        size, left = file.tell(), text.encode()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none where there is no file. Raises Refusal for a line that is no row."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [_row(path, number, line) for number, line in enumerate(file, 1)]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if {"step", "seconds", "member", "split"} <= row.keys():
            return row
    except (ValueError, AttributeError):
        pass
    raise Refusal(
        f"{path} line {number} is damaged ({line.strip()[:40]!r}): delete that line, or use another --workdir"
    )


def read_json(path: Path) -> Any:
    """The value in the file, None where there is none. Raises Refusal for a file that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Refusal(f"{path} is damaged ({error}): restore it, or use another --workdir") from error


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or none of it, and returns when it is on disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _cut_torn_line(path: Path) -> None:
    """A process that was killed while it wrote leaves half a line: it is no row."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def holder(workdir: Path) -> str | None:
    """Which process trains in `workdir` now; None where none does. Raises Refusal where files cannot be locked."""
    path = workdir / ".lock"
    try:
        with open(path, "r+", encoding="utf-8") as lock:
            return _holder(lock, fcntl.LOCK_EX)
    except FileNotFoundError:
        return None
    except OSError:  # it may only be read
        with open(path, encoding="utf-8") as lock:
            return _holder(lock, fcntl.LOCK_SH)


def _holder(lock: Any, how: int) -> str | None:
    """Locks the file, or says who holds it. The operating system lets go of a lock when its holder ends, however.

    NFS gives an exclusive lock only on a file that is open for writing, a shared one only on one open for reading.
    """
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        return lock.read().strip() or "another process"
    except OSError as error:
        raise Refusal(
            f"{lock.name} cannot be locked ({error.strerror}): use a --workdir on a file system that has locks"
        ) from error
    return None


def _take(lock: Any, workdir: Path) -> None:
    if by := _holder(lock, fcntl.LOCK_EX):
        raise Refusal(f"workdir {str(workdir)!r} is in use by {by}: wait for it, or use another --workdir")
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
