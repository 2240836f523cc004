"""TensorBoard event files."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar


class EventFile:
    """One event file of a folder.

    From step `purge` on, TensorBoard hides the points of earlier files, because this file has those steps again. Events
    are written in the calling thread, because tensorboardX's own writer uses a queue, and blocks its caller forever on
    a full disk. Raises OSError when an event does not fit on the disk.
    """

    def __init__(self, folder: Path, segment: int, purge: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, so a later segment needs a later stamp, even if the
        # clock was set back.
        stamps = [int(time.time()), *(int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*.*"))]
        name = f"events.out.tfevents.{max(stamps):010d}.{segment:04d}.{socket.gethostname()}"
        self.file = RecordWriter(str(folder / name))
        self._write(Event(step=purge, file_version="brain.Event:2"))
        self._write(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))
        self.file.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point at `step` to the curve of each tag."""
        for tag, value in values.items():
            self._write(Event(step=step, summary=scalar(tag, value)))
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self.file.write(event.SerializeToString())
