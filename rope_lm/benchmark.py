"""Speed of the programs. They take turns in one process, so that their ratios are fair on a noisy machine."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rope_lm import loop, plan, sharding, training
from rope_lm.positions import contiguous
from rope_lm.refusal import Refusal
from rope_lm.timing import Stepper, rounds_of

Config = dict[str, Any]
Row = dict[str, Any]
Key = TypeVar("Key")


def matmul_peak(dtype: str, size: int | None = None, count: int = 1) -> float:
    """Return the FLOP/s of square matrix products in `dtype`, on all devices at once; the best of several.

    On a CPU only one device is measured, because devices share the cores. float32 products are in full float32, like
    the model's. `size`: of each side; None for 2,048 on a CPU and 8,192 elsewhere. Each call is a chain of `count`
    products, lengthened until it takes 10 ms, because a single product on an accelerator is shorter than its dispatch.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = size or (2048 if on_cpu else 8192)
    devices = jax.devices()[:1] if on_cpu else jax.devices()
    x = jax.random.normal(jax.random.key(0), (size, size), dtype) / size**0.5  # so that the chain stays finite
    everywhere = [jax.device_put(x, device) for device in devices]
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda _, y: jnp.matmul(x, y, precision="highest"), x))
    seconds = float(rounds_of({"chain": lambda: [chain(x) for x in everywhere]}, rounds=7)["chain"].min())
    peak = len(everywhere) * 2 * size**3 * count / seconds
    return peak if seconds >= 0.01 else matmul_peak(dtype, size, 4 * count)


def _steppers(configs: Mapping[Key, Config]) -> tuple[dict[Key, Stepper], dict[Key, Row]]:
    """Return a stepper for each config that can run, and a row {"refused": why} for each that cannot."""
    steppers, refused = {}, {}
    for key, config in configs.items():
        try:
            steppers[key] = Stepper(plan.plan(config))
        except Refusal as refusal:
            refused[key] = {"refused": str(refusal)}
    return steppers, refused


def encodings(configs: Mapping[str, Config], peak: float) -> list[Row]:
    """Return a row for each config, with its speed, or under `refused` why it cannot run.

    `peak`: FLOP/s of all devices. The overhead is the median over rounds of the ratio of a step to that of `none`,
    minus one.
    """
    steppers, rows = _steppers(configs)
    times = rounds_of(steppers, rounds=15)
    decoded = decoding(steppers)
    for name, stepper in steppers.items():
        rows[name] = {
            **_speed(stepper, _median(times[name]), peak),
            "overhead": _median(times[name] / times["none"]) - 1 if "none" in times else None,
            **decoded[name],
        }
    return [{"encoding": name, **rows[name]} for name in configs]


def _speed(stepper: Stepper, seconds: float, peak: float) -> Row:
    """Return the row of a step that takes this many seconds."""
    planned = stepper.plan
    model, data = planned.config["model"], planned.config["data"]
    speed = len(planned.members) * planned.data.batch * planned.data.length / seconds
    sizes = {key: model[key] for key in ("width", "layers", "heads")}
    return {
        "shape": sizes | {key: data[key] for key in ("length", "batch")},
        "vocabulary": planned.program.objective.vocabulary,
        "dtype": model["dtype"],
        "devices": planned.mesh.size,
        "kernel": planned.program.execution.kernel,
        "compile_seconds": stepper.compile_seconds,
        "step_seconds": seconds,
        "tokens_per_second": speed,
        "peak_flops": peak,
        "utilization": speed * planned.flops_per_token / (peak * planned.mesh.size / jax.device_count()),
        "peak_bytes": stepper.bytes,
        "parameters": planned.parameters,
    }


def _median(values: np.ndarray) -> float:
    return float(np.median(values))


class Decoder:
    """Reads half a row as a prompt, then generates the other half token by token with the cache, like `generate`."""

    def __init__(self, stepper: Stepper):
        planned = stepper.plan
        self.model, self.length = planned.program.model(stepper.state, 0), planned.data.length
        if sharding.splits_rows_only(planned.mesh):  # one row needs one device
            self.model = jax.device_put(self.model, planned.mesh.devices.flat[0])
        self.prompt = jnp.asarray(planned.data.validation[:1, : self.length - self.length // 2])
        graph, self.weights = nnx.split(self.model)

        @partial(jax.jit, donate_argnums=1)
        def read(weights: Any, cache: Any, text: jax.Array, start: jax.Array) -> Any:
            logits, cache = nnx.merge(graph, weights)(text, contiguous(text.shape[1], start), cache)
            return jnp.argmax(logits[:, -1:], -1), cache

        self.read = read

    def prefill(self) -> jax.Array:
        """Read the prompt into an empty cache."""
        empty = self.model.cache(1, self.length)
        self.token, self.cache = self.read(self.weights, empty, self.prompt, jnp.int32(0))
        return self.token

    def write(self) -> jax.Array:
        """Generate the second half of the row, after `prefill`."""
        for at in range(self.prompt.shape[1], self.length):
            self.token, self.cache = self.read(self.weights, self.cache, self.token, jnp.int32(at))
        return self.token


def decoding(steppers: Mapping[str, Stepper]) -> dict[str, Row]:
    """Return for each name the seconds of reading half a row, and of generating each token of the other half.

    Deletes the steppers' states, to free the memory of the optimizer.
    """
    calls, length = dict[tuple[str, str], Callable[[], jax.Array]](), dict[str, int]()
    for name, stepper in steppers.items():
        decoder = Decoder(stepper)
        del stepper.state
        calls |= {(name, "prefill"): decoder.prefill, (name, "write"): decoder.write}
        length[name] = decoder.length // 2
    seconds = {key: _median(values) for key, values in rounds_of(calls, rounds=5).items()}
    return {
        name: {
            "prefill_seconds": seconds[name, "prefill"],
            "token_seconds": seconds[name, "write"] / tokens,
            "decode_tokens_per_second": tokens / seconds[name, "write"],
        }
        for name, tokens in length.items()
    }


def parts(config: Config) -> dict[str, float]:
    """Return the seconds of the forward pass, the backward pass and the optimizer.

    The forward pass is timed as an evaluation. The backward pass is the time of the gradients minus that of the forward
    pass, the optimizer is the time of a step minus that of the gradients, both as medians over rounds. A difference
    smaller than the noise may come out negative.
    """
    stepper = Stepper(plan.plan(config))
    program, rows = stepper.plan.program, stepper.rows
    first = jnp.asarray(np.asarray(rows[0]))  # on every device, like the rows of an evaluation
    documents = training.Documents(jnp.zeros_like(first[:, 1:]), count=1)
    forward = program.evaluate.lower(stepper.state, first, documents).compile()
    gradients = program.gradients.lower(stepper.state, rows).compile()
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(stepper.state, first, documents),
        "gradients": lambda: gradients(stepper.state, rows),
        "step": stepper,
    }
    times = rounds_of(calls, rounds=7)
    return {
        "forward_seconds": _median(times["forward"]),
        "backward_seconds": _median(times["gradients"] - times["forward"]),
        "optimizer_seconds": _median(times["step"] - times["gradients"]),
    }


def ensembles(config: Config, sizes: Sequence[int]) -> list[Row]:
    """Compare ensembles of M members with M single runs in turn, for each M in `sizes`, which must start with 1."""
    steppers, rows = _steppers({size: {**config, "seeds": tuple(range(size))} for size in sizes})
    times = rounds_of(steppers, rounds=4)
    for size, taken in times.items():
        rows[size] = {"step_seconds": _median(taken), "over_in_turn": _median(taken / times[1]) / size}
    return [{"members": size, **rows[size]} for size in sizes]


def depths(config: Config, layers: Iterable[int]) -> list[Row]:
    """Return the compile time for each number of layers."""
    steppers, rows = _steppers({count: {**config, "model": {**config["model"], "layers": count}} for count in layers})
    rows |= {count: {"compile_seconds": stepper.compile_seconds} for count, stepper in steppers.items()}
    return [{"layers": count, **rows[count]} for count in layers]


def lengths(configs: Mapping[str, Config], lengths: Sequence[int]) -> dict[str, list[Row]]:
    """Return for each name the seconds and bytes per token at each row length, with the same tokens per batch.

    Measured on one device, because the longest rows are too few to split over several.
    """
    cut, one = {}, {"member": 1, "data": 1, "fsdp": 1, "tensor": 1}
    for name, config in configs.items():
        tokens = config["data"]["length"] * config["data"]["batch"]
        for length in lengths:
            data = {**config["data"], "length": length, "batch": max(1, tokens // length), "validation_rows": 1}
            cut[name, length] = {**config, "data": data, "mesh": one}
    steppers, rows = _steppers(cut)
    for key, taken in rounds_of(steppers, rounds=3).items():
        data, stepper = cut[key]["data"], steppers[key]
        tokens = data["batch"] * data["length"]
        rows[key] = {"seconds_per_token": _median(taken) / tokens, "bytes_per_token": stepper.bytes / tokens}
    about = {key: {"length": key[1], "batch": config["data"]["batch"]} for key, config in cut.items()}
    return {name: [about[name, length] | rows[name, length] for length in lengths] for name in configs}


def host(config: Config, steps: int) -> dict[str, float]:
    """Return the share of the time that the host spent waiting for data, over `steps` steps of training."""
    stepper = Stepper(plan.plan(config))
    planned = stepper.plan
    batches = planned.data.batches([member.seed for member in planned.members], 0, steps)
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        rows = next(batches).rows
        waited += time.perf_counter() - asked
        stepper.rows = jax.device_put(rows, planned.program.rows)
        jax.block_until_ready(stepper())
    batches.close()
    return {"data_wait_share": waited / (time.perf_counter() - began)}


def bookkeeping(config: Config) -> dict[str, float]:
    """Return the share of a real run's time, compilation excluded, that logging and saving took."""
    with tempfile.TemporaryDirectory() as folder:
        loop.train(config, folder, {})
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
    wall = manifest["wall_seconds"] - manifest["compile_seconds"]
    return {"bookkeeping_share": manifest["bookkeeping_seconds"] / wall, "steps": config["steps"]}
