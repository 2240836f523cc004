"""The interface of every positional encoding. The base class is the identity: no position at all."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm.positions import Positions
from rope_lm.refusal import Refusal

# A product in float32 where an accelerator's default has fewer bits: also outside of `transformer.in_full`, and in a
# backward pass of our own (jax.custom_vjp), which is traced after the forward one that `in_full` holds.
einsum = partial(jnp.einsum, precision="highest")

# The parts of the matrix of logits that a kernel works on one at a time: queries, each part's after those of the one
# before, and the keys that they see. And what position adds to the logits of each; float32.
Parts = list[tuple[slice, slice]]
Added = list[Float[Array, "#B N _ _"]]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def for_rows(x: Float[Array, "*S"], rows: int) -> Float[Array, "B *S"]:
    """The same x for each of so many rows. Its gradient is summed over them by a matrix product: XLA's own sum over a
    leading axis made a trained bias cost 24% of a step on two CPU cores, this 5% (128 wide, 4 layers, length 256,
    batch 16)."""
    return jnp.broadcast_to(x, (rows, *x.shape))


def _sum_over_rows(rows: int, _: None, g: Float[Array, "B *S"]) -> tuple[Float[Array, "*S"]]:
    return (einsum("br,rs->bs", jnp.ones((1, rows), g.dtype), g.reshape(rows, -1)).reshape(g.shape[1:]),)


for_rows.defvjp(lambda x, rows: (for_rows(x, rows), None), _sum_over_rows)


class Shape(NamedTuple):
    """What an encoding has to know of the model that it acts in."""

    width: int
    heads: int
    head_size: int
    layers: int
    causal: bool  # whether queries see no key after them


class PositionalEncoding(nnx.Module):
    """No position at all (NoPE). An encoding overrides the places where it acts.

    An encoding is made from the keyword arguments of its config row, the model's `shape`, and `rngs`, whose `position`
    stream is its own: drawing from it leaves every shared parameter as in the other arms. Angles, tables and biases are
    float32 whatever the dtype of the activations (bfloat16 rounds 257 to 256); cuDNN's attention alone rounds a bias.
    """

    limit: int | None = None  # first index that it cannot encode
    relative_norms: bool = False  # whether norms of queries and keys hang on each other's positions
    backward: bool = False  # whether it is defined for keys that are not after the query alone
    turned_alone: bool = False  # whether what `rotate` makes of a key hangs on that key alone: it is then cached turned

    def __init__(self, *, shape: Shape, rngs: nnx.Rngs):
        pass

    def embed(self, x: Float[Array, "B T D"], positions: Positions) -> Float[Array, "B T D"]:
        """Acts on the token embeddings, once per forward pass."""
        return x

    def rotate(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        q_positions: Positions,
        k_positions: Positions,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
        """Acts on queries and keys, once per layer."""
        return q, k

    def bias(self, q_positions: Positions, k_positions: Positions) -> Float[Array, "#B N T S"] | None:
        """What position alone adds to the attention logits; float32. Asked for each part that a kernel works on, of
        some of the queries of a row and some of its keys; once for all layers and rows, in training once a step."""
        return None

    def prepare(self, q_positions: Positions, k_positions: Positions) -> Any:
        """What `score` needs of positions and parameters alone: a tree of float arrays [L ...], or None. Asked once for
        the positions of all parts, in training once a step."""
        return None

    def score(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        q_positions: Positions,
        k_positions: Positions,
        prepared: Any,
        parts: Parts,
    ) -> Added | None:
        """What position and content together add to the attention logits of each part, once per layer. `prepared` is
        that layer's of what `prepare` returned.

        `q` and `k` are as they were before `rotate`. What is added to a key that its query does not see is hidden by
        the kernel: it may be any finite number.
        """
        return None

    def turn_features(
        self,
        q: Float[Array, "B T N F"],
        k: Float[Array, "B S N F"],
        q_positions: Positions,
        k_positions: Positions,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B T N F"], Float[Array, "B S N F"]]:
        """Acts on the features of linear attention, in its numerator, once per layer."""
        return q, k

    @classmethod
    def turns_features(cls) -> bool:
        """Whether the encoding acts on features (it then needs an attention that has some)."""
        return cls.turn_features is not PositionalEncoding.turn_features

    @classmethod
    def biased(cls) -> bool:
        """Whether the encoding acts on the attention logits."""
        return cls.bias is not PositionalEncoding.bias or cls.scored()

    @classmethod
    def scored(cls) -> bool:
        """Whether what it adds to the logits hangs on content too, and so is another for every row."""
        return cls.score is not PositionalEncoding.score

    def flops(self, shape: Shape, length: int) -> float:
        """Multiplications of its own matrix products that one token of a row costs in one layer, forward, beside what
        it computes once for all rows (`bias`, `prepare`)."""
        return 0

    def held(self, shape: Shape, length: int) -> float:
        """Numbers that `prepare` makes for rows of so many tokens, of all layers, beside parameters."""
        return 0

    def floats(self, shape: Shape, rows: float, layers: int) -> float:
        """Numbers that it works on at once, forward, for each pair of a query and a key that is computed: of so many
        rows, in so many layers; by XLA's account."""
        return shape.heads if self.biased() else 0

    def check(self, length: int) -> None:
        """Raises Refusal if a row of `length` tokens holds an index that the encoding cannot encode."""
        if self.limit is not None and length > self.limit:
            raise Refusal(
                f"{type(self).__name__} encodes indices below {self.limit}, the rows have {length} tokens: "
                f"set model.position.limit={length} or shorten data.length"
            )
