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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

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
FACTS = ("host", "python", "versions", "device", "commit", "diff")  # of a segment; a change of one is told


def provenance(argv: Sequence[str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of the command, the code and the machine."""
    return {
        "commit": _git("rev-parse", "HEAD").strip(),
        "diff": _digest(_git("diff", "HEAD")),
        "argv": list(argv),
        "overrides": {key: _plain(value) for key, value in overrides.items()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def _git(*arguments: str) -> str:
    """What git says of this checkout; nothing where it is none, or git is not there."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


class Journal:
    """The writer of one run directory. A context manager; use `Journal.open`."""

    def __init__(self, workdir: Path, config: dict, manifest: dict, lock: Any):
        self.workdir, self.config, self.manifest, self.lock = workdir, config, manifest, lock
        self.boards: list[SummaryWriter] = []
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
            board.close()
        self.lock.close()  # lets go of it

    @property
    def status(self) -> dict[str, Any] | None:
        """What status.json says; None before the first run."""
        return read_json(self.workdir / "status.json")

    def begin(self, step: int) -> None:
        """Says that the run begins, or goes on, from `step`: a segment in the manifest, and status "running"."""
        before = read_json(self.workdir / "manifest.json") or {}
        segment = {"step": step, "time": _now(), "pid": os.getpid(), "argv": self.manifest.get("argv", [])}
        segment |= {key: self.manifest.get(key) for key in FACTS}
        segments = before.get("segments", [])
        if segments:
            for key in FACTS:
                if segments[-1].get(key) != segment[key]:
                    was, now = segments[-1].get(key), segment[key]
                    print(f"{self.workdir.name}: goes on with another {key}: {was} -> {now}", file=sys.stderr)
        # A field that only a later moment knows (compile_seconds) is kept from the segment before.
        self.manifest = {**before, **self.manifest, "segments": [*segments, segment]}
        write_json(self.workdir / "config.json", self.config)
        write_json(self.workdir / "manifest.json", self.manifest)
        self._status("running", "", step, {})
        path = self.workdir / "metrics.jsonl"
        _cut_torn_line(path)
        rows = [row for row in read_rows(path) if row["step"] <= step]
        self.seconds = max((row["seconds"] or 0 for row in rows), default=0.0)
        # A file of its own for each segment: within one second two writers would choose the same name.
        marks = {"purge_step": step + 1, "filename_suffix": f".{len(segments)}"}
        folders = [self.workdir / "tensorboard" / f"member_{each['member']}" for each in self.manifest["members"]]
        self.boards = [SummaryWriter(str(folder), **marks) for folder in folders]

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to metrics.jsonl and to TensorBoard. Raises OSError when they do not fit on the disk."""
        rows = [{key: _finite(value) for key, value in row.items()} for row in rows]
        append(self.workdir / "metrics.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        for row in rows:
            board = self.boards[row["member"]]
            for key, value in row.items():
                if key not in ("step", "member", "split", "tokens", "seconds") and value is not None:
                    board.add_scalar(f"{row['split']}/{key}", value, row["step"])

    def update(self, **fields: Any) -> None:
        """Adds to the manifest what is known only now."""
        self.manifest |= fields
        write_json(self.workdir / "manifest.json", self.manifest)

    def finish(self, status: str, why: str, step: int, diverged: Mapping[str, int]) -> dict[str, Any]:
        """Writes how the run ended, and returns it. On a full disk the status is lost, what ended the run is not."""
        try:
            return self._status(status, why, step, diverged)
        except OSError as error:
            print(f"{self.workdir}: status.json cannot be written: {error}", file=sys.stderr)
            return {"status": status, "why": why, "step": step}

    def _status(self, status: str, why: str, step: int, diverged: Mapping[str, int]) -> dict[str, Any]:
        said = {"status": status, "why": why, "step": step, "steps": self.config.get("steps")}
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
    """The rows of a metrics.jsonl; none where there is no file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


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
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _cut_torn_line(path: Path) -> None:
    """A process that was killed while it wrote leaves half a line: it is no row."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _take(lock: Any, workdir: Path) -> None:
    """Locks the workdir. The operating system lets go of the lock when its holder ends, however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise Refusal(
            f"workdir {str(workdir)!r} is in use by {holder}: wait for it, or use another --workdir"
        ) from error
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
