"""How fast the programs are, measured in one process: interleaved rounds, ratios rather than single times."""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rope_lm import loop, sharding, timing
from rope_lm.plan import plan as planned
from rope_lm.positions import contiguous
from rope_lm.refusal import Refusal

Config = dict[str, Any]
Row = dict[str, Any]


def matmul_peak(dtype: str, size: int | None = None, count: int = 1) -> float:
    """FLOP/s of square matrix products in `dtype`, one on each device at once, the best of several. A CPU's devices
    share its cores: one alone can use them all. Products of float32 numbers are in float32, as the model's are. `size`:
    of each side; None is 2,048 on a CPU and 8,192 elsewhere.

    Each call is a chain of `count` products, or of so many more that it takes 10 ms: on an accelerator a single one is
    over sooner than it is asked for.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = size or (2048 if on_cpu else 8192)
    devices = jax.devices()[:1] if on_cpu else jax.devices()
    x = jax.random.normal(jax.random.key(0), (size, size), dtype) / size**0.5  # so that the chain stays finite
    everywhere = [jax.device_put(x, device) for device in devices]
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda _, y: jnp.matmul(x, y, precision="highest"), x))
    seconds = float(timing.rounds_of({"chain": lambda: [chain(x) for x in everywhere]}, rounds=7)["chain"].min())
    peak = len(everywhere) * 2 * size**3 * count / seconds
    return peak if seconds >= 0.01 else matmul_peak(dtype, size, 4 * count)


def _steppers(configs: Mapping[Any, Config]) -> tuple[dict[Any, timing.Stepper], dict[Any, Row]]:
    """A stepper for each config that can run, and a row {"refused": why} for each that cannot."""
    steppers, refused = {}, {}
    for key, config in configs.items():
        try:
            steppers[key] = timing.Stepper(planned(config))
        except Refusal as refusal:
            refused[key] = {"refused": str(refusal)}
    return steppers, refused


def encodings(configs: Mapping[str, Config], peak: float) -> list[Row]:
    """A row for each config, by name, with its speed or why it was `refused`; `peak`: FLOP/s of all devices.

    Overhead is the median over rounds of its step's ratio to that of `none`.
    """
    steppers, rows = _steppers(configs)
    times = timing.rounds_of(steppers, rounds=15)
    read = decoding(steppers)
    for name, stepper in steppers.items():
        plan, seconds = stepper.plan, _median(times[name])
        model, data = plan.config["model"], plan.config["data"]
        speed = len(plan.members) * plan.data.batch * plan.data.length / seconds
        rows[name] = {
            "shape": {key: model[key] for key in ("width", "layers", "heads")}
            | {key: data[key] for key in ("length", "batch")},
            "vocabulary": plan.program.objective.vocabulary,
            "dtype": model["dtype"],
            "devices": plan.mesh.size,
            "kernel": plan.kernel,
            "compile_seconds": stepper.compile,
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "peak_flops": peak,
            "utilization": speed * plan.flops_per_token / (peak * plan.mesh.size / jax.device_count()),
            "overhead": _median(times[name] / times["none"]) - 1 if "none" in times else None,
            "peak_bytes": stepper.peak_bytes,
            "parameters": plan.parameters,
            **read[name],
        }
    return [{"encoding": name, **rows[name]} for name in configs]


def _median(values: np.ndarray) -> float:
    return float(np.median(values))


class Decoder:
    """Reads the first half of a row at once, and the second one token at a time with the cache, as generate does."""

    def __init__(self, stepper: timing.Stepper):
        plan = stepper.plan
        self.model, self.length = plan.program.model(stepper.state, 0), plan.data.length
        if sharding.rows_alone(plan.mesh):  # one row needs one device
            self.model = jax.device_put(self.model, plan.mesh.devices.flat[0])
        self.prompt = jnp.asarray(plan.data.validation[:1, : self.length - self.length // 2])
        graph, self.weights = nnx.split(self.model)

        @partial(jax.jit, donate_argnums=1)
        def read(weights: Any, cache: Any, text: jax.Array, start: jax.Array) -> Any:
            logits, cache = nnx.merge(graph, weights)(text, contiguous(text.shape[1], start), cache)
            return jnp.argmax(logits[:, -1:], -1), cache

        self.read = read

    def prefill(self) -> jax.Array:
        """Into an empty cache."""
        empty = self.model.cache(1, self.length)
        self.token, self.cache = self.read(self.weights, empty, self.prompt, jnp.int32(0))
        return self.token

    def write(self) -> jax.Array:
        """All tokens that `prefill` left room for."""
        for at in range(self.prompt.shape[1], self.length):
            self.token, self.cache = self.read(self.weights, self.cache, self.token, jnp.int32(at))
        return self.token


def decoding(steppers: Mapping[str, timing.Stepper]) -> dict[str, Row]:
    """Seconds of one row, by name: of reading half of it, and of each token of the other half. The steppers lose their
    state: what the optimizer keeps is no longer needed."""
    calls, length = {}, {}
    for name, stepper in steppers.items():
        decoder = Decoder(stepper)
        del stepper.state
        calls |= {(name, "prefill"): decoder.prefill, (name, "write"): decoder.write}
        length[name] = decoder.length // 2
    seconds = {key: _median(values) for key, values in timing.rounds_of(calls, rounds=5).items()}
    return {
        name: {
            "prefill_seconds": seconds[name, "prefill"],
            "token_seconds": seconds[name, "write"] / tokens,
            "decode_tokens_per_second": tokens / seconds[name, "write"],
        }
        for name, tokens in length.items()
    }


def parts(config: Config) -> dict[str, float]:
    """Seconds of the forward pass, the backward pass and the optimizer.

    The last two are medians of what a round's gradients took more than its evaluation of the same rows, and its step
    more than its gradients: what lies below the noise may be negative.
    """
    stepper = timing.Stepper(planned(config))
    program, rows = stepper.plan.program, stepper.rows
    first = jnp.asarray(np.asarray(rows[0]))  # on every device, as an evaluation has its rows
    forward = program.evaluate.lower(stepper.state, first).compile()
    gradients = program.gradients.lower(stepper.state, rows).compile()
    calls = {
        "forward": lambda: forward(stepper.state, first),
        "gradients": lambda: gradients(stepper.state, rows),
        "step": stepper,
    }
    times = timing.rounds_of(calls, rounds=7)
    return {
        "forward_seconds": _median(times["forward"]),
        "backward_seconds": _median(times["gradients"] - times["forward"]),
        "optimizer_seconds": _median(times["step"] - times["gradients"]),
    }


def ensembles(config: Config, sizes: Sequence[int]) -> list[Row]:
    """An ensemble of M members against M single runs in turn; `sizes` begin with 1."""
    steppers, rows = _steppers({size: {**config, "seeds": tuple(range(size))} for size in sizes})
    times = timing.rounds_of(steppers, rounds=4)
    for size, taken in times.items():
        rows[size] = {"step_seconds": _median(taken), "over_in_turn": _median(taken / times[1]) / size}
    return [{"members": size, **rows[size]} for size in sizes]


def depths(config: Config, layers: Sequence[int]) -> list[Row]:
    """Compile time against the number of layers."""
    steppers, rows = _steppers({each: {**config, "model": {**config["model"], "layers": each}} for each in layers})
    rows |= {each: {"compile_seconds": stepper.compile} for each, stepper in steppers.items()}
    return [{"layers": each, **rows[each]} for each in layers]


def lengths(configs: Mapping[str, Config], lengths: Sequence[int]) -> dict[str, list[Row]]:
    """By name, seconds and bytes of each of as many tokens as the config's batch has, cut into longer and longer rows;
    all of them take turns. On one device: the longest are too few for several."""
    cut, one = {}, {"member": 1, "data": 1, "fsdp": 1, "tensor": 1}
    for name, config in configs.items():
        tokens = config["data"]["length"] * config["data"]["batch"]
        for length in lengths:
            data = {**config["data"], "length": length, "batch": max(1, tokens // length), "validation_rows": 1}
            cut[name, length] = {**config, "data": data, "mesh": one}
    steppers, rows = _steppers(cut)
    for key, taken in timing.rounds_of(steppers, rounds=3).items():
        data, stepper = cut[key]["data"], steppers[key]
        tokens = data["batch"] * data["length"]
        rows[key] = {"seconds_per_token": _median(taken) / tokens, "bytes_per_token": stepper.peak_bytes / tokens}
    about = {key: {"length": key[1], "batch": config["data"]["batch"]} for key, config in cut.items()}
    return {name: [about[name, length] | rows[name, length] for length in lengths] for name in configs}


def host(config: Config, steps: int) -> dict[str, float]:
    """The share of the loop that the host waited for data, over `steps` real steps."""
    stepper = timing.Stepper(planned(config))
    plan = stepper.plan
    batches = plan.data.batches([m.seed for m in plan.members], 0, steps)
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        rows = next(batches).rows
        waited += time.perf_counter() - asked
        stepper.rows = jax.device_put(rows, plan.program.rows)
        jax.block_until_ready(stepper())
    batches.close()
    return {"data_wait_share": waited / (time.perf_counter() - began)}


def bookkeeping(config: Config) -> dict[str, float]:
    """The share of the wall time of a real run without compiling that logging, saving and waiting for saves took."""
    with tempfile.TemporaryDirectory() as folder:
        loop.train(config, folder, {})
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
    wall = manifest["wall_seconds"] - manifest["compile_seconds"]
    return {"bookkeeping_share": manifest["bookkeeping_seconds"] / wall, "steps": config["steps"]}
