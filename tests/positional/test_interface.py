"""The interface carries encodings that this project does not have yet: two are defined here and thrown away.

One sums a gate of the layer's input between key and query, and remembers a tree of two arrays per token. The other
doubles the size of queries and keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rope_lm import positional
from rope_lm.kernels.products import einsum
from rope_lm.kernels.sums import onward_plain
from rope_lm.positional import PositionalEncoding, Shape
from rope_lm.positional.base import parameter
from rope_lm.positional.rotary import Rotary
from rope_lm.positions import Positions, View
from tests.models import PERFORMER, Forward, forward, model, tokens
from tests.positional.test_laws import check_packing

LENGTH = 80  # two blocks of queries, one of them short
ROWS = {"gated": {"name": "gated"}, "doubled": {"name": "doubled", "base": 100.0}}
KERNELS = ("blocked", "xla")


class Gated(PositionalEncoding):
    """Logits fall by the gates of the tokens between key and query, times a factor of the query."""

    looks_back = True

    def __init__(self, *, shape: Shape, rngs: nnx.Rngs):
        size = (shape.layers, shape.width, shape.heads)
        self.gate = parameter(jax.random.normal(rngs.position(), size), "layer", "width", "heads")
        self.factor = parameter(jax.random.normal(rngs.position(), size), "layer", "width", "heads")

    def remember(self, x: jax.Array, positions: Positions) -> dict[str, jax.Array]:
        gate, factor = (einsum("btd,dn->btn", x, weight[...]) for weight in (self.gate, self.factor))
        return {"gate": jax.nn.log_sigmoid(gate), "factor": jax.nn.sigmoid(factor)}

    def score(self, q: jax.Array, k: jax.Array, view: View) -> jax.Array:
        gates = view.k.memory["gate"].swapaxes(1, 2)[:, :, None] * view.visible[:, None]  # [B N T S]
        after = onward_plain(gates) - gates
        return after * view.q.memory["factor"].swapaxes(1, 2)[..., None]


class Doubled(Rotary):
    """Every head has a rotated and an unrotated copy of its components."""

    def rotate(self, q: jax.Array, k: jax.Array, view: View) -> tuple[jax.Array, jax.Array]:
        return tuple(jnp.concatenate(copies, -1) for copies in zip((q, k), super().rotate(q, k, view), strict=True))


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(positional.ENCODINGS, "gated", Gated)
        patch.setitem(positional.ENCODINGS, "doubled", Doubled)
        yield


@pytest.fixture(scope="module", params=sorted(ROWS))
def made(request: pytest.FixtureRequest, registered: None) -> Forward:
    return build(request.param)


def build(name: str, kernel: str = "blocked") -> Forward:
    attention = PERFORMER if kernel == "performer" else {"name": "softmax", "kernel": kernel}
    return forward(model("none", position=ROWS[name], attention=attention))


def test_an_encoding_has_at_most_ten_public_members():
    assert len([name for name in vars(PositionalEncoding) if not name.startswith("_")]) <= 10


def test_their_effects_are_found():
    shape = Shape(32, 4, 8, 2, causal=True)
    gated, doubled = (positional.effects(ROWS[name], shape) for name in ("gated", "doubled"))
    assert gated.score and not gated.bias and gated.head_size == 8
    assert doubled.head_size == 16 and not (doubled.score or doubled.bias or doubled.features)


def test_cached_decoding_equals_the_full_forward_pass(made):
    text = tokens(2, LENGTH)
    np.testing.assert_allclose(made.decoded(text, 16), made.whole(text), atol=2e-5)


def test_packed_documents_equal_the_same_documents_apart(made):
    check_packing(made, LENGTH)


def test_rows_known_to_be_contiguous_equal_rows_of_any_positions(made):
    text = tokens(4, LENGTH)
    np.testing.assert_allclose(made.whole(text), made.shifted(text), atol=2e-5)
    np.testing.assert_allclose(made.whole(text), made.shifted(text, 500), atol=1e-4)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_kernel_gives_the_same_values_and_gradients_which_reach_every_parameter(name):
    text = tokens(2, LENGTH)

    def run(kernel: str) -> list:
        made = build(name, kernel)
        loss = jax.jit(jax.value_and_grad(lambda state: jnp.square(made.rows(state, text)).mean()))
        return jax.tree.leaves_with_path(loss(made.state))

    for (path, ours), (_, theirs) in zip(*map(run, KERNELS), strict=True):
        assert bool(jnp.isfinite(ours).all()) and float(jnp.abs(ours).max()) > 1e-6, path
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * max(1, float(jnp.abs(theirs).max())))


def test_wider_queries_and_keys_are_decoded_by_linear_attention_too():
    made, text = build("doubled", "performer"), tokens(2)
    np.testing.assert_allclose(made.decoded(text, 8), made.whole(text), atol=2e-5)


def test_the_scale_of_logits_is_that_of_the_models_heads():
    """Doubled logits are the sum of rotary's and none's, so they equal both logits at the same scale."""
    base = {"name": "rotary", "base": 100.0}
    weights = [
        np.asarray(model("none", layers=1, position=row).weights(tokens(1))[0]) for row in (base, {"name": "none"})
    ]
    both = np.asarray(model("none", layers=1, position=ROWS["doubled"]).weights(tokens(1))[0])
    product = weights[0] * weights[1]
    np.testing.assert_allclose(both, product / product.sum(-1, keepdims=True), atol=1e-5)


def test_every_layer_sees_its_own_parameters():
    made, text = model("none", position=ROWS["gated"]), tokens(1)
    weights = nnx.jit(lambda made: made.weights(text))
    before = weights(made)
    made.position.gate[...] = made.position.gate[...].at[1].add(1.0)
    after = weights(made)
    np.testing.assert_array_equal(before[0], after[0])
    assert jnp.abs(before[1] - after[1]).max() > 1e-3


@pytest.mark.parametrize("name", sorted(ROWS))
def test_members_together_equal_each_alone(name):
    members = [nnx.split(model("none", seed=seed, position=ROWS[name])) for seed in (0, 1)]
    graph, states = members[0][0], [state for _, state in members]
    text = tokens(2)

    def logits(state: nnx.State) -> jax.Array:
        return nnx.merge(graph, state)(text)[0]

    together = jax.jit(jax.vmap(logits))(jax.tree.map(lambda *x: jnp.stack(x), *states))
    alone = jax.jit(logits)
    for member, state in enumerate(states):
        np.testing.assert_allclose(together[member], alone(state), atol=2e-5)
    assert jnp.abs(together[0] - together[1]).max() > 0.1
