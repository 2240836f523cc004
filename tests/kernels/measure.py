"""Measure how much of a training step each kernel saves, in turn with the same step on its plain definition.

    python -m tests.kernels.measure [KERNEL ...]

At scale=tiny, a device per core. A kernel that saves less than 5% of a step of every encoding that it serves has to go.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from configs import lm
from rope_lm import block, execution, machine, sharding, training
from rope_lm.kernels import products, shift, softmax, sums
from rope_lm.positional import bias, content
from scripts import entry

ROUNDS = 20


def differentiated_by_jax(*arguments: Any) -> Any:
    """Attend as `softmax._blocked` does, without its own backward pass."""
    return softmax._attend(*arguments)[0]


# Kernel -> the encoding that it serves, and the places where its plain definition takes its place.
KERNELS: dict[str, tuple[str, list[tuple[Any, str, Any]]]] = {
    "softmax.blocked": ("none", [(softmax, "blocked", softmax.xla), (softmax, "parts", lambda *_: [softmax.WHOLE])]),
    "softmax._blocked (backward)": ("relative_bias", [(softmax, "_blocked", differentiated_by_jax)]),
    "products.repeated": ("relative_bias", [(softmax, "repeated", products.repeated_plain)]),
    "softmax._blocked (backward, score)": ("cope", [(softmax, "_blocked", differentiated_by_jax)]),
    "products.linear": ("rotary,attention=performer", [(block, "linear", products.linear_plain)]),
    "shift.shifted (relative_bias)": ("relative_bias", [(bias, "shifted", shift.shifted_plain)]),
    "shift.shifted (transformer_xl)": ("transformer_xl", [(content, "shifted", shift.shifted_plain)]),
    "shift.by_distance": ("shaw", [(content, "by_distance", shift.by_distance_plain)]),
    "sums.onward": ("cope", [(content, "onward", sums.onward_plain)]),
    "sums.neighbors": ("cope", [(sums, "neighbors", sums.neighbors_plain)]),
    "execution: pieces": ("rotary", [(execution, "PIECE", 10**9)]),
    "execution: unrolled layers": ("rotary", [(execution, "UNROLLED", {})]),
}


def step(encoding: str) -> Callable[[], None]:
    """Return a call that takes two training steps."""
    config = entry.plain(lm.get_config(f"position={encoding},scale=tiny"))
    mesh = sharding.make(**config["mesh"])
    program = training.make(config, vocabulary=257, members=1, mesh=mesh)
    state = program.init(np.zeros(1, np.uint32), np.full(1, 3e-3, np.float32))
    shape = (1, config["data"]["batch"], config["data"]["length"] + 1)
    rows = jax.device_put(np.random.default_rng(0).integers(0, 256, shape).astype(np.int32), program.rows)
    compiled = program.step.lower(state, rows).compile()

    def call() -> None:
        nonlocal state
        for _ in range(2):
            state, metrics = compiled(state, rows)
        jax.block_until_ready(metrics)

    return call


def without(replaced: list[tuple[Any, str, Any]], encoding: str) -> Callable[[], None]:
    """Return a call that takes two steps on plain definitions."""
    old = [getattr(module, name) for module, name, _ in replaced]
    tables = dict(softmax.KERNELS)
    try:
        for module, name, plain in replaced:
            setattr(module, name, plain)
        softmax.KERNELS["blocked"] = softmax.blocked
        jax.clear_caches()
        return step(encoding)
    finally:
        for (module, name, _), kernel in zip(replaced, old, strict=True):
            setattr(module, name, kernel)
        softmax.KERNELS.update(tables)
        jax.clear_caches()


def seconds(call: Callable[[], None]) -> float:
    """Return the seconds of one step."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) / 2


def main() -> None:
    """Print a table row for every kernel."""
    entry.huge_pages()
    jax.config.update("jax_num_cpu_devices", machine.cores())
    print("| kernel | encoding | ms a step | with the plain definition | saved |\n|---|---|---|---|---|")
    for name, (encoding, replaced) in KERNELS.items():
        if sys.argv[1:] and not any(chosen in name for chosen in sys.argv[1:]):
            continue
        calls = [step(encoding), without(replaced, encoding)]
        times = [[seconds(call) for call in calls] for _ in range(ROUNDS + 1)][1:]
        kept, plain = (statistics.median(column) for column in zip(*times, strict=True))
        saved = 1 - statistics.median(a / b for a, b in times)
        print(f"| `{name}` | {encoding} | {1e3 * kept:.0f} | {1e3 * plain:.0f} | {100 * saved:.0f}% |", flush=True)


if __name__ == "__main__":
    main()
