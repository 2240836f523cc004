"""Training: members and seeds, the start of all arms, gradients in pieces, divergence, weight decay, evaluation."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import lm
from configs.presets import BLOCKS
from rope_lm import objective, positional, sharding, training
from rope_lm.checkpoint import Checkpoints
from rope_lm.refusal import Refusal
from rope_lm.training import Documents
from rope_lm.transformer import PLAIN
from scripts import entry
from tests.models import VOCABULARY
from tests.programs import (
    BATCH,
    LEARNING_RATE,
    LENGTH,
    PERFORMER,
    by_path,
    config,
    program,
    rows,
    smallest,
    start,
    train,
)


@cache
def shared() -> training.Program:
    """A program of two members that many tests use, compiled once."""
    return program("rotary", 2)


def by_mechanism(*names: str) -> list:
    """All encodings; those not named are left to --all."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.all) for name in positional.ENCODINGS]


@pytest.mark.parametrize("name", by_mechanism("relative_bias", "rotary_features"))
def test_a_member_equals_its_seed_alone(name):
    several, one = (program(name, members, model=smallest(name)) for members in (3, 1))
    seeds = 5, 6, 7
    state = start(several, seeds, (1e-2, 1e-2, 3e-3))
    alone = training.State(state.step.copy(), *jax.tree.map(lambda x: x[1:2], tuple(state[1:])))
    for step in range(4):
        state, metrics = several.step(state, np.stack([rows(seed, step) for seed in seeds]))
        alone, metric = one.step(alone, rows(6, step)[None])
        np.testing.assert_allclose(metrics.nats[1], metric.nats[0], atol=1e-4)
    assert np.abs(metrics.nats[0] - metrics.nats[1]) > 1e-3, "two seeds are two runs"
    for together, single in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(together[1], single[0], atol=1e-4)


def test_a_member_starts_as_its_seed_alone():
    several, alone = start(shared(), (5, 6)), start(program("rotary"), (6,))
    for together, single in zip(jax.tree.leaves(several[1:]), jax.tree.leaves(alone[1:]), strict=True):
        np.testing.assert_array_equal(together[1], single[0])


@pytest.mark.all
def test_compiling_the_start_quickly_changes_no_bit():
    given = (np.array([0, 1], np.uint32), np.ones(2, np.float32))
    fully = shared().init.lower(*given).compile(compiler_options={"xla_backend_optimization_level": 3})
    jax.tree.map(np.testing.assert_array_equal, shared().init(*given), fully(*given))


def initial_parameters(name: str, seed: int) -> dict:
    """The parameters that a seed starts with, computed without compiling a program."""
    sections = config(name)
    predicted = objective.make(sections["objective"], vocabulary=VOCABULARY)
    return nnx.to_pure_dict(nnx.state(training.build(sections["model"], predicted, PLAIN, jnp.uint32(seed)), nnx.Param))


@cache
def reference(seed: int) -> dict[str, np.ndarray]:
    return by_path(initial_parameters("none", seed))


@pytest.mark.parametrize("name", by_mechanism("learned", "fire", "transformer_xl", "rotary_features"))
def test_shared_parameters_of_all_arms_start_bit_identical(name):
    params = initial_parameters(name, 3)
    params.pop("position", None)
    found = by_path(params)
    assert found.keys() == reference(3).keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, reference(3)[path], err_msg=path)


def test_two_seeds_start_apart_and_as_the_program_starts_them():
    embedding = "['embedding']"
    assert np.abs(reference(3)[embedding] - reference(4)[embedding]).max() > 0.1
    params = by_path(start(shared(), (3, 4)).params)
    for path, leaf in params.items():
        np.testing.assert_allclose(leaf, [reference(3)[path], reference(4)[path]], atol=1e-6, err_msg=path)


def test_an_encoding_draws_from_a_stream_of_its_own():
    """From the same stream, learned positions would get the values of the token embeddings."""
    params = initial_parameters("learned", 0)
    table, embedding = np.array(params["position"]["table"]), np.array(params["embedding"])
    count = min(len(table), len(embedding))
    assert abs(np.corrcoef(table[:count].ravel(), embedding[:count].ravel())[0, 1]) < 0.2


def test_a_tiny_model_overfits_one_row():
    state = start(shared(), (0, 1))
    row = np.stack([np.repeat(rows(0, 0)[:1], BATCH, 0)] * 2)
    for _ in range(80):
        state, metrics = shared().step(state, row)
    assert float(metrics.nats.max()) < 0.1  # from ln 17 = 2.8


def test_a_step_takes_over_the_memory_of_its_state():
    state = start(shared(), (0, 1))
    after, _ = shared().step(state, np.stack([rows(0, 0)] * 2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.moments)))
    assert int(after.step) == 1 and not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_a_run_that_stops_and_resumes_has_the_same_bits(tmp_path):
    """Both moments of the gradients are restored."""
    batches = [np.stack([rows(seed, step) for seed in (0, 1)]) for step in range(4)]
    state = start(shared(), (0, 1))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, batch in enumerate(batches):
            if step == 2:
                checkpoints.save(step, state, {})
            state, _ = shared().step(state, batch)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        resumed = checkpoints.restore(shared().abstract).tree
    for batch in batches[2:]:
        resumed, _ = shared().step(resumed, batch)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicted", ["causal", pytest.param("masked", marks=pytest.mark.all)])
def test_accumulated_gradients_are_those_of_the_whole_batch(predicted):
    """Each row keeps the random draw that it has in the whole batch."""
    once = shared() if predicted == "causal" else program("rotary", 2, objective=predicted)
    pieces = program("rotary", 2, objective=predicted, optimizer={"accumulation_steps": 2})
    assert (once.execution.pieces, pieces.execution.pieces) == (1, 2)
    (expected, losses), (found, same) = (train(each, (0, 1), 3) for each in (once, pieces))
    np.testing.assert_allclose(same, losses, atol=1e-4)
    for a, b in zip(jax.tree.leaves(expected.params), jax.tree.leaves(found.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("name, pieces", [
    ("relative_bias", 4),
    *(pytest.param(name, 4, marks=pytest.mark.all) for name in ("fire", "shaw", "transformer_xl", "cope")),
    *(pytest.param(name, 1, marks=pytest.mark.all) for name in ("relative_bias", "fire")),
])  # fmt: skip
def test_gradients_of_a_bias_that_pieces_share_are_those_of_the_whole_batch(name, pieces):
    found = program(name, optimizer={"accumulation_steps": pieces})
    state = start(found, (0,))
    grads = jax.tree.map(lambda x: x[0], found.gradients(state, rows(0, 0)[None])[1])
    graph, params, rest = nnx.split(found.model(state, 0), nnx.Param, ...)
    inputs, targets = jnp.asarray(rows(0, 0)[:, :-1]), jnp.asarray(rows(0, 0)[:, 1:])

    @jax.jit
    @jax.grad
    def plain(params: nnx.State) -> jax.Array:
        return objective.cross_entropy(nnx.merge(graph, params, rest)(inputs)[0], targets).mean()

    expected = nnx.to_pure_dict(plain(params))
    for tree in (grads, expected):
        tree["position"].pop("end", None)  # FIRE adds it to all logits of a head: its gradient is rounding
    assert all(jnp.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(expected["position"]))
    for a, b in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * jnp.abs(b).max())


@pytest.mark.parametrize(
    "name, primitive",
    [("fire", "log1p"), ("kerple_log", "log1p"), ("continuous_bias", "log1p"), ("sandwich", "cos")],
)
def test_a_bias_is_computed_once_however_many_pieces(name, primitive):
    found = program(name, optimizer={"accumulation_steps": 4})
    whole = jax.make_jaxpr(found.step)(found.abstract, rows(0, 0)[None])

    def pieces(jaxpr: jax.extend.core.Jaxpr) -> list[str]:
        loops = []
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan" and equation.params["length"] == 4:
                loops.append(str(equation))
            else:
                loops += [loop for inner in jax.core.jaxprs_in_params(equation.params) for loop in pieces(inner)]
        return loops

    (piece,) = pieces(whole.jaxpr)
    assert f"= {primitive}" in str(whole) and f"= {primitive}" not in piece


@pytest.mark.parametrize("name, attention", [
    *((name, {"name": "softmax", "kernel": kernel})
      for name in ("fire", "shaw", "transformer_xl", "cope") for kernel in ("xla", "blocked")),
    ("rotary", PERFORMER),
    ("rotary_features", PERFORMER),
])  # fmt: skip
def test_products_of_float32_numbers_are_in_float32_forward_and_backward(name, attention):
    """A GPU rounds them to TF32 by default, and a TPU to bfloat16."""
    found = program(name, model={"attention": attention})
    step = found.step.lower(found.abstract, rows(0, 0)[None]).as_text()
    products = [line for line in step.splitlines() if "dot_general" in line]
    assert len(products) > 20 and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


# --- updates ----------------------------------------------------------------------------------------------------------


def test_a_member_that_diverges_is_frozen_and_the_others_go_on():
    batch = np.stack([rows(0, 0), rows(1, 0)])
    state, _ = shared().step(start(shared(), (0, 1)), batch)
    params = by_path(state.params)
    poisoned = state._replace(params=jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.params))
    after, metrics = shared().step(poisoned, batch)
    assert after.diverged.tolist() == [1, -1] and metrics.diverged.tolist() == [1, -1]
    assert bool(jnp.isfinite(metrics.nats[1]))
    assert max(np.abs(x[1] - params[path][1]).max() for path, x in by_path(after.params).items()) > 1e-4
    moments = by_path(after.moments)
    again, _ = shared().step(after, batch)
    assert again.diverged.tolist() == [1, -1], "the step at which it diverged is kept"
    for path, leaf in by_path(again.moments).items():
        np.testing.assert_array_equal(leaf[0], moments[path][0])


def test_only_matrices_decay_and_no_encoding_does():
    """Without a gradient, only the parameters that decay move. BERT's block has every kind of parameter."""
    changes = {"model": {"block": BLOCKS["bert"]}, "optimizer": {"weight_decay": 0.5, "gradient_clip": 1e-30}}
    found = program("relative_bias", **changes)
    state = start(found, (0,))
    state = state._replace(params=jax.tree.map(lambda x: x + 1.0, state.params))  # biases start at zero
    before = by_path(state.params)
    after, _ = found.step(state, rows(0, 0)[None])
    decayed = set()
    for path, leaf in by_path(after.params).items():
        matrix = "'weight'" in path or "'embedding'" in path
        decayed |= {path} if matrix else set()
        expected = before[path] * (1 - LEARNING_RATE * 0.5) if matrix else before[path]
        np.testing.assert_allclose(leaf, expected, atol=1e-6, err_msg=path)
    assert 0 < len(decayed) < len(before)


@pytest.mark.parametrize("name", sorted(positional.ENCODINGS))
def test_no_parameter_of_an_encoding_decays(name):
    sections = config(name)
    decays = by_path(training.metadata(_abstract(sections), lambda path, variable: variable.decays))
    position = {path for path in decays if path.startswith("['position']")}
    assert not any(decays[path] for path in position) and decays["['embedding']"]


def _abstract(sections: dict) -> object:
    mesh = sharding.make(1, 1, 1, 1)
    return training.specify(sections, vocabulary=VOCABULARY, members=1, mesh=mesh).abstract


def test_rows_longer_than_an_encoding_are_refused():
    with pytest.raises(Refusal, match="Learned encodes indices below 8, the rows have 16 tokens"):
        program("learned", model={"position": {"name": "learned", "limit": 8, "scale": 1.0}})


@pytest.mark.parametrize(
    "scale, tied, vocabulary, parameters",
    [("gpt2", True, 50_257, 124e6), ("gpt2", False, 257, 85e6), ("1b", False, 257, 1e9)],
)
def test_a_scale_has_the_number_of_parameters_in_its_name(scale, tied, vocabulary, parameters):
    sections = entry.plain(lm.get_config(f"scale={scale}"))
    sections["model"]["tied"] = tied
    mesh = sharding.make(1, 1, 1, 1)
    spec = training.specify(sections, vocabulary=vocabulary, members=1, mesh=mesh)
    leaves = jax.tree.leaves(nnx.state(spec.abstract, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == pytest.approx(parameters, rel=0.008)


# --- evaluation -------------------------------------------------------------------------------------------------------


def numbered(count: int, documents: int) -> Documents:
    """Documents of some rows: each is one run of targets that may begin and end inside a row."""
    number = np.arange(count * LENGTH) * documents // (count * LENGTH)
    return Documents(jnp.asarray(number.reshape(count, LENGTH).astype(np.int32)), documents)


@pytest.mark.parametrize("predicted", ["causal", pytest.param("masked", marks=pytest.mark.all)])
def test_an_evaluation_is_totals_by_position_and_by_document(predicted):
    """Compared with the model's own losses, in rows that are no multiple of the batch."""
    found = shared() if predicted == "causal" else program("rotary", 2, objective=predicted)
    state = start(found, (0, 1))
    text = np.concatenate([rows(0, i) for i in range(3)])[:10]
    documents = numbered(10, 7)  # 160 targets in 7 documents: some begin inside a row
    totals = found.evaluate(state, text, documents)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(jnp.arange(10))
    example = found.objective(jnp.asarray(text), keys)
    for member in (0, 1):
        logits, _ = found.model(state, member)(example.inputs)
        nats = np.asarray(objective.cross_entropy(logits, example.targets) * example.weights)
        np.testing.assert_allclose(totals.nats[member], nats.sum(0), rtol=1e-4)
        expected = np.bincount(documents.number.ravel(), nats.ravel(), minlength=7)
        np.testing.assert_allclose(totals.document_nats[member], expected, rtol=1e-4)
    np.testing.assert_array_equal(totals.tokens, example.weights.sum(0))
    expected = np.bincount(documents.number.ravel(), np.ravel(example.weights), minlength=7)
    np.testing.assert_array_equal(totals.document_tokens, expected)
    assert totals.nats.shape == (2, LENGTH) and totals.document_nats.shape == (2, 7)


def test_a_step_reports_the_loss_before_its_update():
    state = start(shared(), (0, 1))
    totals = shared().evaluate(state, rows(0, 0), numbered(BATCH, 1))
    np.testing.assert_allclose(totals.document_nats.sum(-1), totals.nats.sum(-1), rtol=1e-5)
    _, metrics = shared().step(state, np.stack([rows(0, 0)] * 2))
    np.testing.assert_allclose(metrics.nats, totals.nats.sum(-1) / (BATCH * LENGTH), rtol=1e-4)
