"""A process with eight forced CPU devices that computes what tests ask: a JSON line [function, arguments] each time.

Run as `python -m tests.eight_devices`. One process serves all tests of a file, because starting it takes seconds.
"""

import json
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rope_lm import execution, sharding, training
from rope_lm.refusal import Refusal
from rope_lm.training import Documents
from tests.programs import LENGTH, program, rows, start, train

SEEDS, BATCH, STEPS = (0, 1), 8, 6


@contextmanager
def executed(**decisions: Any) -> Iterator[None]:
    """Replace decisions of the platform: vmap over members, say, as on accelerators."""
    choose = execution.choose
    execution.choose = lambda *args, **kwargs: choose(*args, **kwargs)._replace(**decisions)
    try:
        yield
    finally:
        execution.choose = choose


@cache
def _program(line: str) -> training.Program:
    name, sizes, decisions, changes = json.loads(line)
    with executed(init_options={}, **decisions):
        return program(name, len(SEEDS), sharding.make(*sizes), batch=BATCH, **changes)


def trained(*arguments: Any) -> dict[str, Any]:
    """Losses [step member] on a mesh, and the bytes of one device's share of a parameter.

    `arguments`: name of the encoding, sizes of the mesh, decisions of the platform and changes of the config.
    """
    found = _program(json.dumps(arguments))
    state, nats = train(found, SEEDS, STEPS)
    up = state.params["blocks"]["up"]["weight"]
    (shard,) = (shard for shard in up.addressable_shards if shard.device == found.spec.mesh.devices.flat[0])
    return {"nats": nats.tolist(), "bytes": shard.data.nbytes}


def evaluated(*arguments: Any) -> dict[str, Any]:
    """An evaluation's totals over 20 rows, which no mesh divides, of 9 documents. `arguments` as in `trained`."""
    found = _program(json.dumps(arguments))
    number = (np.arange(20 * LENGTH) * 9 // (20 * LENGTH)).reshape(20, LENGTH).astype(np.int32)
    totals = found.evaluate(start(found, SEEDS), rows(0, 0, batch=20), Documents(jnp.asarray(number), 9))
    return {key: np.asarray(value).tolist() for key, value in totals._asdict().items()}


def compiled(sizes: list[int], pieces: int, members_in_turn: bool) -> dict[str, Any]:
    """The memory and the communication of a compiled step of one member, on 48 rows of 32 tokens."""
    model = {"width": 128, "heads": 8, "hidden": 512, "layers": 2}
    changes = {"model": model, "optimizer": {"accumulation_steps": pieces}, "batch": 48, "length": 32}
    with executed(members_in_turn=members_in_turn, pieces=pieces, unroll=False):
        found = program("rotary", 1, sharding.make(*sizes), **changes)
    batch = jax.ShapeDtypeStruct((1, 48, 33), jnp.int32, sharding=found.rows)
    step = found.step.lower(found.abstract, batch).compile()
    memory, text = step.memory_analysis(), step.as_text()
    return {
        "held": memory.argument_size_in_bytes,
        "working": memory.temp_size_in_bytes,
        "gathered": _shapes("all-gather", text),
        "summed": _shapes("all-reduce", text),
        "requested": ["psum" in line for line in text.splitlines() if re.search("f32.[0-9].* all-reduce", line)],
    }


def _shapes(operation: str, text: str) -> list[tuple[int, ...]]:
    """The shapes of an operation's float32 results; tokens are not among them."""
    results = re.findall(f"= ([^=]*) {operation}(?:-start)?[(]", text)
    return [tuple(map(int, shape.split(","))) for line in results for shape in re.findall(r"f32\[([0-9,]+)\]", line)]


def refused(sizes: list[int], members: int, changes: dict[str, Any]) -> str:
    """The message with which a program is refused; empty if it is not."""
    try:
        program("none", members, sharding.make(*sizes), **changes)
    except Refusal as why:
        return str(why)
    return ""


FUNCTIONS = {function.__name__: function for function in (trained, evaluated, compiled, refused)}


if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"value": FUNCTIONS[name](*arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
