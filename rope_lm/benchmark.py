"""How fast the programs are, measured in one process: interleaved rounds, ratios rather than single times."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rope_lm import objective, run
from rope_lm.positions import contiguous

Config = dict[str, Any]


def matmul_peak(dtype: str, size: int = 2048) -> float:
    """FLOP/s of a square matrix product in `dtype`, the best of several."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    return 2 * size**3 / min(_clock(lambda: product(x, x)) for _ in range(8))


def _clock(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


class Stepper:
    """A compiled training step with a state and a batch, called over and over."""

    def __init__(self, plan: run.Plan):
        self.plan, self.program = plan, plan.program
        self.state = run.initial(plan)
        self.rows = jax.device_put(
            next(plan.data.batches([m.seed for m in plan.members], 0, 1)).rows, self.program.rows
        )
        began = time.perf_counter()
        self.step = self.program.step.lower(self.state, self.rows).compile()
        self.compile = time.perf_counter() - began
        memory = self.step.memory_analysis()
        self.peak_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes

    def __call__(self) -> Any:
        self.state, metrics = self.step(self.state, self.rows)
        return metrics

    @property
    def tokens(self) -> int:
        """Of one step, all members."""
        return len(self.plan.members) * self.plan.data.batch * self.plan.data.length


def rounds_of(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each call over rounds A B C A B C, so that a noisy machine hits all alike; one warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(_clock(call))
    return {name: np.array(values[1:]) for name, values in times.items()}


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each call, in turns."""
    return {name: float(np.median(values)) for name, values in rounds_of(calls, rounds).items()}


def encodings(configs: Mapping[str, Config], peak: float) -> list[dict[str, Any]]:
    """A row for each config, by name; overhead is the median over rounds of its step's ratio to that of `none`."""
    steppers = {name: Stepper(run.plan(config)) for name, config in configs.items()}
    times = rounds_of(steppers, rounds=15)
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    rows = []
    for name, stepper in steppers.items():
        speed = stepper.tokens / seconds[name]
        model, data = stepper.plan.config["model"], stepper.plan.config["data"]
        rows.append(
            {
                "encoding": name,
                "shape": {**{key: model[key] for key in ("width", "layers", "heads")}}
                | {key: data[key] for key in ("length", "batch")},
                "kernel": stepper.plan.kernel,
                "compile_seconds": stepper.compile,
                "step_seconds": seconds[name],
                "tokens_per_second": speed,
                "utilization": speed * stepper.plan.flops_per_token / peak,
                "overhead": float(np.median(times[name] / times["none"])) - 1 if "none" in times else None,
                "peak_bytes": stepper.peak_bytes,
                "parameters": stepper.plan.parameters,
                **decoding(stepper.plan),
            }
        )
    return rows


def parts(config: Config) -> dict[str, float]:
    """Seconds of the forward pass, the backward pass and the optimizer, for one member; by difference."""
    stepper = Stepper(run.plan(config))
    graph, params, rest = nnx.split(stepper.program.model(stepper.state, 0), nnx.Param, ...)
    rows = stepper.rows[0]
    example = stepper.program.objective(rows, jax.random.split(jax.random.key(0), len(rows)))

    def loss(params: Any) -> jax.Array:
        logits, _ = nnx.merge(graph, params, rest)(example.inputs)
        return jnp.mean(objective.cross_entropy(logits, example.targets) * example.weights)

    forward = jax.jit(loss).lower(params).compile()
    gradient = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    calls = {"forward": lambda: forward(params), "gradient": lambda: gradient(params), "step": stepper}
    seconds = interleaved(calls)
    return {
        "forward_seconds": seconds["forward"],
        "backward_seconds": max(0.0, seconds["gradient"] - seconds["forward"]),
        "optimizer_seconds": max(0.0, seconds["step"] - seconds["gradient"]),
    }


def ensembles(config: Config, sizes: Sequence[int]) -> list[dict[str, float]]:
    """An ensemble of M members against M single runs in turn."""
    steppers = {str(size): Stepper(run.plan({**config, "seeds": tuple(range(size))})) for size in sizes}
    seconds = interleaved(steppers)
    return [
        {"members": size, "step_seconds": seconds[str(size)], "over_in_turn": seconds[str(size)] / size / seconds["1"]}
        for size in sizes
    ]


def depths(config: Config, layers: Sequence[int]) -> list[dict[str, float]]:
    """Compile time against the number of layers."""
    made = [(each, Stepper(run.plan({**config, "model": {**config["model"], "layers": each}}))) for each in layers]
    return [{"layers": each, "compile_seconds": stepper.compile} for each, stepper in made]


def lengths(config: Config, lengths: Sequence[int]) -> list[dict[str, float]]:
    """Seconds for as many tokens as the config's batch has, cut into longer and longer rows."""
    tokens = config["data"]["length"] * config["data"]["batch"]
    rows = []
    for length in lengths:
        batch = max(1, tokens // length)
        data = {**config["data"], "length": length, "batch": batch, "validation": 1}
        stepper = Stepper(run.plan({**config, "data": data}))
        seconds = interleaved({"step": stepper}, rounds=3)["step"]
        each = {
            "seconds_per_token": seconds / (batch * length),
            "bytes_per_token": stepper.peak_bytes / (batch * length),
        }
        rows.append({"length": length, "batch": batch, **each})
    return rows


def decoding(plan: run.Plan) -> dict[str, float]:
    """Of one row: seconds of reading the first half of its length at once, and of each token of the second, one at a
    time with the cache."""
    model = plan.program.model(run.initial(plan), 0)
    graph, state = nnx.split(model)
    length = plan.data.length
    tokens = length // 2

    @jax.jit
    def read(state: Any, text: jax.Array, start: jax.Array, cache: Any) -> Any:
        where = contiguous(text.shape[1])
        where = where._replace(index=where.index + start)
        logits, cache = nnx.merge(graph, state)(text, where, cache)
        return jnp.argmax(logits[:, -1:], -1), cache

    prompt = jnp.asarray(plan.data.validation[:1, : length - tokens])
    empty = model.cache(1, length)
    token, cache = jax.block_until_ready(read(state, prompt, jnp.int32(0), empty))
    prefill = min(_clock(lambda: read(state, prompt, jnp.int32(0), empty)) for _ in range(3))
    jax.block_until_ready(read(state, token, jnp.int32(prompt.shape[1]), cache))
    began = time.perf_counter()
    for at in range(prompt.shape[1], length):
        token, cache = read(state, token, jnp.int32(at), cache)
    jax.block_until_ready(token)
    return {"prefill_seconds": prefill, "token_seconds": (time.perf_counter() - began) / tokens}


def host(config: Config, steps: int) -> dict[str, float]:
    """The share of the loop that the host waited for data, over `steps` real steps."""
    stepper = Stepper(run.plan(config))
    batches = stepper.plan.data.batches([m.seed for m in stepper.plan.members], 0, steps)
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        rows = next(batches).rows
        waited += time.perf_counter() - asked
        stepper.rows = jax.device_put(rows, stepper.program.rows)
        jax.block_until_ready(stepper())
    batches.close()
    return {"data_wait_share": waited / (time.perf_counter() - began)}


def bookkeeping(config: Config, steps: int) -> dict[str, float]:
    """The share of a real run's wall time, compiling left out, that went into logging and saving."""
    with tempfile.TemporaryDirectory() as folder:
        run.train({**config, "steps": steps}, folder, {})
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
    wall = manifest["wall_seconds"] - manifest["compile_seconds"]
    return {"bookkeeping_share": manifest["bookkeeping_seconds"] / wall, "steps": steps}
