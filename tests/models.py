"""A small model of every encoding, for the tests."""

import jax
from flax import nnx

from configs.presets import BLOCKS, POSITIONS
from rope_lm.transformer import Transformer

LENGTH, VOCABULARY = 32, 17


def position(name: str, limit: int = LENGTH) -> dict:
    """The config row of an encoding, with room for `limit` positions."""
    row = {"name": name, **POSITIONS[name]}
    return row | {key: limit for key in ("limit", "trained_length") if key in row}


def attention(name: str) -> dict:
    """The config row of an attention in which an encoding can act."""
    if name == "rotary_features":
        return {"name": "performer", "features": 16, "redraw": 10, "block": 8}
    return {"name": "softmax", "kernel": "blocked"}


def section(name: str, **changes: object) -> dict:
    """A model section of a config."""
    return {
        "width": 32,
        "heads": 4,
        "layers": 2,
        "hidden": 64,
        "position": position(name),
        "tied": False,
        "embedding_scale": 1.0,
        "dtype": "float32",
        "remat": "products",
        "attention": attention(name),
        "block": BLOCKS["ours"],
    } | changes


def model(name: str, seed: int = 0, causal: bool = True, **changes: object) -> Transformer:
    """A model with random parameters; those of the encoding too, so that a law cannot hold because a bias is zero."""
    key = jax.random.key(seed)
    rngs = nnx.Rngs(params=jax.random.fold_in(key, 0), position=jax.random.fold_in(key, 1), features=2)
    return Transformer(**section(name, **changes), causal=causal, vocabulary=VOCABULARY, rngs=rngs)


def tokens(rows: int, length: int = LENGTH, seed: int = 1) -> jax.Array:
    """Random tokens [rows length]."""
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, VOCABULARY)
