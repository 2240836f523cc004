"""From a config to a checked plan of a run: its text, its program, and what they need."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rope_lm import costs, data, machine, sharding, training
from rope_lm.data import Data
from rope_lm.refusal import Refusal, unknown
from rope_lm.settings import bind

TOP = ("steps", "seeds")
SECTIONS = ("data", "objective", "model", "optimizer", "every", "mesh")


@dataclass(frozen=True)
class Every:
    """Intervals in steps."""

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


class Compiled(NamedTuple):
    """The compiled programs of a plan, and the memory that each needs on one device."""

    step: Any
    evaluate: Any
    seconds: float  # of compiling
    step_bytes: int
    evaluate_bytes: int


@dataclass(frozen=True)
class Plan:
    """Everything known about a run before it trains."""

    config: Mapping[str, Any]
    steps: int
    every: Every
    members: tuple[Member, ...]
    data: Data
    mesh: Mesh
    program: training.Program
    parameters: int  # of one member
    parameters_position: int  # of its positional encoding alone
    flops_per_token: float  # forward and backward

    @cached_property
    def documents(self) -> training.Documents:
        """The documents of the validation rows' targets, numbered from 0 in the order of the text."""
        targets = np.asarray(self.program.objective.targets(jnp.asarray(self.data.validation_documents)))
        found, number = np.unique(targets, return_inverse=True)
        return training.Documents(jnp.asarray(number.reshape(targets.shape), jnp.int32), len(found))

    @cached_property
    def compiled(self) -> Compiled:
        """The compiled programs. Raises Refusal if a device has too little memory for them."""
        self.check_state()
        began, program = time.monotonic(), self.program
        shape = (len(self.members), self.data.batch, self.data.length + 1)
        rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=program.rows)
        step = program.step.lower(program.abstract, rows).compile()
        evaluate = program.evaluate.lower(program.abstract, self.data.validation, self.documents).compile()
        compiled = Compiled(step, evaluate, time.monotonic() - began, costs.memory(step), costs.memory(evaluate))
        self._check_memory("a step", compiled.step_bytes, self.smaller())
        self._check_memory("an evaluation", compiled.evaluate_bytes, self.smaller())
        return compiled

    def check_state(self) -> None:
        """Raise Refusal if a device has too little memory for the training state, before anything compiles.

        The estimate is a lower bound: parameters, moments and the gradients of one member.
        """
        state = self.program.abstract
        needs = _bytes(state) + _bytes(state.params) // len(self.members)
        self._check_memory("the state of training", needs, self.smaller("model.width or model.layers"))

    def smaller(self, keys: str = "") -> str:
        """Return advice on how to change the config so that training needs less memory; `keys` are those to lower."""
        keys = keys or f"data.batch ({self.data.batch}) or data.length ({self.data.length})"
        fewer = f"train fewer than {len(self.members)} members at once, " if len(self.members) > 1 else ""
        return f"lower {keys}, raise optimizer.accumulation_steps, {fewer}or shard over more devices with mesh.fsdp"

    def _check_memory(self, what: str, needs: int, advice: str) -> None:
        has, count = capacity(self.mesh.devices.flat[0]), self.mesh.size
        if has and needs > has:
            where = "one device" if count == 1 else f"each of {count} devices"
            raise Refusal(f"{what} needs {needs / 1e9:.1f} GB on {where} of {has / 1e9:.1f} GB: {advice}")


def plan(config: Mapping[str, Any], deterministic: bool = False) -> Plan:
    """Return the plan of a run on the available devices, compiling nothing.

    Raises Refusal for a mistake in the config, and if the training state alone needs more memory than a device has.
    """
    planned = draft(config, deterministic)
    planned.check_state()
    return planned


def draft(config: Mapping[str, Any], deterministic: bool = False) -> Plan:
    """Return a plan without checking memory. Raises Refusal for a mistake in the config."""
    for key in config:
        if key not in (*TOP, *SECTIONS):
            raise unknown("key in the config", key, (*TOP, *SECTIONS))
    for key in SECTIONS:
        if not isinstance(config.get(key), Mapping):
            raise Refusal(f"config lacks the section {key}: start from configs/lm.py")
    _check_top(**bind(_check_top, {key: config[key] for key in TOP if key in config}, "config", {}))
    every = Every(**bind(Every, config["every"], "every", {}))
    mesh = sharding.make(**bind(sharding.make, config["mesh"], "mesh", {}))
    section = bind(data.make, config["data"], "data", {})
    rates = config["optimizer"].get("learning_rate")
    rates = rates if isinstance(rates, (tuple, list)) else (rates,)  # a mistake in it is named by `training.make`
    pairs = [(seed, rate) for seed in config["seeds"] for rate in rates]
    make = partial(training.make, config, members=len(pairs), mesh=mesh, deterministic=deterministic)
    # Once with any vocabulary: a mistake in the model is named before minutes are spent on preparing text.
    make(vocabulary=2)
    text = data.make(**section)
    program = make(vocabulary=text.vocabulary)
    params = program.abstract.params
    return Plan(
        config=config,
        steps=config["steps"],
        every=every,
        members=tuple(Member(i, *pair) for i, pair in enumerate(pairs)),
        data=text,
        mesh=mesh,
        program=program,
        parameters=_count(params),
        parameters_position=_count(params.get("position", {})),
        flops_per_token=costs.flops_per_token(program),
    )


def initial(plan: Plan) -> training.State:
    """Return the state at step 0."""
    seeds = np.array([member.seed for member in plan.members], np.uint32)
    return plan.program.init(seeds, np.array([member.learning_rate for member in plan.members], np.float32))


def capacity(device: jax.Device) -> int:
    """Return the bytes of memory of a device; 0 if unknown. CPU devices share the memory of the host."""
    if device.platform == "cpu":
        return machine.memory() // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def _check_top(steps: int, seeds: tuple[int, ...]) -> None:
    if not 1 <= steps < 2**31:
        raise Refusal(f"steps={steps}: must be at least 1 and below 2**31")
    if min(seeds) < 0 or max(seeds) >= 2**31:
        raise Refusal(f"seeds={tuple(seeds)}: each must be at least 0 and below 2**31")
    if len(set(seeds)) < len(seeds):
        raise Refusal(f"seeds={tuple(seeds)}: each may be given once; equal seeds are the same run twice")


def _count(tree: Any) -> int:
    """Return the number of parameters of one member."""
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    """Return the bytes that a tree takes on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
