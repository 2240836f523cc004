"""The mesh: what it refuses, and that several devices compute what one does."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.presets import BLOCKS
from rope_lm import positional, sharding
from rope_lm.refusal import Refusal
from tests.programs import smallest

Ask = Callable[..., Any]
ALONE, MIXED = (1, 1, 1, 1), (1, 2, 2, 2)
# members, data, fsdp, tensor
MESHES = [(2, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 4), (2, 4, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2), MIXED]
BY_DEFAULT = [(2, 4, 1, 1), (2, 1, 2, 2)]
VMAP, TURNS = {"members_in_turn": False}, {"members_in_turn": True}  # as accelerators do it, and as a CPU does
IN_PIECES = {"optimizer": {"accumulation_steps": 2}, "model": {"layers": 1}}


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Call a function of `tests.eight_devices` in a process with eight devices."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    settings = {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = [sys.executable, "-m", "tests.eight_devices"]
    with subprocess.Popen(
        command,
        env=os.environ | settings,
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        @cache
        def call(line: str) -> str:
            print(line, file=process.stdin, flush=True)
            return process.stdout.readline()

        def ask(function: str, *arguments: Any) -> Any:
            answer = json.loads(call(json.dumps([function, *arguments])))
            assert "error" not in answer, answer["error"]
            return answer["value"]

        yield ask
        process.stdin.close()


def agree(ask: Ask, name: str, sizes: tuple[int, ...], decisions: dict, changes: dict) -> None:
    """Losses of float32 steps within 1e-5, and the parameters of a layer really are split."""
    alone = ask("trained", name, ALONE, TURNS, changes)
    several = ask("trained", name, sizes, decisions, changes)
    np.testing.assert_allclose(several["nats"], alone["nats"], atol=1e-5, rtol=0)
    member, _, fsdp, tensor = sizes
    assert several["bytes"] == alone["bytes"] // (member * fsdp * tensor)


@pytest.mark.parametrize(
    "sizes", [sizes if sizes in BY_DEFAULT else pytest.param(sizes, marks=pytest.mark.all) for sizes in MESHES]
)
def test_eight_devices_compute_what_one_does(ask, sizes):
    agree(ask, "rotary", sizes, VMAP, {})


@pytest.mark.parametrize("name", [
    name if name == "cope" else pytest.param(name, marks=pytest.mark.all)
    for name in positional.ENCODINGS if name != "rotary"
])  # fmt: skip
def test_every_encoding_is_the_same_on_several_devices(ask, name):
    agree(ask, name, MIXED, VMAP, {"model": smallest(name)})


@pytest.mark.all
@pytest.mark.parametrize(
    "name, sizes", [("rotary_features", (1, 4, 1, 1)), ("rotary", (1, 4, 1, 1)), ("rotary", MIXED)]
)
def test_random_draws_are_the_same_on_every_mesh(ask, name, sizes):
    """Masked tokens are drawn for each row, random features for each member."""
    agree(ask, name, sizes, TURNS, {"objective": "masked", "model": smallest(name)})


@pytest.mark.parametrize("sizes", [(1, 4, 1, 1), pytest.param(MIXED, marks=pytest.mark.all)])
@pytest.mark.parametrize("name", ["relative_bias", pytest.param("transformer_xl", marks=pytest.mark.all)])
def test_every_device_has_rows_of_every_piece(ask, name, sizes):
    agree(ask, name, sizes, TURNS, IN_PIECES)


@pytest.mark.all
@pytest.mark.parametrize("block", ["llama", "neox", "bert"])
def test_other_blocks_are_the_same_on_several_devices(ask, block):
    agree(ask, "rotary", MIXED, VMAP, {"model": {"block": BLOCKS[block], "layers": 1}})


@pytest.mark.parametrize(
    "sizes", [(1, 4, 1, 1), *(pytest.param(s, marks=pytest.mark.all) for s in ((2, 4, 1, 1), MIXED))]
)
def test_totals_of_documents_are_the_same_on_several_devices(ask, sizes):
    alone, several = (ask("evaluated", "relative_bias", mesh, TURNS, IN_PIECES) for mesh in (ALONE, sizes))
    for key in ("nats", "document_nats"):
        np.testing.assert_allclose(several[key], alone[key], rtol=1e-5, err_msg=key)
    assert several["tokens"] == alone["tokens"] == [20] * 16
    assert several["document_tokens"] == alone["document_tokens"] and sum(alone["document_tokens"]) == 20 * 16


@pytest.mark.parametrize("members_in_turn", [False, pytest.param(True, marks=pytest.mark.all)])
def test_a_device_holds_its_share_and_gathers_one_matrix_of_one_layer_at_a_time(ask, members_in_turn):
    """Fully sharded data parallelism: the memory of a device falls with the number of devices.

    It gathers parameters, never activations, at most one matrix at a time; and it sums no activations with others.
    """
    meshes = [(ALONE, 1), ((1, 1, 8, 1), 1), ((1, 8, 1, 1), 1), ((1, 8, 1, 1), 2)]
    alone, fsdp, data, pieces = (ask("compiled", sizes, count, members_in_turn) for sizes, count in meshes)
    assert alone["gathered"] == alone["summed"] == []
    assert fsdp["held"] < alone["held"] / 7 and fsdp["working"] < alone["working"] / 3
    largest, rows = 128 * 512, 48 * 32
    assert fsdp["gathered"] and all(math.prod(shape) <= largest for shape in fsdp["gathered"]), fsdp["gathered"]
    of_activations = {48, 24, rows, rows // 2, rows // 8, rows // 16}  # no dimension of a parameter

    def activations(shapes: list[list[int]]) -> list[list[int]]:
        return [shape for shape in shapes if of_activations & set(shape) and math.prod(shape) >= rows]

    for found in (fsdp, data, pieces):
        assert activations(found["gathered"]) == activations(found["summed"]) == [], found
    assert data["gathered"] == [], "every device has whole parameters"
    for found in (data, pieces):
        assert found["requested"] and all(found["requested"]), "gradients are summed once, after the last piece"
    assert pieces["working"] < data["working"], "half of the rows at a time"


@pytest.mark.parametrize("sizes, members, changes, words", [
    ((1, 8, 1, 1), 1, {"batch": 12}, "= 12 cannot be shared by 8 devices"),
    ((2, 1, 1, 1), 3, {}, "= 3 cannot be shared by 2"),
    ((1, 1, 1, 8), 1, {}, "heads = 4 cannot be shared by 8"),
    ((1, 1, 8, 1), 1, {"batch": 8, "model": {"width": 36, "heads": 3}}, "width = 36 cannot be shared by 8"),
])  # fmt: skip
def test_a_program_that_the_mesh_cannot_divide_is_refused(ask, sizes, members, changes, words):
    assert words in ask("refused", sizes, members, changes)


def test_a_mesh_that_the_devices_do_not_make_is_refused():
    count = jax.device_count()
    with pytest.raises(Refusal, match=f"asks for {2 * count} devices or a multiple, there are {count}"):
        sharding.make(1, 2 * count, 1, 1)
    with pytest.raises(Refusal, match="at most one may be -1"):
        sharding.make(-1, -1, 1, 1)
    with pytest.raises(Refusal, match="every size must be at least 1"):
        sharding.make(1, 0, 1, 1)
    assert sharding.make(1, -1, 1, 1).size == count


def test_a_dimension_that_the_mesh_cannot_divide_is_refused_naming_both_numbers():
    sizes = {"member": 2, "data": 4, "fsdp": 2, "tensor": 3}
    good = {"members": 2, "batch": 8, "width": 4, "heads": 3, "hidden": 6}

    def check(members: int, batch: int, **model: int) -> None:
        sharding.check(sizes, members, batch, model)

    check(**good)
    for key, value, words in [
        ("members", 3, r"members \(seeds x rates\) = 3 cannot be shared by 2 devices"),
        ("batch", 12, "= 12 cannot be shared by 8 devices"),
        ("width", 5, "model.width = 5 cannot be shared by 2 devices"),
        ("heads", 4, "model.heads = 4 cannot be shared by 3 devices"),
        ("hidden", 4, "model.hidden = 4 cannot be shared by 3 devices"),
    ]:
        with pytest.raises(Refusal, match=words):
            check(**{**good, key: value})


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_sum_in_pieces_is_traced_once(count):
    shapes = []

    def product(whole: float, rows: jax.Array) -> jax.Array:
        shapes.append(rows.shape)
        return jnp.sum(whole * rows)

    assert sharding.in_pieces(product, count)(2.0, jnp.arange(8.0)) == 56
    assert shapes == [(8 // count,)]
