"""The host loop: a config becomes a run directory."""

import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rope_lm import attention, data, execution, machine, positional, sharding, training, transformer
from rope_lm.checkpoint import Checkpoints
from rope_lm.data import Data, batches
from rope_lm.journal import Journal
from rope_lm.progress import TrainingProgress
from rope_lm.refusal import Refusal, unknown
from rope_lm.settings import bind

ENDED = ("finished", "stopped", "diverged")  # statuses of a run whose last step is saved
TOP = ("steps", "seeds")
SECTIONS = ("data", "objective", "model", "optimizer", "every", "mesh")


@dataclass(frozen=True)
class Every:
    """After how many steps something happens."""

    evaluate: int
    save: int
    log: int

    def __post_init__(self) -> None:
        for name, steps in asdict(self).items():
            if steps < 1:
                raise Refusal(f"every.{name}={steps}: must be at least 1, in steps")


@dataclass(frozen=True)
class Member:
    """One member of the ensemble: a seed (initial values and data order) and a peak learning rate."""

    member: int
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class Plan:
    """Everything that is known of a run before anything compiles."""

    config: Mapping[str, Any]
    steps: int
    every: Every
    members: tuple[Member, ...]
    data: Data
    mesh: Mesh
    model: Mapping[str, Any]  # the config's section, with what "auto" stands for on this platform
    kernel: str  # that computes attention
    program: training.Program
    parameters: int  # of one member
    parameters_position: int  # of which the encoding's own
    flops_per_token: float  # forward and backward

    def memory(self, mesh: Mapping[str, int]) -> int:
        """Bytes that training needs on each device of a mesh of these sizes, estimated."""
        layers, remat = self.model["layers"], self.model["remat"]
        batch, length, accumulate = self.data.batch, self.data.length, self.config["optimizer"]["accumulation_steps"]
        platform = self.mesh.devices.flat[0].platform
        return training.memory(
            self.model,
            self.parameters,
            causal=self.program.objective.causal,
            vocabulary=self.program.objective.vocabulary,
            length=length,
            batch=batch,
            members=len(self.members) // mesh["member"],
            mesh=mesh,
            execution=execution.choose(
                platform, mesh, layers, remat, batch, accumulate, length, self.program.execution.in_turn
            ),
        )


def plan(config: Mapping[str, Any]) -> Plan:
    """As `draft`, for the devices that are here. Raises Refusal also where they have too little memory."""
    made = draft(config)
    if why := lack(made):
        raise Refusal(why)
    return made


def draft(config: Mapping[str, Any]) -> Plan:
    """Checks the whole config, prepares its text and builds its program, compiling nothing.

    Raises Refusal for whatever cannot be run, but for a lack of memory.
    """
    for key in config:
        if key not in (*TOP, *SECTIONS):
            raise unknown("key in the config", key, (*TOP, *SECTIONS))
    for key in SECTIONS:
        if not isinstance(config.get(key), Mapping):
            raise Refusal(f"config lacks the section {key}: start from configs/lm.py")
    _top(**bind(_top, {key: config[key] for key in TOP if key in config}, "config", {}))
    every = Every(**bind(Every, config["every"], "every", {}))
    mesh = sharding.make(**bind(sharding.make, config["mesh"], "mesh", {}))
    model = dict(config["model"])
    bind(transformer.Transformer, model, "model", {"vocabulary": 0, "causal": True, "rngs": None})
    rates = bind(training.optimizer.make, config["optimizer"], "optimizer", {"steps": 0, "decays": None})[
        "learning_rate"
    ]
    members = tuple(
        Member(i, seed, rate) for i, (seed, rate) in enumerate((s, r) for s in config["seeds"] for r in rates)
    )
    encoding = positional.encoding(model["position"])
    platform = mesh.devices.flat[0].platform
    head_size = model["width"] // max(1, model["heads"])  # a model without heads is refused below
    apart = mesh.shape["member"]
    model["attention"] = attention.resolve(model["attention"], platform, model["dtype"], encoding, head_size, apart)
    build = {"steps": config["steps"], "members": len(members), "mesh": mesh}
    # Once with any vocabulary, so that a mistake in the model is named before minutes are spent on preparing text.
    section = bind(data.make, config["data"], "data", {})
    sections = model, config["optimizer"], config["objective"]
    training.make(*sections, vocabulary=2, length=section["length"], batch=section["batch"], **build)
    text = data.make(**section)
    program = training.make(*sections, vocabulary=text.vocabulary, length=text.length, batch=text.batch, **build)
    sizes = {key: model[key] for key in ("width", "heads", "layers", "hidden", "position", "attention", "block")}
    counted = {"causal": program.objective.causal, "vocabulary": program.objective.vocabulary, "length": text.length}
    count = lambda tree: sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(tree))  # noqa: E731
    return Plan(
        config=config,
        steps=config["steps"],
        every=every,
        members=members,
        data=text,
        mesh=mesh,
        model=model,
        kernel=attention.make(model["attention"]).kernel,
        program=program,
        parameters=count(program.abstract.params),
        parameters_position=count(program.abstract.params.get("position", {})),
        flops_per_token=transformer.flops_per_token(**sizes, **counted),
    )


def lack(plan: Plan) -> str:
    """What a step needs, what a device has and what to lower, where its memory is too small; "" where it is not."""
    needs, has, count = plan.memory(plan.mesh.shape), capacity(plan.mesh.devices.flat[0]), plan.mesh.size
    if not has or needs <= has:
        return ""
    where = "one device" if count == 1 else f"each of {count} devices"
    return f"a step needs about {needs / 1e9:.1f} GB on {where} of {has / 1e9:.1f} GB: {_what_to_lower(plan)}"


def _what_to_lower(plan: Plan) -> str:
    count = len(plan.members)
    fewer = f"train fewer than {count} members at once, " if count > 1 else ""
    return (
        f"lower data.batch ({plan.data.batch}) or data.length ({plan.data.length}), raise optimizer.accumulation_steps, "
        f"{fewer}or shard over more devices with mesh.fsdp"
    )


def capacity(device: jax.Device) -> int:
    """Bytes of memory of a device; of the host, shared by its devices, where it is the CPU; 0 where it is not known."""
    if device.platform == "cpu":
        return machine.memory() // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def _top(steps: int, seeds: tuple[int, ...]) -> None:
    """Raises Refusal for a number of steps or seeds that cannot be trained."""
    if steps < 1:
        raise Refusal(f"steps={steps}: must be at least 1")
    if min(seeds) < 0 or max(seeds) >= 2**31:
        raise Refusal(f"seeds={tuple(seeds)}: each must be at least 0 and below 2**31")
    if len(set(seeds)) < len(seeds):
        raise Refusal(f"seeds={tuple(seeds)}: each may stand there once; equal seeds are the same run twice")


def manifest(plan: Plan, provenance: Mapping[str, Any], deterministic: bool) -> dict[str, Any]:
    """What the run directory says of a run besides its config."""
    devices = plan.mesh.devices.flatten()
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
        "kernel": plan.kernel,
        "execution": plan.program.execution._asdict(),
        "precision": plan.config["model"]["dtype"],
        "deterministic": compiler_options(devices[0].platform, deterministic),
    }


def compiler_options(platform: str, deterministic: bool) -> dict[str, bool] | None:
    """What XLA is told so that the same program gives the same bits; None where it is told nothing.

    On a GPU sums otherwise come in the order in which threads finish. A CPU or a TPU needs no telling: an empty dict.
    """
    if not deterministic:
        return None
    return {"xla_gpu_deterministic_ops": True} if platform == "gpu" else {}


def train(
    config: Mapping[str, Any], workdir: str | Path, provenance: Mapping[str, Any], deterministic: bool = False
) -> dict[str, Any]:
    """Trains until config["steps"], going on from the last checkpoint in `workdir`; returns the run's status.

    A finished run is not run again. Raises Refusal for a mistake, before anything compiles; MemoryError, with what to
    lower, where a device has too little of it; OSError for a full disk.
    """
    planned = plan(config)
    with Journal.open(workdir, config, manifest(planned, provenance, deterministic)) as record:
        status = record.status
        if record.saved > planned.steps:
            raise Refusal(
                f"steps={planned.steps}: the run in {str(record.workdir)!r} is at step {record.saved} already: give at "
                f"least {record.saved}, or another --workdir"
            )
        if status and (status["status"] == "diverged" or _is_done(status, planned.steps)):
            return status
        step, lost = 0, {}
        try:
            planned.data.coder.save(record.workdir)
            folder = record.workdir / "checkpoints"
            with _signals() as stop, Checkpoints(folder, 2, record.saved, record.note_saved) as checkpoints:
                loop = Loop(planned, record, checkpoints, stop)
                try:
                    outcome = loop.run()
                except jax.errors.JaxRuntimeError as error:
                    if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
                        raise
                    raise MemoryError(f"a device is out of memory: {_what_to_lower(planned)}") from error
                finally:
                    step, lost = loop.done, _steps(loop.diverged)
        except BaseException as error:
            if record.begun or record.status is None:  # what an earlier process said stays, if nothing was begun
                record.finish("failed", f"{type(error).__name__}: {error}", step, lost)
            raise
        return record.finish(*outcome)


def _is_done(status: Mapping[str, Any], steps: int) -> bool:
    return status["status"] == "finished" and status["step"] >= steps


class Clock:
    """Seconds of training: compiling, evaluating and saving stop it."""

    def __init__(self, seconds: float):
        self.before, self.since = seconds, math.inf

    def start(self) -> None:
        self.since = time.monotonic()

    def stop(self) -> None:
        self.before, self.since = self.read(), math.inf

    def read(self) -> float:
        return self.before + max(0.0, time.monotonic() - self.since)


class Loop:
    """Train, log, evaluate, save. The metrics of a step are fetched after the next one was dispatched."""

    def __init__(self, plan: Plan, record: Journal, checkpoints: Checkpoints, stop: list[int]):
        self.plan, self.record, self.checkpoints, self.stop = plan, record, checkpoints, stop
        self.done, self.state = 0, None
        self.consumed = [""] * len(plan.members)  # data.batches.chain of all batches up to `done`
        self.pending: tuple[int, training.Metrics] | None = None  # a step to be logged that may not be computed yet
        self.diverged = np.full(len(plan.members), -1)  # the step at which each member was lost, -1 where it is not
        self.kept = 0.0  # seconds that the host spent on logging and saving

    @property
    def lost(self) -> np.ndarray:
        """bool [M]: the members that are not finite any more."""
        return self.diverged >= 0

    def run(self) -> tuple[str, str, int, dict[str, int]]:
        """To the last step or a signal; returns the status, why, the step, and where each lost member diverged."""
        plan, every = self.plan, self.plan.every
        if saved := self.checkpoints.restore(plan.program.abstract):
            self.done, self.state, self.consumed = saved
        else:
            self.state = initial(plan)
        self.diverged = np.array(self.state.diverged)
        self.record.begin(self.done, _steps(self.diverged))
        self.clock = Clock(self.record.seconds)
        self.logged = self.done, self.record.seconds
        began = time.monotonic()
        self.rows = jnp.asarray(plan.data.validation)
        options = self.record.manifest["deterministic"]
        step = plan.program.step.lower(self.state, _rows(plan)).compile(options)
        self.evaluate = plan.program.evaluate.lower(self.state, self.rows).compile(options)
        self.record.update(compile_seconds=round(time.monotonic() - began, 3))

        source = plan.data.batches([member.seed for member in plan.members], self.done, plan.steps)
        with closing(source), TrainingProgress(self.record.workdir.name, self.done, plan.steps) as self.progress:
            if self.done == 0:
                self._validate()
            self.clock.start()
            for batch in source:
                self.state, metrics = step(self.state, jax.device_put(batch.rows, plan.program.rows))
                self._log()
                self.consumed = batches.chain(self.consumed, batch)
                self.done += 1
                if self.done % every.log == 0 or self.done == plan.steps:
                    self.pending = self.done, metrics
                if self.done == plan.steps or self.stop or self.lost.all():
                    break
                if self.done % every.evaluate == 0 or self.done % every.save == 0:
                    self._pause()
                    if self.done % every.evaluate == 0:
                        self._validate()
                    if self.done % every.save == 0:
                        self._save()
                    self.clock.start()
            self._pause()
            if self.done == plan.steps or self.done % every.evaluate == 0:
                self._validate()
            self._save()
            with self._bookkeeping():
                self.checkpoints.wait()
        self.record.update(wall_seconds=round(time.monotonic() - began, 3), bookkeeping_seconds=round(self.kept, 3))
        return self._outcome()

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.kept += time.monotonic() - began

    def _save(self) -> None:
        with self._bookkeeping():
            self.checkpoints.save(self.done, self.state, self.consumed)
            self.record.update(batches={"step": self.done, "sha256": self.consumed})

    def _write(self, rows: list[dict[str, Any]], **shown: float) -> None:
        """Rows to the journal, and their mean to the person who watches."""
        with self._bookkeeping():
            self.record.write(rows)
            self.progress.show(rows[0]["step"] if rows else self.done, **shown)

    def _pause(self) -> None:
        """Waits for the device, stops the clock and writes what is pending."""
        jax.block_until_ready(self.state)
        self.clock.stop()
        self._log()

    def _log(self) -> None:
        """Writes the metrics of the pending step, waiting until it is computed."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        metrics = jax.device_get(metrics)
        seconds, data = self.clock.read(), self.plan.data
        tokens = data.batch * data.length
        speed = (step - self.logged[0]) * tokens * len(self.plan.members) / max(seconds - self.logged[1], 1e-9)
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
                "learning_rate": float(metrics.rate[i]),
                "tokens_per_second": round(speed, 1),
            }
            for i in np.flatnonzero(~self.lost).tolist()
        ]
        self.diverged = np.asarray(metrics.diverged)
        self._write(rows, train=_mean(rows), rate=speed)

    def _validate(self) -> None:
        """Writes the loss of every member on the validation rows."""
        nats, tokens = jax.device_get(self.evaluate(self.state, self.rows))
        count = int(tokens.sum())
        means = nats.astype(np.float64).sum(-1) / count
        rows = [
            {
                "step": self.done,
                "member": i,
                "split": "validation",
                "nats": float(means[i]),
                "tokens": count,
                "seconds": round(self.clock.read(), 4),
                "bits_per_byte": float(means[i]) / math.log(2) / self.plan.data.bytes_per_token,
            }
            for i in np.flatnonzero(~self.lost).tolist()
        ]
        self._write(rows, validation=_mean(rows))

    def _outcome(self) -> tuple[str, str, int, dict[str, int]]:
        diverged = _steps(np.asarray(self.state.diverged))
        lost = ", ".join(f"member {i} at step {at}" for i, at in diverged.items())
        if len(diverged) == len(self.plan.members):
            return "diverged", f"no member is finite any more: {lost}", self.done, diverged
        if self.done < self.plan.steps:
            why = f"{signal.Signals(self.stop[0]).name}: run the same command again to go on"
            return "stopped", why, self.done, diverged
        return "finished", f"diverged: {lost}" if lost else "", self.done, diverged


def _steps(diverged: np.ndarray) -> dict[str, int]:
    """By the number of each lost member, the step at which it diverged."""
    return {str(i): int(at) for i, at in enumerate(diverged) if at >= 0}


def initial(plan: Plan) -> training.State:
    """The state at step 0."""
    seeds = np.array([member.seed for member in plan.members], np.uint32)
    return plan.program.init(seeds, np.array([member.learning_rate for member in plan.members], np.float32))


class Stepper:
    """A compiled training step with a state and the first batch, called over and over."""

    def __init__(self, plan: Plan):
        self.plan, self.state = plan, initial(plan)
        batch = next(plan.data.batches([member.seed for member in plan.members], 0, 1))
        self.rows = jax.device_put(batch.rows, plan.program.rows)
        began = time.perf_counter()
        self.step = plan.program.step.lower(self.state, self.rows).compile()
        self.compile = time.perf_counter() - began  # seconds
        memory = self.step.memory_analysis()
        fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
        self.peak_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + fresh  # of each device

    def __call__(self) -> training.Metrics:
        self.state, metrics = self.step(self.state, self.rows)
        return metrics


def rounds_of(calls: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, np.ndarray]:
    """Seconds [rounds] of each call over rounds A B C A B C, so that a noisy machine hits all alike; one warms up."""
    taken = [[_clock(call) for call in calls.values()] for _ in range(rounds + 1)]
    return dict(zip(calls, np.array(taken[1:]).T, strict=True))


def _clock(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def seconds_per_step(plan: Plan) -> float:
    """Of all members together: the median of five steps after the first, compilation excluded."""
    return float(np.median(rounds_of({"step": Stepper(plan)}, rounds=5)["step"]))


def _rows(plan: Plan) -> jax.ShapeDtypeStruct:
    shape = (len(plan.members), plan.data.batch, plan.data.length + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=plan.program.rows)


def _mean(rows: list[dict[str, Any]]) -> float:
    return float(np.mean([row["nats"] for row in rows])) if rows else math.nan


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are appended to: the loop ends after its step, saves and says so.

    A second signal changes nothing, so that it cannot tear the save that the first one caused.
    """
    received: list[int] = []
    old = {
        each: signal.signal(each, lambda number, _: received.append(number)) for each in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)
