"""The mesh: what it refuses, and that several devices compute what one does."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from rope_lm import positional, sharding
from rope_lm.refusal import Refusal

MIXTURES = [
    (2, 1, 1, 1),
    (1, 8, 1, 1),
    (1, 1, 8, 1),
    (1, 1, 1, 4),
    (2, 4, 1, 1),
    (2, 2, 2, 1),
    (1, 2, 2, 2),
    (2, 1, 1, 4),
]
EIGHT = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
CODE = """
import sys, json, jax, numpy as np
sys.path.insert(0, ".")
from configs.presets import BLOCKS
from rope_lm import execution, sharding, training
from tests.models import section, VOCABULARY, LENGTH
from tests.test_training import CAUSAL, OPTIMIZER
name, meshes, block, accumulate = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
choose = execution.choose  # on several devices the program that accelerators run, too
def accelerated(platform, sizes, *rest):
    alone = set(sizes.values()) == {1}
    return choose(platform, sizes, *rest)._replace(in_turn=alone, in_place=not alone)
execution.choose = accelerated
out = {}
for sizes in meshes:
    mesh = sharding.make(*sizes)
    optimization = OPTIMIZER | {"learning_rate": (3e-3,), "accumulation_steps": accumulate}
    made = training.make(section(name, block=BLOCKS[block]), optimization, CAUSAL,
                         vocabulary=VOCABULARY, steps=20, members=2, batch=8, length=LENGTH, mesh=mesh)
    state = made.init(np.array([0, 1], np.uint32), np.full(2, 3e-3, np.float32))
    rng = np.random.default_rng(0)
    losses = []
    for step in range(20):
        rows = rng.integers(0, VOCABULARY, (2, 8, LENGTH + 1)).astype(np.int32)
        state, metrics = made.step(state, jax.device_put(rows, made.rows))
        losses.append(np.asarray(metrics.nats).tolist())
    bytes_each = max(sum(s.data.nbytes for s in leaf.addressable_shards if s.device == d)
                     for d in [mesh.devices.flat[0]] for leaf in jax.tree.leaves(state.params["blocks"]["up"]))
    out[str(sizes)] = losses, bytes_each
print(json.dumps(out))
"""


FEW = ("none", "learned", "relative_bias", "rotary")  # the others are held to it where there is time


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.all) for name in positional.ENCODINGS]
)
def test_eight_devices_compute_what_one_does(name):
    compute_what_one_does(
        name, "ours", MIXTURES if name in ("rotary", "relative_bias") else [(2, 2, 2, 1), (1, 2, 2, 2)]
    )


@pytest.mark.parametrize("name", ["rotary", "transformer_xl"])
def test_pieces_of_a_batch_are_cut_on_every_device(name):
    compute_what_one_does(name, "ours", [(1, 4, 1, 1), (1, 2, 2, 2)], accumulate=2)


@pytest.mark.parametrize("block", ["llama", pytest.param("neox", marks=pytest.mark.all), "bert"])
def test_eight_devices_compute_what_one_does_with_other_blocks(block):
    compute_what_one_does("rotary", block, [(1, 2, 2, 2)])


def compute_what_one_does(name: str, block: str, some: list[tuple[int, ...]], accumulate: int = 1) -> None:
    """Losses of 20 float32 steps within 1e-5, and the parameters of a layer really are split."""
    env = os.environ | {"XLA_FLAGS": EIGHT, "JAX_PLATFORMS": "cpu"}
    meshes = json.dumps([(1, 1, 1, 1), *some])
    command = [sys.executable, "-c", CODE, name, meshes, block, str(accumulate)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (reference, whole), *_ = found.values()
    for sizes, (losses, held) in found.items():
        worst = max(abs(a - b) for x, y in zip(losses, reference, strict=True) for a, b in zip(x, y, strict=True))
        assert worst < 1e-5, (sizes, worst)
        member, _, fsdp, tensor = json.loads(sizes.replace("(", "[").replace(")", "]"))
        assert held == whole // (member * fsdp * tensor), sizes


COMPILED = """
import sys, json, re, jax, jax.numpy as jnp
sys.path.insert(0, ".")
from rope_lm import execution, sharding, training
from tests.models import section, LENGTH
from tests.test_training import CAUSAL, OPTIMIZER
choose = execution.choose
execution.choose = lambda *given: choose(*given)._replace(in_turn=sys.argv[2] == "turns", pieces=accumulate)
shapes = lambda op, text: [tuple(map(int, each.split(",")))
                           for line in re.findall(f"= ([^=]*) {op}(?:-start)?[(]", text)
                           for each in re.findall(r"f32\\[([0-9,]+)\\]", line)]  # not of tokens
out = {}
for sizes, accumulate in json.loads(sys.argv[1]):
    mesh = sharding.make(*sizes)
    model = section("rotary", width=128, heads=8, hidden=512, layers=4)
    made = training.make(model, OPTIMIZER | {"accumulation_steps": accumulate}, CAUSAL, vocabulary=257, steps=20, members=1,
                         batch=48, length=LENGTH, mesh=mesh)
    rows = jax.ShapeDtypeStruct((1, 48, LENGTH + 1), jnp.int32, sharding=made.rows)
    compiled = made.step.lower(made.abstract, rows).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    out[f"{sizes} {accumulate}"] = {
        "held": memory.argument_size_in_bytes, "working": memory.temp_size_in_bytes,
        "gathered": shapes("all-gather", text), "summed": shapes("all-reduce", text),
        "asked": ["psum" in line for line in text.splitlines() if re.search("f32.[0-9].* all-reduce", line)]}
print(json.dumps(out))
"""


@pytest.mark.parametrize("members", ["turns", "vmap"])
def test_a_device_holds_its_share_and_gathers_one_matrix_of_one_layer_at_a_time(members):
    """Fully sharded data parallelism: what a device holds and works on falls with the number of devices; it gathers
    parameters, and neither activations nor more than a matrix of them; and it sums no activations with others."""
    env = os.environ | {"XLA_FLAGS": EIGHT, "JAX_PLATFORMS": "cpu"}
    meshes = [((1, 1, 1, 1), 1), ((1, 1, 8, 1), 1), ((1, 8, 1, 1), 1), ((1, 8, 1, 1), 2)]
    command = [sys.executable, "-c", COMPILED, json.dumps(meshes), members]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, fsdp, data, pieces = json.loads(done.stdout.splitlines()[-1]).values()
    assert alone["gathered"] == alone["summed"] == []
    assert fsdp["held"] < alone["held"] / 7 and fsdp["working"] < alone["working"] / 3
    largest, rows = 128 * 512, 48 * 32
    assert fsdp["gathered"] and all(math.prod(shape) <= largest for shape in fsdp["gathered"]), fsdp["gathered"]
    some = {48, 24, rows, rows // 2, rows // 8, rows // 16}  # of activations: no dimension of a parameter
    of_rows = lambda shapes: [each for each in shapes if some & set(each) and math.prod(each) >= rows]  # noqa: E731
    for found in (fsdp, data, pieces):
        assert of_rows(found["gathered"]) == of_rows(found["summed"]) == [], found
    assert data["gathered"] == [], "parameters are whole on every device"
    for found in (data, pieces):
        assert found["asked"] and all(found["asked"]), "gradients are summed once, after the last piece"
    assert pieces["working"] < data["working"], "half of the rows at a time"


def test_a_mesh_that_the_devices_do_not_make_is_refused():
    count = jax.device_count()
    with pytest.raises(Refusal, match=f"asks for {2 * count} devices or a multiple, there are {count}"):
        sharding.make(1, 2 * count, 1, 1)
    with pytest.raises(Refusal, match="at most one may be -1"):
        sharding.make(-1, -1, 1, 1)
    with pytest.raises(Refusal, match="every size must be at least 1"):
        sharding.make(1, 0, 1, 1)
    assert sharding.make(1, -1, 1, 1).size == count


def test_what_the_mesh_cannot_divide_is_refused_naming_both_numbers():
    sizes = {"member": 2, "data": 4, "fsdp": 2, "tensor": 3}
    good = {"members": 2, "batch": 8, "width": 4, "heads": 3, "hidden": 6}
    sharding.check(sizes, **good)
    for key, value, words in [
        ("members", 3, r"members \(seeds x rates\) = 3 cannot be shared by 2 devices"),
        ("batch", 12, "= 12 cannot be shared by 8 devices"),
        ("width", 5, "model.width = 5 cannot be shared by 2 devices"),
        ("heads", 4, "model.heads = 4 cannot be shared by 3 devices"),
        ("hidden", 4, "model.hidden = 4 cannot be shared by 3 devices"),
    ]:
        with pytest.raises(Refusal, match=words):
            sharding.check(sizes, **{**good, key: value})


REFUSED = """
import sys
sys.path.insert(0, ".")
from rope_lm import refusal, sharding, training
from tests.models import section, LENGTH
from tests.test_training import CAUSAL, OPTIMIZER
for sizes, batch, members, changes in [((1, 8, 1, 1), 12, 1, {}), ((2, 1, 1, 1), 8, 3, {}), ((1, 1, 1, 8), 8, 1, {}),
                                       ((1, 1, 8, 1), 8, 1, {"width": 36, "heads": 3})]:
    try:
        training.make(section("none", **changes), OPTIMIZER, CAUSAL, vocabulary=17, steps=20, members=members,
                      batch=batch, length=LENGTH, mesh=sharding.make(*sizes))
    except refusal.Refusal as why:
        print(why)
"""


def test_a_program_that_the_mesh_cannot_divide_is_not_made():
    env = os.environ | {"XLA_FLAGS": EIGHT, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", REFUSED], env=env, capture_output=True, text=True, check=True)
    for line, words in zip(
        done.stdout.splitlines(),
        ["= 12 cannot be shared by 8 devices", "= 3 cannot be shared by 2", "heads = 4 cannot be shared by 8",
         "width = 36 cannot be shared by 8"],
        strict=True,
    ):  # fmt: skip
        assert words in line


@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_is_summed_in_pieces_is_traced_once(count):
    calls = []
    product = lambda whole, rows: calls.append(rows.shape) or jnp.sum(whole * rows)  # noqa: E731
    assert sharding.in_pieces(product, count)(2.0, jnp.arange(8.0)) == 56
    assert calls == [(8 // count,)]
