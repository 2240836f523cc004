"""What a person sees while a run trains: one live line in a terminal, plain lines in a log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 15.0  # between plain lines, where there is no terminal


class TrainingProgress:
    """A context manager that shows step, loss, tokens/s and time left of one run."""

    def __init__(self, title: str, start: int, steps: int):
        self.title, self.steps = title, steps
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[says]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            disable=not self.live,
        )
        self.task = self.bar.add_task(title, total=steps, completed=start, says="")
        self.says = {"train": "", "validation": "", "rate": ""}
        self.began, self.start, self.printed = time.monotonic(), start, 0.0

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, step: int, *, train: float | None = None, validation: float | None = None, rate: float = 0) -> None:
        """The state after `step` updates: nats (mean over members) and tokens/s, whichever is new."""
        for name, value in (("train", train), ("validation", validation)):
            if value is not None:
                self.says[name] = f"{name} {value:.3f} nats"
        if rate:
            self.says["rate"] = f"{rate:,.0f} tokens/s"
        says = "  ".join(filter(None, self.says.values()))
        self.bar.update(self.task, completed=step, says=says)
        now = time.monotonic()
        if not self.live and now - self.printed > LINE_SECONDS:
            self.printed = now
            done = step - self.start
            left = f"  {(now - self.began) / done * (self.steps - step):.0f} s left" if done else ""
            print(f"{self.title}: step {step}/{self.steps}  {says}{left}", file=sys.stderr, flush=True)
