"""From a plan to a run directory: the training loop."""

import math
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rope_lm import signals, training
from rope_lm.checkpoint import Checkpoints
from rope_lm.data import batches
from rope_lm.plan import Plan, initial, plan
from rope_lm.progress import TrainingProgress
from rope_lm.refusal import Refusal
from rope_lm.run_directory import RunDirectory, finite_or_none, write_json

ENDED = ("finished", "stopped", "diverged")  # statuses of a run whose last step is saved


def train(
    config: Mapping[str, Any], workdir: str | Path, provenance: Mapping[str, Any], deterministic: bool = False
) -> dict[str, Any]:
    """Train until config["steps"], from the last checkpoint in `workdir` if there is one; return the run's status.

    A run that finished or diverged is left as it is. Raises Refusal for a mistake in the config or a device with too
    little memory, before anything is trained; MemoryError if a device runs out of memory while training; OSError for a
    full disk.
    """
    planned = plan(config, deterministic)
    with RunDirectory(workdir, config, manifest(planned, provenance, deterministic)) as directory:
        status = directory.status
        if directory.saved > planned.steps:
            raise Refusal(
                f"steps={planned.steps}: the run in {str(directory.workdir)!r} is at step {directory.saved} already: "
                f"give at least {directory.saved}, or another --workdir"
            )
        if status and (
            status["status"] == "diverged" or (status["status"] == "finished" and status["step"] >= planned.steps)
        ):
            return status
        loop = Loop(planned, directory)
        try:
            outcome = loop.run()
        except BaseException as error:
            # The status of an earlier process stays if this one began nothing.
            if directory.begun or directory.status is None:
                directory.finish("failed", f"{type(error).__name__}: {error}", loop.done, _steps(loop.diverged))
            raise
        return directory.finish(*outcome)


def manifest(plan: Plan, provenance: Mapping[str, Any], deterministic: bool) -> dict[str, Any]:
    """Return the metadata of a run that is known before it begins, except the config."""
    devices = plan.mesh.devices.flatten()
    execution = plan.program.execution._asdict()
    return {
        "schema": 1,
        **provenance,
        "members": [asdict(member) for member in plan.members],
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "mesh": dict(plan.mesh.shape),
        "data": {
            "name": plan.config["data"]["name"],
            "fingerprint": dict(plan.data.fingerprint),
            "documents": dict(plan.data.documents),
            "tokens": dict(plan.data.tokens),
            "bytes_per_token": plan.data.bytes_per_token,
            "vocabulary": plan.data.vocabulary,
        },
        "parameters": plan.parameters,
        "parameters_position": plan.parameters_position,
        "flops_per_token": plan.flops_per_token,
        "kernel": execution["kernel"],
        "execution": execution,
        "precision": plan.config["model"]["dtype"],
        "deterministic": execution["compiler_options"] if deterministic else None,
    }


class Clock:
    """Seconds of training. It is stopped while the run compiles, evaluates and saves."""

    def __init__(self, seconds: float):
        self.before, self.since = seconds, math.inf

    def start(self) -> None:
        self.since = time.monotonic()

    def stop(self) -> None:
        self.before, self.since = self.read(), math.inf

    def read(self) -> float:
        return self.before + max(0.0, time.monotonic() - self.since)


class Loop:
    """Train, log, evaluate and save. A step's metrics are fetched after the next step was dispatched."""

    def __init__(self, plan: Plan, directory: RunDirectory):
        self.plan, self.directory = plan, directory
        self.done = 0
        self.state: Any = None  # a training.State, once there is one
        self.consumed = [""] * len(plan.members)  # data.batches.chain of all batches up to step `done`
        self.pending: tuple[int, training.Metrics] | None = None  # metrics of a step that may not be computed yet
        self.diverged = np.full(len(plan.members), -1)  # the step at which a member diverged; -1 if it did not
        self.documents: dict[str, Any] = {}  # losses by document at the last evaluation
        self.host_seconds = 0.0  # spent on logging and saving

    @property
    def lost(self) -> np.ndarray:
        """bool [M]: members that diverged."""
        return self.diverged >= 0

    def run(self) -> tuple[str, str, int, dict[str, int]]:
        """Train until the last step or a signal; return the arguments of `RunDirectory.finish`."""
        folder = self.directory.workdir / "checkpoints"
        self.plan.data.coder.save(self.directory.workdir)
        saved = self.directory.saved
        self.stop: list[int] = []  # signals that came; a second one cannot tear the save that the first one caused
        with (
            signals.answered(self.stop.append),
            _memory_errors(self.plan),
            Checkpoints(folder, 2, saved, self.directory.note_saved) as self.checkpoints,
        ):
            self._restore()
            began = time.monotonic()
            self.compiled = self.plan.compiled
            self._begin()
            self._train()
            seconds = {"wall_seconds": time.monotonic() - began, "bookkeeping_seconds": self.host_seconds}
            self.directory.update({key: round(value, 3) for key, value in seconds.items()})
            return self._outcome()

    def _restore(self) -> None:
        if saved := self.checkpoints.restore(self.plan.program.abstract):
            self.done, self.state, self.consumed = saved
        else:
            self.state = initial(self.plan)
        self.diverged = np.array(self.state.diverged)

    def _begin(self) -> None:
        self.directory.begin(self.done, _steps(self.diverged))
        self.directory.update({"compile_seconds": round(self.compiled.seconds, 3)})
        self.clock = Clock(self.directory.seconds)
        self.logged = self.done, self.directory.seconds

    def _train(self) -> None:
        plan, every = self.plan, self.plan.every
        source: Any = plan.data.batches([member.seed for member in plan.members], self.done, plan.steps)
        with closing(source), TrainingProgress(self.directory.workdir.name, self.done, plan.steps) as self.progress:
            if self.done == 0:
                self._validate()
            self.clock.start()
            for batch in source:
                rows = jax.device_put(batch.rows, plan.program.rows)
                self.state, metrics = self.compiled.step(self.state, rows)
                self._log()  # the step before, while the device computes this one
                self.consumed = batches.chain(self.consumed, batch)
                self.done += 1
                if self.done % every.log == 0 or self.done == plan.steps:
                    self.pending = self.done, metrics
                if self.done == plan.steps or self.stop or self.lost.all():
                    break
                evaluate, save = self.done % every.evaluate == 0, self.done % every.save == 0
                if evaluate or save:
                    self._pause()
                    if evaluate:
                        self._validate()
                    if save:
                        self._save()
                    self.clock.start()
            self._pause()
            if self.done == plan.steps or self.done % every.evaluate == 0:
                self._validate()
            self._save()
            with self._timed():
                if self.documents:
                    write_json(self.directory.workdir / "documents.json", self.documents)
                self.checkpoints.wait()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.host_seconds += time.monotonic() - began

    def _save(self) -> None:
        with self._timed():
            self.checkpoints.save(self.done, self.state, self.consumed)
            self.directory.update({"batches": {"step": self.done, "sha256": self.consumed}})

    def _pause(self) -> None:
        """Wait for the device, stop the clock and write the pending metrics."""
        jax.block_until_ready(self.state)
        self.clock.stop()
        self._log()

    def _log(self) -> None:
        """Write the metrics of the pending step, if there is one, waiting until it is computed."""
        if self.pending is None:
            return
        (step, pending), self.pending = self.pending, None
        metrics, seconds = jax.device_get(pending), self.clock.read()
        tokens = self.plan.data.batch * self.plan.data.length
        rate = (step - self.logged[0]) * tokens * len(self.plan.members) / max(seconds - self.logged[1], 1e-9)
        self.logged = step, seconds
        rows = [
            {
                "step": step,
                "member": i,
                "split": "train",
                "nats": float(metrics.nats[i]),
                "tokens": tokens,
                "seconds": round(seconds, 4),
                "gradient_norm": float(metrics.gradient_norm[i]),
                "learning_rate": float(metrics.learning_rate[i]),
                "tokens_per_second": round(rate, 1),
            }
            for i in np.flatnonzero(~self.lost).tolist()
        ]
        self.diverged = np.asarray(metrics.diverged)
        with self._timed():
            self.directory.write(rows)
            self.progress.show(step, train=_mean(rows), rate=rate)

    def _validate(self) -> None:
        """Write each member's loss on the validation rows, and keep the losses by document in memory."""
        data = self.plan.data
        found = jax.device_get(self.compiled.evaluate(self.state, data.validation, self.plan.documents))
        tokens = int(found.tokens.sum())
        means = found.nats.astype(np.float64).sum(-1) / tokens
        rows = [
            {
                "step": self.done,
                "member": i,
                "split": "validation",
                "nats": float(means[i]),
                "tokens": tokens,
                "seconds": round(self.clock.read(), 4),
                "bits_per_byte": float(means[i]) / math.log(2) / data.bytes_per_token,
            }
            for i in np.flatnonzero(~self.lost).tolist()
        ]
        self.documents = {
            "schema": 1,
            "step": self.done,
            "tokens": found.document_tokens.astype(int).tolist(),
            "nats": [[finite_or_none(nats) for nats in member] for member in found.document_nats.tolist()],
        }
        with self._timed():
            self.directory.write(rows)
            self.progress.show(self.done, validation=_mean(rows))

    def _outcome(self) -> tuple[str, str, int, dict[str, int]]:
        diverged = _steps(np.asarray(self.state.diverged))
        lost = ", ".join(f"member {i} at step {step}" for i, step in diverged.items())
        if len(diverged) == len(self.plan.members):
            return "diverged", f"no member is finite any more: {lost}", self.done, diverged
        if self.done < self.plan.steps:
            why = f"{signal.Signals(self.stop[0]).name}: run the same command again to go on"
            return "stopped", why, self.done, diverged
        return "finished", f"diverged: {lost}" if lost else "", self.done, diverged


def _steps(diverged: np.ndarray) -> dict[str, int]:
    """Return the step at which each diverged member did so, by member number."""
    return {str(i): int(step) for i, step in enumerate(diverged) if step >= 0}


def _mean(rows: list[dict[str, Any]]) -> float:
    return float(np.mean([row["nats"] for row in rows])) if rows else math.nan


@contextmanager
def _memory_errors(plan: Plan) -> Iterator[None]:
    """Raise MemoryError, with advice, in place of XLA's error for a device that is out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
            raise
        raise MemoryError(f"a device is out of memory: {plan.smaller()}") from error
