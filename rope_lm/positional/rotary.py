"""Encodings that rotate queries and keys: one `rotate`, and a frequency vector for each variant.

A plane that has frequency 0 is not turned, so partial rotation and layers without rotation are frequencies too. All
pair component i with i + H/2 (half-split); `rope_lm.positional.pairing` converts others.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm.positional.base import PositionalEncoding, Shape
from rope_lm.positions import Positions
from rope_lm.refusal import Refusal

STRIDE = 1024  # tokens; see `angles`


def frequencies(size: int, base: float) -> np.ndarray:
    """Radians per token of each of the size/2 planes: base ** (-2i / size) (arXiv 2104.09864, section 3.2.2)."""
    return float(base) ** (-np.arange(0, size, 2) / size)


def angles(index: Int[Array, "*B"], frequency: np.ndarray) -> Float[Array, "*B F"]:
    """Radians, in float32, up to whole turns; exact to 3e-4 radians at index 1,000,000, where the product in float32 is
    off by 0.06: whole strides are taken modulo a turn in float64. To both sides alike."""
    stride = np.remainder(STRIDE * frequency, 2 * np.pi).astype(np.float32)
    near = jnp.fmod(index, STRIDE)
    far, near = (part.astype(jnp.float32)[..., None] for part in ((index - near) // STRIDE, near))
    return far * stride + near * frequency.astype(np.float32)


class Wave(NamedTuple):
    """Cosine and sine of the angle of each plane, times what the plane is scaled by."""

    cos: Float[Array, "B T F"]
    sin: Float[Array, "B T F"]


def wave(angle: Float[Array, "B T F"], scale: float | Float[Array, "B T F"] = 1.0) -> Wave:
    """The wave of an angle in radians."""
    return Wave(scale * jnp.cos(angle), scale * jnp.sin(angle))


def rotate(x: Float[Array, "B T N H"], by: Wave) -> Float[Array, "B T N H"]:
    """Turns the plane of components (i, i + H/2) by the angle of wave i (RoFormer, Eq. 34, in the half-split pairing).

    The rotation is computed in float32 and returned in the dtype of x.
    """
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    # Two multiplications by [1 T 1 H] factors and one swap of halves: on the CPU XLA fuses this into one pass.
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def upper_bound(frequency: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """The bound on the score of two tokens at each distance, up to a factor that only the vectors decide (RoFormer,
    section 3.4.3, Eq. 37): the mean over planes of |the sum of exp(i d theta) over the planes up to it|."""
    turns = np.exp(1j * np.multiply.outer(distances, frequency))
    return np.abs(np.cumsum(turns, axis=-1)).mean(axis=-1)


class Rotary(PositionalEncoding):
    """Rotary position embedding (arXiv 2104.09864, section 3.2). `base` of the frequencies: 10,000 in the paper.

    A variant overrides `frequency`, and `amplitude` where it scales the logits too. One that turns a key by more than
    its own position says so (`turned_alone`).
    """

    amplitude: float = 1.0  # of queries and of keys
    turned_alone = True

    def __init__(self, base: float, *, shape: Shape, rngs: nnx.Rngs):
        if shape.head_size % 2:
            raise Refusal(
                f"rotary turns pairs of components, the head size {shape.width}/{shape.heads} = {shape.head_size} is "
                "odd: choose model.width and model.heads so that width/heads is even"
            )
        above("base", base, 1, "10000 in the paper")
        self.base, self.head_size = base, shape.head_size

    def frequency(self) -> np.ndarray:
        """Radians per token of each of the H/2 planes."""
        return frequencies(self.head_size, self.base)

    def wave(self, at: Positions, seen: Positions, layer: Int[Array, ""]) -> Wave:
        """What the tokens `at` some positions are turned by in a layer, where the keys are those `seen`."""
        return wave(angles(at.index, self.frequency()), self.amplitude)

    def rotate(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        q_positions: Positions,
        k_positions: Positions,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
        turn = lambda x, at: rotate(x, self.wave(at, k_positions, layer))  # noqa: E731
        return turn(q, q_positions), turn(k, k_positions)


class RotaryFeatures(PositionalEncoding):
    """Rotary after the feature map of linear attention: the features of queries and keys are turned in the numerator,
    the denominator stays unturned and so positive (RoFormer, arXiv 2104.09864, section 3.3, Eq. 19). `base` as in
    Rotary."""

    def __init__(self, base: float, *, shape: Shape, rngs: nnx.Rngs):
        self.base = above("base", base, 1, "10000 in the paper")

    def turn_features(
        self,
        q: Float[Array, "B T N F"],
        k: Float[Array, "B S N F"],
        q_positions: Positions,
        k_positions: Positions,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B T N F"], Float[Array, "B S N F"]]:
        frequency = frequencies(q.shape[-1], self.base)
        turn = lambda x, positions: rotate(x, wave(angles(positions.index, frequency)))  # noqa: E731
        return turn(q, q_positions), turn(k, k_positions)


class PartialRotary(Rotary):
    """Rotary on the first `fraction` of the components of a head, at the frequencies of a head of that size; the rest
    know no position (GPT-J and GPT-NeoX, arXiv 2204.06745, section 2.1; a quarter there)."""

    def __init__(self, base: float, fraction: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, shape=shape, rngs=rngs)
        self.turned = _planes(fraction, shape.head_size)

    def frequency(self) -> np.ndarray:
        return _padded(frequencies(2 * self.turned, self.base), self.head_size // 2)


class PRoPE(Rotary):
    """p-RoPE: the lowest frequencies are left at zero, `fraction` of them is kept (arXiv 2410.06205, section 6)."""

    def __init__(self, base: float, fraction: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, shape=shape, rngs=rngs)
        self.turned = _planes(fraction, shape.head_size)

    def frequency(self) -> np.ndarray:
        return _padded(frequencies(self.head_size, self.base)[: self.turned], self.head_size // 2)


class LayeredRotary(Rotary):
    """Rotary with a base of its own in each layer, over and over: `bases=(1e4, 0)` turns in every other layer, for 0 is
    a layer without position (RNoPE, arXiv 2501.18795; Llama 4), `(1e4, 1e6)` has local and global layers (Gemma 3,
    arXiv 2503.19786, section 2)."""

    def __init__(self, bases: tuple[float, ...], *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(10_000.0, shape=shape, rngs=rngs)
        if len(bases) > shape.layers:
            raise Refusal(
                f"model.position.bases={tuple(bases)}: a pattern of {len(bases)} layers, the model has {shape.layers}"
            )
        for base in bases:
            if base != 0:
                above("bases", base, 1, "each, or 0 for a layer that is not turned")
        self.bases = tuple(bases)

    def wave(self, at: Positions, seen: Positions, layer: Int[Array, ""]) -> Wave:
        rows = [frequencies(self.head_size, base) if base else np.zeros(self.head_size // 2) for base in self.bases]
        # The waves of all, and then that of the layer: a sine of what the layer chose would be computed anew for every
        # row and head (17% of a step instead of 5%; benchmark, tiny).
        waves = [wave(angles(at.index, row)) for row in rows]
        return Wave(*(jnp.stack(each)[layer % len(rows)] for each in zip(*waves, strict=True)))


class LinearRotary(Rotary):
    """Position interpolation: positions are divided by `factor` (arXiv 2306.15595, section 2.2)."""

    def __init__(self, base: float, factor: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, shape=shape, rngs=rngs)
        self.factor = above("factor", factor, 1, "how many times the trained length is to be reached", equal=True)

    def frequency(self) -> np.ndarray:
        return frequencies(self.head_size, self.base) / self.factor


class NTKRotary(LinearRotary):
    """NTK-aware scaling: the base grows so that the lowest frequency is divided by `factor` and the highest stays
    (bloc97 2023; arXiv 2309.00071, section 3.1)."""

    def __init__(self, base: float, factor: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, factor, shape=shape, rngs=rngs)
        _two_planes(shape)

    def frequency(self) -> np.ndarray:
        return frequencies(self.head_size, self.base * self.factor ** (self.head_size / (self.head_size - 2)))


class DynamicRotary(LinearRotary):
    """Dynamic NTK: NTK-aware by how far a document goes beyond the `trained_length`, in tokens (emozilla 2023; arXiv
    2309.00071, section 3.3, in the form of Hugging Face's `dynamic`, with its `factor`; each document of a row by its
    own length).

    Up to the trained length it is plain rotary. Beyond it, what a full pass computes for early tokens differs from what
    decoding computed when the text was shorter: that is the method.
    """

    turned_alone = False  # by the length of its document too

    def __init__(self, base: float, factor: float, trained_length: int, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, factor, shape=shape, rngs=rngs)
        _two_planes(shape)
        self.trained_length = int(
            above("trained_length", trained_length, 1, "the length that the model was trained on", equal=True)
        )

    def wave(self, at: Positions, seen: Positions, layer: Int[Array, ""]) -> Wave:
        if seen.start is None:
            own = at.segment[:, :, None] == seen.segment[:, None, :]
            length = 1 + jnp.max(jnp.where(own, seen.index[:, None, :], 0), axis=-1)  # [B T], of each token's document
        else:
            length = jnp.full((1, 1), seen.start + seen.length)
        beyond = jnp.maximum(length, self.trained_length).astype(jnp.float32) / self.trained_length
        base = self.base * (self.factor * beyond - (self.factor - 1)) ** (self.head_size / (self.head_size - 2))
        frequency = base[..., None] ** (-jnp.arange(0, self.head_size, 2, dtype=jnp.float32) / self.head_size)
        return wave(at.index.astype(jnp.float32)[..., None] * frequency)


class YaRN(LinearRotary):
    """YaRN (arXiv 2309.00071, sections 3.2 to 3.4): planes that turn more than `beta_fast` times in the `trained_length`
    stay, those that turn less than `beta_slow` times are divided by `factor`, with a ramp between; and logits are scaled.

    The ramp runs over planes between the (whole) planes that turn `beta_fast` and `beta_slow` times. Queries and keys are each
    scaled by 0.1 ln(factor) + 1 = sqrt(1/t), and so the logits by 1/t, once.
    """

    def __init__(
        self,
        base: float,
        factor: float,
        trained_length: int,
        beta_fast: float,
        beta_slow: float,
        *,
        shape: Shape,
        rngs: nnx.Rngs,
    ):
        super().__init__(base, factor, shape=shape, rngs=rngs)
        self.trained_length = int(
            above("trained_length", trained_length, 1, "the length that the model was trained on", equal=True)
        )
        self.beta_slow = above("beta_slow", beta_slow, 0, "turns in the trained length; 1 in the paper")
        self.beta_fast = above(
            "beta_fast", beta_fast, beta_slow, "beta_slow, turns in the trained length; 32 in the paper"
        )
        self.amplitude = 0.1 * math.log(factor) + 1

    def frequency(self) -> np.ndarray:
        plain = frequencies(self.head_size, self.base)
        plane = lambda turns: (  # noqa: E731 (that turns so often in the trained length)
            self.head_size * math.log(self.trained_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))
        )
        first = max(math.floor(plane(self.beta_fast)), 0)
        last = min(math.ceil(plane(self.beta_slow)), self.head_size - 1)
        ramp = np.clip((np.arange(self.head_size // 2) - first) / max(last - first, 1e-3), 0, 1)
        return plain * (1 - ramp) + plain / self.factor * ramp


class Llama3Rotary(LinearRotary):
    """Llama 3.1's scaling: wavelengths above trained_length/`low_freq_factor` tokens are stretched by `factor`, those below trained_length/`high_freq_factor`
    stay, those between are mixed (arXiv 2407.21783, section 3.4.2; the released code gives 8, 1, 4)."""

    def __init__(
        self,
        base: float,
        factor: float,
        trained_length: int,
        low_freq_factor: float,
        high_freq_factor: float,
        *,
        shape: Shape,
        rngs: nnx.Rngs,
    ):
        super().__init__(base, factor, shape=shape, rngs=rngs)
        self.trained_length = int(
            above("trained_length", trained_length, 1, "the length that the model was trained on", equal=True)
        )
        self.low_freq_factor = above("low_freq_factor", low_freq_factor, 0, "1 in Llama 3.1")
        self.high_freq_factor = above(
            "high_freq_factor", high_freq_factor, low_freq_factor, "low_freq_factor; 4 in Llama 3.1"
        )

    def frequency(self) -> np.ndarray:
        plain = frequencies(self.head_size, self.base)
        turns = self.trained_length * plain / (2 * np.pi)
        smooth = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return plain * smooth + plain / self.factor * (1 - smooth)


class XPos(Rotary):
    """xPos: rotary whose planes fade with distance, the fast ones faster (arXiv 2212.10554, section 3).

    Queries are scaled by z ** (i / `fade`) and keys by z ** (-j / fade), z = (2 i/H + 0.4) / 1.4 of plane i. The powers
    are taken from the middle of the keys, so that a shift of all positions changes nothing; 70,000 tokens between the
    first and the last key is the most that float32 can hold (fade = 512, as in the paper).
    """

    turned_alone = False  # from the middle of all keys
    backward = True  # towards keys ahead it would grow
    relative_norms = True

    def __init__(self, base: float, fade: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, shape=shape, rngs=rngs)
        self.fade = above("fade", fade, 0, "tokens; 512 in the paper")

    def rotate(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        q_positions: Positions,
        k_positions: Positions,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
        frequency = frequencies(self.head_size, self.base)
        log_z = np.log((np.arange(0, self.head_size, 2) / self.head_size + 0.4) / 1.4).astype(np.float32)
        middle = (k_positions.index.max() + k_positions.index.min()) // 2

        def turn(x: Array, index: Array, sign: float) -> Array:
            power = sign / self.fade * (index - middle).astype(jnp.float32)[..., None]
            return rotate(x, wave(angles(index, frequency), jnp.exp(power * log_z)))

        return turn(q, q_positions.index, 1.0), turn(k, k_positions.index, -1.0)


def above(name: str, value: float, least: float, what: str, equal: bool = False) -> float:
    """The value of a key of model.position. Raises Refusal unless it is above `least`, or `equal` where so told."""
    if not (value >= least if equal else value > least):
        raise Refusal(f"model.position.{name}={value}: must be {'at least' if equal else 'above'} {least:g} ({what})")
    return value


def _two_planes(shape: Shape) -> None:
    """The base is raised to H / (H - 2)."""
    if shape.head_size < 4:
        raise Refusal(
            f"NTK-aware scaling keeps one plane and stretches the others, the head size {shape.width}/{shape.heads} = "
            f"{shape.head_size} has one plane: choose model.width and model.heads so that width/heads is at least 4"
        )


def _planes(fraction: float, head_size: int) -> int:
    """The planes that a fraction of a head has."""
    if not 0 < fraction <= 1:
        raise Refusal(f"model.position.fraction={fraction}: must be above 0 and at most 1")
    turned, least = int(fraction * head_size / 2), 2 / head_size
    if turned < 1:
        raise Refusal(f"model.position.fraction={fraction}: turns nothing in a head of {head_size}; at least {least:g}")
    return turned


def _padded(frequency: np.ndarray, planes: int) -> np.ndarray:
    return np.concatenate([frequency, np.zeros(planes - len(frequency))])
