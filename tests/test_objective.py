"""Training objectives: the shares of a masked row, and the seed, step and row that they depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm import objective, training
from rope_lm.refusal import Refusal
from rope_lm.training import Documents, State
from tests.programs import BATCH, LENGTH, program, start
from tests.programs import rows as random_rows

BERT = {"name": "masked", "mask_rate": 0.15, "mask_share": 0.8, "random_share": 0.1}
TEXT = 1000  # vocabulary of the text


def masked(rows: int, length: int = 200) -> tuple[jax.Array, objective.Example]:
    made = objective.make(BERT, vocabulary=TEXT)
    text = jax.random.randint(jax.random.key(0), (rows, length + 1), 0, TEXT)
    return text, made(text, jax.random.split(jax.random.key(1), rows))


def test_the_next_token_is_predicted():
    rows = jnp.arange(10).reshape(2, 5)
    made = objective.make({"name": "causal"}, vocabulary=10)
    example = made(rows, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_array_equal(example.inputs, [[0, 1, 2, 3], [5, 6, 7, 8]])
    np.testing.assert_array_equal(example.targets, [[1, 2, 3, 4], [6, 7, 8, 9]])
    assert example.weights.sum() == 8 and made.causal and made.vocabulary == 10


def test_a_masked_row_has_berts_shares():
    text, (inputs, targets, weights) = masked(500)
    np.testing.assert_array_equal(targets, text[:, :-1])
    np.testing.assert_array_equal(weights.sum(1), 30), "15% of 200, the same number in each row"
    chosen = np.asarray(weights, bool)
    np.testing.assert_array_equal(np.asarray(inputs)[~chosen], np.asarray(targets)[~chosen])
    shown, true = np.asarray(inputs)[chosen], np.asarray(targets)[chosen]
    mask, kept = shown == TEXT, shown == true
    assert np.mean(mask) == pytest.approx(0.8, abs=0.01)
    assert np.mean(kept) == pytest.approx(0.1, abs=0.01)
    other = shown[~mask & ~kept]
    assert len(other) / len(shown) == pytest.approx(0.1, abs=0.01) and len(np.unique(other)) > 500
    assert np.abs(chosen.mean(0) - 0.15).max() < 0.08, "no place is preferred"


@pytest.fixture(scope="module")
def made() -> training.Program:
    """Two members that predict masked tokens."""
    return program("none", 2, objective="masked", model={"layers": 1})


def test_masks_of_a_step_depend_on_seed_and_step_and_those_of_an_evaluation_on_the_row_alone(made):
    rows = random_rows(0, 0)
    both = jnp.asarray(np.stack([rows, rows]))
    state = start(made, (0, 0))

    def losses(state: State) -> np.ndarray:
        return np.asarray(made.gradients(state, both)[0])

    first = losses(state)
    assert first[0] == first[1], "one seed, one mask"
    np.testing.assert_array_equal(first, losses(state))
    later = losses(state._replace(step=jnp.int32(1)))
    assert abs(later[0] - first[0]) > 1e-4, "another step, another mask"
    other = losses(state._replace(seed=jnp.array([0, 7], jnp.uint32)))
    assert other[0] == first[0] and abs(other[1] - first[1]) > 1e-4, "another seed, another mask"

    documents = Documents(jnp.zeros((BATCH, LENGTH), jnp.int32), 1)
    evaluated = made.evaluate(state, rows, documents)
    moved = made.evaluate(state._replace(step=jnp.int32(50), seed=jnp.array([3, 4], jnp.uint32)), rows, documents)
    np.testing.assert_array_equal(evaluated.nats, moved.nats)
    assert evaluated.tokens.sum() == BATCH * round(0.15 * LENGTH)


def test_the_loss_of_a_masked_program_is_that_of_the_chosen_tokens_alone(made):
    state, rows = start(made, (0, 0)), random_rows(0, 1)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(BATCH))
    example = made.objective(jnp.asarray(rows), keys)
    logits, _ = made.model(state, 0)(example.inputs)
    nats = objective.cross_entropy(logits, example.targets)
    found = made.evaluate(state, rows, Documents(jnp.zeros((BATCH, LENGTH), jnp.int32), 1))
    np.testing.assert_allclose(found.nats[0].sum(), (nats * example.weights).sum(), rtol=1e-5)


def test_cross_entropy_is_the_targets_negative_log_probability():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    targets = jnp.array([[0, 4, 2], [1, 1, 3]])
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(objective.cross_entropy(logits, targets), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mask_rate": 0.0}, "objective.mask_rate=0.0: must be above 0 and below 1"),
        ({"mask_share": 0.8, "random_share": 0.3}, "objective.mask_share=0.8, objective.random_share=0.3: shares"),
        ({"name": "maskd"}, "unknown objective.name 'maskd': did you mean masked"),
        ({"share": 1.0}, "unknown key in objective 'share'"),
    ],
)
def test_a_mistake_in_the_objective_is_refused(change, words):
    with pytest.raises(Refusal, match=words):
        objective.make(BERT | change, vocabulary=10)


@pytest.mark.parametrize(("section", "first"), [({"name": "causal"}, 1), (BERT, 0)])
def test_documents_of_targets_follow_the_targets(section, first):
    """A causal model predicts the next token, a masked one the token itself."""
    chosen = objective.make(section, vocabulary=50)
    rows = jnp.arange(2 * 9).reshape(2, 9)
    np.testing.assert_array_equal(chosen.targets(rows), rows[:, first : first + 8])
    example = chosen(rows, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_array_equal(example.targets, chosen.targets(rows))
