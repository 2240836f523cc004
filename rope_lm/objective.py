"""Training objectives. They turn rows of W = T + 1 tokens into inputs, targets and weights of a loss in nats."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rope_lm.refusal import Refusal
from rope_lm.settings import build


class Example(NamedTuple):
    """Inputs, the target at each place, and the target's weight in the loss (0 or 1)."""

    inputs: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]


@runtime_checkable
class Objective(Protocol):
    """The interface of an objective."""

    causal: bool  # True if no token may see a token after it
    vocabulary: int  # of the model: the text's, plus what the objective adds

    def targets(self, rows: Int[Array, "B W"]) -> Int[Array, "B T"]:
        """Return the entries that belong to the targets, from rows with any one value per token, such as documents."""
        ...

    def __call__(self, rows: Int[Array, "B W"], keys: Key[Array, "B"]) -> Example:
        """Return the inputs, targets and weights of each row, whose random choices depend on its key alone."""
        ...


class Causal:
    """Each token predicts the next one."""

    causal = True

    def __init__(self, *, vocabulary: int):
        self.vocabulary = vocabulary

    def targets(self, rows: Int[Array, "B W"]) -> Int[Array, "B T"]:
        """Return the entry after each input."""
        return rows[:, 1:]

    def __call__(self, rows: Int[Array, "B W"], keys: Key[Array, "B"]) -> Example:
        return Example(rows[:, :-1], self.targets(rows), jnp.ones(rows[:, 1:].shape, jnp.float32))


class Masked:
    """Some tokens are predicted from all the others (BERT, arXiv 1810.04805, section 3.1).

    A share `mask_rate` of the tokens is chosen, the same number in each row. Each chosen token is replaced by the mask
    token with probability `mask_share`, by a random token of the text's vocabulary with probability `random_share`, and
    kept otherwise. The paper uses 0.15, 0.8 and 0.1.
    """

    causal = False

    def __init__(self, mask_rate: float, mask_share: float, random_share: float, *, vocabulary: int):
        if not 0 < mask_rate < 1:
            raise Refusal(
                f"objective.mask_rate={mask_rate}: must be above 0 and below 1, the share of tokens to predict"
            )
        if min(mask_share, random_share) < 0 or mask_share + random_share > 1:
            raise Refusal(
                f"objective.mask_share={mask_share}, objective.random_share={random_share}: shares, at least 0 and "
                "together at most 1"
            )
        self.mask_rate, self.mask_share, self.random_share = mask_rate, mask_share, random_share
        self.vocabulary = vocabulary + 1  # the last is the mask token

    def targets(self, rows: Int[Array, "B W"]) -> Int[Array, "B T"]:
        """Return the entry at the place of each input."""
        return rows[:, :-1]

    def __call__(self, rows: Int[Array, "B W"], keys: Key[Array, "B"]) -> Example:
        return Example(*jax.vmap(self._row)(self.targets(rows), keys))

    def _row(self, tokens: Int[Array, "T"], key: Key[Array, ""]) -> tuple[Array, Array, Array]:
        choice, how, replacement = jax.random.split(key, 3)
        draw = jax.random.uniform(choice, tokens.shape)
        chosen = draw <= jnp.sort(draw)[max(1, round(self.mask_rate * tokens.shape[0])) - 1]
        how = jax.random.uniform(how, tokens.shape)
        other = jax.random.randint(replacement, tokens.shape, 0, self.vocabulary - 1)
        replaced = jnp.where(how < self.mask_share + self.random_share, other, tokens)
        shown = jnp.where(how < self.mask_share, self.vocabulary - 1, replaced)
        return jnp.where(chosen, shown, tokens), tokens, chosen.astype(jnp.float32)


OBJECTIVES: dict[str, type[Objective]] = {"causal": Causal, "masked": Masked}


def make(objective: Mapping[str, Any], *, vocabulary: int) -> Objective:
    """Build the objective that a config's section describes, for text of this vocabulary.

    Raises Refusal for an unknown name, an unknown or missing key, or a value out of range.
    """
    return build(objective, OBJECTIVES, "objective", {"vocabulary": vocabulary})


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Return the nats of each target: log sum exp of the logits minus the target's logit, in float32."""
    # A comparison instead of a gather, whose gradient is a slow scatter.
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0), axis=-1)
