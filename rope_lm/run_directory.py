"""A run directory: how its files are written, read back and locked.

    config.json      the whole config
    manifest.json    the command, code, machine and data, and one segment for each time the run was started or resumed
    status.json      how the run ended, and the last step that was saved
    metrics.jsonl    one row per split, member and step
    documents.json   the loss of each validation document at the last evaluation
    tensorboard/     the same metrics as curves
    checkpoints/     the newest checkpoints (rope_lm/checkpoint.py)
    .lock            held by the process that trains

Files of earlier versions are read with current names (rope_lm/migrate.py).
"""

import datetime
import fcntl
import json
import math
import os
import socket
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rope_lm import migrate, settings
from rope_lm.refusal import Refusal
from rope_lm.tensorboard import EventFile

# Config keys that may change when a run goes on: except for `steps`, none of them changes what a step computes.
MAY_CHANGE = ("steps", "every.log", "every.save", "mesh", "data.cache")
# Facts recorded for each segment. A change is reported when the run goes on.
FACTS = ("host", "python", "versions", "environment", "device", "deterministic", "commit", "diff")
UNPLOTTED = ("step", "member", "split", "tokens", "seconds")  # keys of a row without a TensorBoard curve


class RunDirectory:
    """The writer of one run directory, which it creates if needed and locks. A context manager.

    Apart from the lock, nothing is written before `begin`. Raises Refusal if the directory cannot be written, if a
    process is using it, or if it holds a run with another config or text.
    """

    def __init__(self, workdir: str | Path, config: Mapping[str, Any], manifest: Mapping[str, Any]):
        self.workdir = settings.folder(workdir, f"workdir {str(workdir)!r}")
        self.config, self.manifest = _plain(config), _plain(manifest)
        self.events: list[EventFile] = []
        self.seconds = 0.0  # of training, up to the step at which the run began or went on
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.workdir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held until the run ends)
        except OSError as error:
            raise Refusal(
                f"workdir {str(self.workdir)!r} cannot be written ({error.strerror}): choose another"
            ) from error
        try:
            _take(self.lock, self.workdir)
            self._check_same_run()
        except BaseException:
            self.lock.close()
            raise

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.events:
            with suppress(OSError):  # a full disk has already been reported by the write that met it
                file.close()
        self.lock.close()  # releases it

    @property
    def begun(self) -> bool:
        """True once `begin` was called: from then on the status describes this process."""
        return bool(self.events)

    @property
    def status(self) -> dict[str, Any] | None:
        """The content of status.json; None before the first run."""
        return read_json(self.workdir / "status.json")

    @property
    def saved(self) -> int:
        """The last step with a whole checkpoint on disk; 0 before the first."""
        status = self.status or {"step": 0}
        return status.get("saved", status["step"])  # earlier versions did not record it

    def begin(self, step: int, diverged: Mapping[str, int]) -> None:
        """Record that the run starts or resumes at `step`: add a segment, and set the status to "running".

        `diverged` maps the numbers of members that have already diverged to the steps at which they did.
        """
        before = migrate.manifest(read_json(self.workdir / "manifest.json") or {})
        config = migrate.config(read_json(self.workdir / "config.json") or self.config)
        segments = before.get("segments", [])
        segment = {
            "step": step,
            "time": _now(),
            "pid": os.getpid(),
            "argv": self.manifest.get("argv", []),
            **{key: self.manifest.get(key) for key in FACTS},
            "changed": {key: [was, now] for key, was, now in differences(config, self.config)},
        }
        self._report_changes(segments[-1] if segments else segment, segment)
        # Fields that are known only later (compile_seconds) keep the value of the segment before.
        self.manifest = {**before, **self.manifest, "segments": [*segments, segment]}
        # The config comes last: a kill between the two writes must not lose `changed`.
        write_json(self.workdir / "manifest.json", self.manifest)
        write_json(self.workdir / "config.json", self.config)
        self._write_status("running", "", step, diverged, step)
        path = self.workdir / "metrics.jsonl"
        _cut_torn_line(path)
        # The last row written among those that count: an attempt that was given up may have taken longer.
        rows = [row for row in read_rows(path) if row["step"] <= step]
        self.seconds = next((row["seconds"] or 0.0 for row in reversed(rows)), 0.0)
        folders = [self.workdir / "tensorboard" / f"member_{member['member']}" for member in self.manifest["members"]]
        self.events = [EventFile(folder, len(segments), step + 1) for folder in folders]

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to metrics.jsonl and to TensorBoard. Raises OSError if they do not fit on the disk."""
        finite = [{key: finite_or_none(value) for key, value in row.items()} for row in rows]
        append(self.workdir / "metrics.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in finite))
        for row in finite:
            curves = {key: value for key, value in row.items() if key not in UNPLOTTED and value is not None}
            self.events[row["member"]].add(
                row["step"], {f"{row['split']}/{key}": value for key, value in curves.items()}
            )

    def note_saved(self, step: int) -> None:
        """Record that the checkpoint of `step` is complete on disk, so that this is known even if the run is killed."""
        write_json(self.workdir / "status.json", {**(self.status or {}), "saved": step})

    def update(self, fields: Mapping[str, Any]) -> None:
        """Add fields to the manifest that were not known when the run began."""
        self.manifest |= fields
        write_json(self.workdir / "manifest.json", self.manifest)

    def finish(self, status: str, why: str, step: int, diverged: Mapping[str, int]) -> dict[str, Any]:
        """Write how the run ended, and return it. A full disk raises nothing here, so that the cause stays visible."""
        try:
            return self._write_status(status, why, step, diverged, self.saved)
        except OSError as error:
            print(f"{self.workdir}: status.json cannot be written: {error}", file=sys.stderr)
            return {"status": status, "why": why, "step": step}

    def _write_status(
        self, status: str, why: str, step: int, diverged: Mapping[str, int], saved: int
    ) -> dict[str, Any]:
        content = {"status": status, "why": why, "step": step, "saved": saved, "steps": self.config.get("steps")}
        content |= {"diverged": dict(diverged), "time": _now()}
        write_json(self.workdir / "status.json", content)
        return content

    def _report_changes(self, before: Mapping[str, Any], segment: Mapping[str, Any]) -> None:
        name, step = self.workdir.name, segment["step"]
        known = [key for key in FACTS if key in before]  # earlier versions recorded fewer
        facts = [{key: entry.get(key) for key in known} for entry in (before, segment)]
        for key, was, now in differences(facts[0], facts[1]):
            print(f"{name}: {key} changed from {was} to {now}", file=sys.stderr)
        if (stood := (self.status or {"step": 0})["step"]) > step:
            print(f"{name}: stood at step {stood}, goes on from step {step}", file=sys.stderr)

    def _check_same_run(self) -> None:
        config, manifest = (read_json(self.workdir / f"{name}.json") for name in ("config", "manifest"))
        if config is None or manifest is None:
            return
        changed = [
            f"{key}: {was} -> {now}"
            for key, was, now in differences(migrate.config(config), self.config)
            if not any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE)
        ]
        for key, was, now in differences(manifest["data"]["fingerprint"], self.manifest["data"]["fingerprint"]):
            changed.append(f"fingerprint of {key}: {was[:16]} -> {now[:16]}")
        if changed:
            raise Refusal(
                f"workdir {str(self.workdir)!r} holds a run of another config ({'; '.join(changed)}): use another "
                "--workdir, or give the config of that run"
            )


def present(workdir: Path, status: dict[str, Any]) -> dict[str, Any]:
    """Return the status of a run as it is now: "lost" instead of "running" if no process trains it any more."""
    with suppress(Refusal):  # files cannot be locked here, so nobody can tell
        if status["status"] == "running" and not holder(workdir):
            return {
                **status,
                "status": "lost",
                "why": "its process is gone; the same command resumes from its last save",
            }
    return status


def read(workdir: Path) -> tuple[Any, Any, Any]:
    """Return the config, manifest and status of a run with current names; None for a file that is missing.

    Raises Refusal for a file that is not JSON.
    """
    config, manifest, status = (read_json(workdir / f"{name}.json") for name in ("config", "manifest", "status"))
    config = settings.tuples(migrate.config(config)) if isinstance(config, dict) else config
    return config, migrate.manifest(manifest) if isinstance(manifest, dict) else manifest, status


def differences(a: Any, b: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value in a, value in b) for every leaf that differs; a value that is missing is None."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = dict.fromkeys([*a, *b])
        return [leaf for key in keys for leaf in differences(a.get(key), b.get(key), f"{at}.{key}" if at else key)]
    return [] if a == b else [(at, a, b)]


def append(path: Path, text: str) -> None:
    """Append text to a file, all of it or nothing. Raises OSError if the disk is full."""
    with open(path, "ab", buffering=0) as file:
        size, rest = file.tell(), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; none if there is no file. Raises Refusal for a damaged line.

    A last line without a newline is ignored: a process is still writing it, or was killed while writing it.
    """
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [_parse_row(path, number, line) for number, line in enumerate(file, 1) if line.endswith("\n")]


def _parse_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if {"step", "seconds", "member", "split"} <= row.keys():
            return migrate.row(row)
    except (ValueError, AttributeError):
        pass
    raise Refusal(
        f"{path} line {number} is damaged ({line.strip()[:40]!r}): delete that line, or use another --workdir"
    )


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; None if there is no file. Raises Refusal if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Refusal(f"{path} is damaged ({error}): restore it, or use another --workdir") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, and return once it is on disk."""
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


def holder(workdir: Path) -> str | None:
    """Return the name of the process training in `workdir`; None if none is. Raises Refusal if locks do not work."""
    path = workdir / ".lock"
    try:
        with open(path, "r+", encoding="utf-8") as lock:
            return _lock_or_holder(lock, fcntl.LOCK_EX)
    except FileNotFoundError:
        return None
    except OSError:  # the file is read-only
        with open(path, encoding="utf-8") as lock:
            return _lock_or_holder(lock, fcntl.LOCK_SH)


def _lock_or_holder(lock: TextIO, how: int) -> str | None:
    """Lock the file and return None, or return who holds it. The system releases a lock when its holder ends.

    NFS gives an exclusive lock only on a file open for writing, and a shared one only on a file open for reading.
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


def _take(lock: TextIO, workdir: Path) -> None:
    if by := _lock_or_holder(lock, fcntl.LOCK_EX):
        raise Refusal(f"workdir {str(workdir)!r} is in use by {by}: wait for it, or use another --workdir")
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()


def _cut_torn_line(path: Path) -> None:
    """Remove the half line that a process leaves when it is killed while writing."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def finite_or_none(value: Any) -> Any:
    """Return the value, or None for a float that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
