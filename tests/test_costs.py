"""Costs: floating-point operations compared with counts by hand, memory with XLA's own account."""

import jax
import jax.numpy as jnp
import pytest

from rope_lm import costs
from tests.programs import program

LENGTH, WIDTH, HEADS, HEAD, LAYERS, HIDDEN, VOCABULARY = 128, 32, 4, 8, 2, 64, 17
INNER = HEADS * HEAD
KEYS = (64 * 64 + 64 * 128) / 128  # that a query meets on average, in two blocks of 64 queries
MATRICES = WIDTH * 3 * INNER + INNER * WIDTH + 2 * WIDTH * HIDDEN  # of a layer
FEATURES, BLOCK = 16, 8


def softmax(keys: float) -> float:
    return keys * INNER * 2  # logits and weighted values


def linear() -> float:
    """Multiplications of the Performer per token: features of q and k, then sums in blocks of [values, 1]."""
    values = HEAD + 1
    within = BLOCK * FEATURES + BLOCK * values
    before = 2 * FEATURES * values
    return HEADS * (2 * HEAD * FEATURES + within + before)


@pytest.mark.parametrize("name, attention, multiplications", [
    ("none", "blocked", softmax(KEYS)),
    ("none", "xla", softmax(KEYS)),  # counted as the blocked kernel computes it
    ("rotary", "blocked", softmax(KEYS)),
    ("shaw", "blocked", softmax(KEYS) + INNER * (16 + 1)),  # one vector per distance from 0 to 16
    ("none", "performer", linear()),
])  # fmt: skip
def test_operations_of_training_on_a_token_are_those_of_its_matrix_products(name, attention, multiplications):
    kernel = {"name": "softmax", "kernel": attention}
    random = {"name": "performer", "features": FEATURES, "redraw": 3, "block": BLOCK}
    model = {"attention": random if attention == "performer" else kernel}
    if name == "shaw":
        model["position"] = {"name": "shaw", "max_distance": 16, "scale": 0.02}
    found = costs.flops_per_token(program(name, model=model, length=LENGTH))
    forward = 2 * (LAYERS * (MATRICES + multiplications) + WIDTH * VOCABULARY)
    assert found == 3 * forward


def test_a_model_that_sees_both_ways_meets_every_key():
    found = costs.flops_per_token(program("none", length=LENGTH, objective="masked"))
    assert found == 3 * 2 * (LAYERS * (MATRICES + softmax(LENGTH)) + WIDTH * (VOCABULARY + 1))


def test_operations_shared_by_all_rows_are_divided_by_their_tokens():
    """FIRE's MLP computes one bias for all rows."""
    few, many = (costs.flops_per_token(program("fire", batch=batch, length=LENGTH)) for batch in (2, 4))
    none = costs.flops_per_token(program("none", length=LENGTH))
    assert few - none == pytest.approx(2 * (many - none)) and many > none


def test_operations_do_not_depend_on_members_pieces_or_remat():
    usual = costs.flops_per_token(program("rotary"))
    assert costs.flops_per_token(program("rotary", 3)) == usual
    assert costs.flops_per_token(program("rotary", optimizer={"accumulation_steps": 2})) == usual
    assert costs.flops_per_token(program("rotary", model={"remat": "full"})) == usual


def products(function, *arguments) -> float:
    return costs.products(jax.make_jaxpr(function)(*arguments).jaxpr)


X = jnp.ones((3, 3))
ONE = 2 * 3**3  # operations of one product of X with itself


def test_a_loop_counts_each_of_its_iterations():
    assert products(lambda x: x @ x, X) == ONE
    assert products(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0], X) == 5 * ONE
    assert products(lambda x: jax.lax.map(lambda row: row @ x, x), X) == ONE
    assert products(lambda x: jax.lax.fori_loop(0, 7, lambda _, x: x @ x, x), X) == 7 * ONE
    assert products(jax.jit(lambda x: jax.checkpoint(lambda x: x @ x)(x)), X) == ONE


def test_a_conditional_counts_its_costliest_branch():
    assert products(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), X) == 2 * ONE


def test_a_custom_derivative_counts_its_forward_function_once():
    @jax.custom_vjp
    def backward(x):
        return x @ x

    backward.defvjp(lambda x: (x @ x @ x, x), lambda x, g: (g @ x @ x @ x,))

    @jax.custom_jvp
    def tangent(x):
        return x @ x

    tangent.defjvp(lambda x, dx: (x[0] @ x[0], dx[0] @ x[0] @ x[0]))
    assert products(backward, X) == products(tangent, X) == ONE


def test_memory_is_that_of_arguments_temporaries_and_results_that_take_no_arguments_place():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    kept, given = (jax.jit(lambda x: x + 1, donate_argnums=donated).lower(x).compile() for donated in ((), (0,)))
    assert costs.memory(kept) == costs.memory(given) + 4000 >= 8000
    product = jax.jit(lambda x: (x[:, None] * x).T @ x).lower(x).compile()
    account = product.memory_analysis()
    assert costs.memory(product) == 8000 + account.temp_size_in_bytes


def test_a_step_needs_at_least_its_state_and_less_if_layers_are_recomputed():
    def needed(remat: str) -> int:
        found = program("rotary", model={"remat": remat, "layers": 6}, length=64)  # six layers are a loop
        rows = jax.ShapeDtypeStruct((1, 4, 65), jnp.int32)
        return costs.memory(found.step.lower(found.abstract, rows).compile())

    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program("rotary").abstract))
    assert state < needed("full") < needed("none")
