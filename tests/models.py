"""Small models of every encoding, and one compiled forward pass of each that the laws share."""

import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from configs.presets import BLOCKS, POSITIONS
from rope_lm import positional
from rope_lm.positional import PositionalEncoding, Shape
from rope_lm.positions import Positions, contiguous
from rope_lm.transformer import Cache, Transformer

LENGTH, VOCABULARY = 32, 17
PERFORMER = {"name": "performer", "features": 16, "redraw": 10, "block": 8}


def position(name: str, limit: int = LENGTH) -> dict[str, Any]:
    """Return the config row of an encoding, with room for `limit` positions."""
    row = {"name": name, **POSITIONS.get(name, {})}
    return row | {key: limit for key in ("limit", "trained_length") if key in row}


def attention(name: str) -> dict[str, Any]:
    """Return the config row of an attention that the encoding can act in."""
    return PERFORMER if name == "rotary_features" else {"name": "softmax", "kernel": "blocked"}


def section(name: str, **changes: Any) -> dict[str, Any]:
    """Return the model section of a config."""
    return {
        "width": 32,
        "heads": 4,
        "head_size": None,
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


def model(name: str, seed: int = 0, causal: bool = True, **changes: Any) -> Transformer:
    """Build a model with the initial values of a seed. `changes` to its section."""
    key = jax.random.key(seed)
    rngs = nnx.Rngs(params=jax.random.fold_in(key, 0), position=jax.random.fold_in(key, 1), features=2)
    return Transformer(**section(name, **changes), causal=causal, vocabulary=VOCABULARY, rngs=rngs)


def redrawn(state: nnx.State, seed: int = 3) -> nnx.State:
    """Redraw every parameter of an encoding, because one that starts near 0 would hide a mistake.

    Scalars, and numbers per head, stay positive, because some encodings clip them below.
    """

    def draw(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        if "position" not in path or not isinstance(variable, nnx.Param):
            return variable
        value = 0.5 * jax.random.normal(
            jax.random.fold_in(jax.random.key(seed), zlib.crc32(str(path).encode())), variable.shape
        )
        return variable.replace(jnp.abs(value) + 0.1 if variable.axes in ((), ("heads",)) else value)

    return nnx.map_state(draw, state)


class Forward(NamedTuple):
    """A model as plain functions, each compiled once per shape of its arguments."""

    state: nnx.State
    at: Any  # (state, tokens [B T], index [B T], segment [B T]) -> logits: rows of any documents
    rows: Any  # (state, tokens [B T]) -> logits: rows known to be contiguous
    decode: Any  # (state, tokens [B T], first index, cache) -> logits, cache
    empty: Any  # (rows, slots) -> cache

    def documents(self, tokens: jax.Array, segment: Any) -> jax.Array:
        """Return the logits of rows of documents with these numbers."""
        positions = packed(jnp.asarray(segment))
        return self.at(self.state, tokens, positions.index, positions.segment)

    def shifted(self, tokens: jax.Array, first: int = 0) -> jax.Array:
        """Return the logits of rows whose first token has index `first`, without telling that they are contiguous."""
        index = jnp.broadcast_to(first + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return self.at(self.state, tokens, index, jnp.ones_like(index))

    def whole(self, tokens: jax.Array) -> jax.Array:
        """Return the logits of contiguous rows."""
        return self.rows(self.state, tokens)

    def decoded(self, tokens: jax.Array, chunk: int) -> jax.Array:
        """Return the logits of rows that are read in chunks of this many tokens, through a cache."""
        batch, length = tokens.shape
        cache, pieces = self.empty(batch, length), []
        for first in range(0, length, chunk):
            logits, cache = self.decode(self.state, tokens[:, first : first + chunk], jnp.int32(first), cache)
            pieces.append(logits)
        return jnp.concatenate(pieces, 1)


def forward(made: Transformer) -> Forward:
    """Compile the forward pass of a model whose encoding's parameters are redrawn."""
    graph, state = nnx.split(made)

    @jax.jit
    def at(state: nnx.State, tokens: jax.Array, index: jax.Array, segment: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(tokens, Positions(index, segment))[0]

    @jax.jit
    def rows(state: nnx.State, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(tokens)[0]

    @jax.jit
    def decode(state: nnx.State, tokens: jax.Array, first: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return nnx.merge(graph, state)(tokens, contiguous(tokens.shape[1], first), cache)

    return Forward(redrawn(state), at, rows, decode, made.cache)


@cache
def compiled(name: str, length: int = LENGTH, causal: bool = True, performer: bool = False) -> Forward:
    """Return the forward pass of an encoding, for rows of this length, whose programs all tests share."""
    row = position(name, length)
    row |= {"limit": 1000 + length} if "limit" in row else {}
    row |= {"threshold": 8.0} if name == "fire" else {}
    changes = {"attention": PERFORMER} if performer else {}
    return forward(model(name, causal=causal, position=row, **changes))


def encoding(row: Mapping[str, Any], layer: int = 0, causal: bool = True, heads: int = 4) -> PositionalEncoding:
    """Build an encoding of a model of two layers, with heads of 8 components, as one of its layers sees it."""
    made = positional.make(row, shape=Shape(8 * heads, heads, 8, 2, causal), rngs=nnx.Rngs(0, position=1))
    return positional.at_layer(made, layer)


def tokens(rows: int, length: int = LENGTH, seed: int = 1) -> jax.Array:
    """Return random tokens."""
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, VOCABULARY)


def packed(segment: jax.Array) -> Positions:
    """Return the positions of rows of documents, numbered in `segment`: each document's index begins at 0."""
    place = jnp.arange(segment.shape[1], dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], axis=1)
    return Positions(place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1), segment)
