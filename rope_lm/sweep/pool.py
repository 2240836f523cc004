"""Training on this machine: each arm in its own process, one after another or side by side."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from rope_lm import run_directory, signals
from rope_lm.signals import STOPPED
from rope_lm.sweep import arms, shares
from rope_lm.sweep.shares import Share
from rope_lm.sweep.tables import about

MISTAKE = 2  # exit status of a run that was refused
ATTEMPTS = 3  # at an arm that is killed: memory may be free by then, and each attempt resumes at the last checkpoint


class Local:
    """The launcher of this machine. It trains `at_once` arms side by side, each on an equal share of the machine.

    `root` is the folder of the sweep, and `flags` are passed to scripts.train. The configs are in root/plan/ARM.json.
    The sweep survives if the process of an arm is killed or runs out of memory.
    """

    command = (sys.executable, "-m", "scripts.train")

    def __init__(self, root: Path, at_once: int, flags: Sequence[str]):
        self.root, self.at_once, self.flags, self.shares = root, at_once, flags, shares.equal(at_once)
        self.console = Console(stderr=True)
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = False  # True after a signal: no other arm begins

    def measure(self, arm: str) -> float:
        """Return the seconds of one training step on a share of the machine; 0 if the arm cannot begin.

        It is measured in a separate process, so that this one does not hold the device. Raises KeyboardInterrupt after
        a signal.
        """
        share = self.shares[0]
        with self._passing_signals_on(), ThreadPoolExecutor(1, initializer=share.take) as thread:
            child = thread.submit(self._start, arm, ["--time"], share, subprocess.PIPE, subprocess.DEVNULL).result()
            output, code = child.communicate()[0], self._end(child)
        if self.stopped or code == STOPPED:
            raise KeyboardInterrupt
        return float(output) if code == 0 else 0.0

    def train(self, names: Sequence[str], seconds_left: Mapping[str, float]) -> dict[str, int]:
        """Train the arms and return their exit statuses. `seconds_left`: training time per arm, to be shown."""
        codes, waiting = dict.fromkeys(names, STOPPED), iter(enumerate(names, 1))

        def work(share: Share) -> None:
            share.take()
            while not self.stopped and (following := next(waiting, None)):
                number, arm = following
                place = f"[{number}/{len(names)}]"
                left = sum(seconds_left[name] for name in names[number - 1 :]) / self.at_once
                note = f", {about(left)} left" if number > 1 else ""
                self.console.print(f"[bold]\\{place} {arm}[/bold]{note}", highlight=False)
                codes[arm] = self._attempt(arm, share, f"{place} " if self.at_once > 1 else "")
                if codes[arm] == STOPPED:
                    self.stopped = True

        with self._passing_signals_on(), ThreadPoolExecutor(self.at_once) as threads:
            list(threads.map(work, self.shares))
        return codes

    def _attempt(self, arm: str, share: Share, prefix: str) -> int:
        """Train an arm, retrying if it is killed (up to ATTEMPTS times in all); return its exit status."""
        code, killed = STOPPED, 0
        while killed < ATTEMPTS:
            self._wait(arm)
            if self.stopped:
                return STOPPED
            code = self._train(arm, share, prefix)
            if code == -signal.SIGKILL and not self.stopped:
                self.console.print(f"{arm}: killed", highlight=False)
                killed += 1
            elif code != MISTAKE or not run_directory.holder(self.root / arm):  # else another process was there first
                break
        return code

    def _wait(self, arm: str) -> None:
        """Wait while another process trains the arm, such as one whose sweep was killed and which keeps training."""
        known = None
        while not self.stopped and (holder := run_directory.holder(self.root / arm)):
            if holder != known:
                known = holder
                self.console.print(f"{arm}: waiting for {holder}, which trains it already", highlight=False)
            time.sleep(0.5)

    def _train(self, arm: str, share: Share, prefix: str) -> int:
        """Train an arm in a process. With a prefix, print it before each line of the process's stderr."""
        flags = [f"--workdir={self.root / arm}", *self.flags]
        child = self._start(arm, flags, share, None, subprocess.PIPE if prefix else None)
        for line in child.stderr or ():
            print(f"{prefix}{line}", end="", file=sys.stderr, flush=True)
        code = self._end(child)
        if code < 0:
            self._note_killed(arm, signal.Signals(-code).name)
        return code

    def _start(
        self, arm: str, flags: Sequence[str], share: Share, output: int | None, errors: int | None
    ) -> subprocess.Popen[str]:
        config = f"--config=configs/resolved.py:{self.root / 'plan' / arm}.json"
        child = subprocess.Popen(
            [*self.command, *flags, config],
            cwd=Path(__file__).parents[2],
            env=os.environ | dict(share.environment),
            stdout=output,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        )
        self.running.add(child)
        if self.stopped:  # by a signal that came before the child was known
            child.send_signal(signal.SIGTERM)
        return child

    def _end(self, child: subprocess.Popen[str]) -> int:
        code = child.wait()
        self.running.discard(child)
        # A process that such a signal ends was not ready to answer it yet, and had begun nothing.
        return STOPPED if -code in signals.STOP else code

    def _note_killed(self, arm: str, name: str) -> None:
        """Write the status of a run that was killed. It is kept if the process had not begun to train."""
        status = arms.status(self.root, arm)
        if status["status"] in ("lost", "not run"):
            memory = "probably for lack of memory if not by you: lower data.batch, data.length or seeds"
            why = f"killed by {name}: {memory if name == 'SIGKILL' else 'it crashed; its last lines above say why'}"
            with suppress(OSError):  # a full disk
                run_directory.write_json(self.root / arm / "status.json", {**status, "status": "failed", "why": why})

    @contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        """Pass signals on to the running processes, which save and exit, while this process waits for them."""

        def pass_on(number: int) -> None:
            self.stopped = True
            for child in list(self.running):
                child.send_signal(number)

        with signals.answered(pass_on):
            yield
