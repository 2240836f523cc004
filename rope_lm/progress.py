"""Progress of a training run: one live line in a terminal, plain lines in a log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 15.0  # between plain lines


class TrainingProgress:
    """Shows step, loss, tokens/s and time left of one run on stderr. A context manager."""

    def __init__(self, title: str, start: int, steps: int):
        self.title, self.start, self.steps = title, start, steps
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[latest]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=(console := Console(stderr=True)),
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=steps, completed=start, latest="")
        self.latest = {"train": "", "validation": "", "rate": ""}
        self.began, self.printed = time.monotonic(), 0.0

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, step: int, *, train: float | None = None, validation: float | None = None, rate: float = 0) -> None:
        """Show the state after `step` updates: losses in nats (mean over members) and tokens/s, whichever are new."""
        for name, value in (("train", train), ("validation", validation)):
            if value is not None:
                self.latest[name] = f"{name} {value:.3f} nats"
        if rate:
            self.latest["rate"] = f"{rate:,.0f} tokens/s"
        latest = "  ".join(filter(None, self.latest.values()))
        self.bar.update(self.task, completed=step, latest=latest)
        now = time.monotonic()
        if self.bar.disable and now - self.printed > LINE_SECONDS:
            self.printed, done = now, step - self.start
            left = f"  {(now - self.began) / done * (self.steps - step):.0f} s left" if done else ""
            print(f"{self.title}: step {step}/{self.steps}  {latest}{left}", file=sys.stderr, flush=True)
