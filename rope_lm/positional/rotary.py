"""Encodings that rotate queries and keys: one `rotate`, and a frequency vector for each variant.

A plane with frequency 0 is not turned, so partial rotation and layers without rotation are frequencies too. All
variants pair component i with i + H/2 (half-split); `rope_lm.positional.pairing` converts other pairings.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm.positional.base import Constant, PositionalEncoding, Shape
from rope_lm.positions import Positions, View
from rope_lm.refusal import Refusal

STRIDE = 1024  # tokens; see `angles`


def frequencies(size: int, base: float) -> np.ndarray:
    """Return radians per token of the size/2 planes: base ** (-2i / size) (arXiv 2104.09864, section 3.2.2)."""
    return float(base) ** (-np.arange(0, size, 2) / size)


def steps(frequency: np.ndarray) -> np.ndarray:
    """Return float32 [2 F]: radians per STRIDE tokens, modulo whole turns, and radians per token; for `angles`."""
    return np.stack([np.remainder(STRIDE * frequency, 2 * np.pi), frequency]).astype(np.float32)


def angles(index: Int[Array, "*B"], frequency: np.ndarray | Float[Array, "2 F"]) -> Float[Array, "*B F"]:
    """Return the angle in radians of each plane at an index, in float32 and up to whole turns.

    `frequency`: radians per token in float64 [F], or what `steps` made of it. Whole strides are taken modulo a turn in
    float64, so the angle is exact to 3e-4 radians at index 1,000,000, where a float32 product is off by 0.06.
    """
    per = frequency if frequency.ndim == 2 else steps(np.asarray(frequency))
    near = jnp.fmod(index, STRIDE)
    far = (index - near) // STRIDE
    return far.astype(jnp.float32)[..., None] * per[0] + near.astype(jnp.float32)[..., None] * per[1]


class Wave(NamedTuple):
    """Cosine and sine of each plane's angle, multiplied by the plane's scale."""

    cos: Float[Array, "B T F"]
    sin: Float[Array, "B T F"]


def wave(angle: Float[Array, "B T F"], scale: float | Float[Array, "B T F"] = 1.0) -> Wave:
    """Return the wave of an angle in radians."""
    return Wave(scale * jnp.cos(angle), scale * jnp.sin(angle))


def rotate(x: Float[Array, "B T N H"], by: Wave) -> Float[Array, "B T N H"]:
    """Turn the plane of components (i, i + H/2) by the angle of wave i (RoFormer, Eq. 34, in the half-split pairing).

    The rotation is computed in float32 and returned in the dtype of x.
    """
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def upper_bound(frequency: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Return the bound on the score of two tokens at each distance, up to a factor that depends on the vectors alone.

    It is the mean over planes of |sum of exp(i d theta) over the planes up to it| (RoFormer, section 3.4.3, Eq. 37).
    """
    turns = np.exp(1j * np.multiply.outer(distances, frequency))
    return np.abs(np.cumsum(turns, axis=-1)).mean(axis=-1)


class Rotary(PositionalEncoding):
    """Rotary position embedding (arXiv 2104.09864, section 3.2). `base` of the frequencies: 10,000 in the paper.

    A variant overrides `frequency`, and `amplitude` if it scales the logits too. A variant in which the rotation of a
    key depends on other positions as well overrides `wave` and sets `turns_alone` to False.
    """

    amplitude: float = 1.0  # of queries and of keys

    def __init__(self, base: float, *, shape: Shape, rngs: nnx.Rngs):
        if shape.head_size % 2:
            raise Refusal(
                f"rotary turns pairs of components, the head size {shape.head_size} is odd: choose model.width and "
                "model.heads so that width/heads is even"
            )
        self.base, self.head_size = above("base", base, 1, "10000 in the paper"), shape.head_size

    def frequency(self) -> np.ndarray:
        """Return the radians per token of each of the H/2 planes."""
        return frequencies(self.head_size, self.base)

    def wave(self, at: Positions, keys: Positions) -> Wave:
        """Return the wave that rotates the tokens at positions `at`, in a view with these keys."""
        return wave(angles(at.index, self.frequency()), self.amplitude)

    def rotate(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], view: View
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
        return rotate(q, self.wave(view.q, view.k)), rotate(k, self.wave(view.k, view.k))


class RotaryFeatures(PositionalEncoding):
    """Rotary after the feature map of linear attention (RoFormer, arXiv 2104.09864, section 3.3, Eq. 19).

    The features of queries and keys are rotated in the numerator only, so the denominator stays positive.
    `base` as in Rotary.
    """

    def __init__(self, base: float, *, shape: Shape, rngs: nnx.Rngs):
        self.base = above("base", base, 1, "10000 in the paper")

    def turn_features(
        self, q: Float[Array, "B T N F"], k: Float[Array, "B S N F"], view: View
    ) -> tuple[Float[Array, "B T N F"], Float[Array, "B S N F"]]:
        frequency = frequencies(q.shape[-1], self.base)
        q_wave, k_wave = (wave(angles(at.index, frequency)) for at in (view.q, view.k))
        return rotate(q, q_wave), rotate(k, k_wave)


class PartialRotary(Rotary):
    """Rotary on a `fraction` of the components of a head, at the frequencies of a head of that size.

    The other components carry no position (GPT-J and GPT-NeoX, arXiv 2204.06745, section 2.1; a quarter there).
    """

    def __init__(self, base: float, fraction: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, shape=shape, rngs=rngs)
        self.turned = _planes(fraction, shape.head_size)

    def frequency(self) -> np.ndarray:
        return _padded(frequencies(2 * self.turned, self.base), self.head_size // 2)


class PRoPE(Rotary):
    """p-RoPE: keep a `fraction` of the frequencies and set the lowest to zero (arXiv 2410.06205, section 6)."""

    def __init__(self, base: float, fraction: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, shape=shape, rngs=rngs)
        self.turned = _planes(fraction, shape.head_size)

    def frequency(self) -> np.ndarray:
        return _padded(frequencies(self.head_size, self.base)[: self.turned], self.head_size // 2)


class LayeredRotary(Rotary):
    """Rotary with one base per layer, repeated over the layers.

    `bases=(1e4, 0)` turns in every other layer, where 0 means no position (RNoPE, arXiv 2501.18795; Llama 4);
    `(1e4, 1e6)` has local and global layers (Gemma 3, arXiv 2503.19786, section 2).
    """

    def __init__(self, bases: tuple[float, ...], *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(10_000.0, shape=shape, rngs=rngs)
        if len(bases) > shape.layers:
            raise Refusal(
                f"model.position.bases={tuple(bases)}: a pattern of {len(bases)} layers, the model has {shape.layers}"
            )
        for base in bases:
            if base != 0:
                above("bases", base, 1, "each, or 0 for a layer that is not turned")
        still = np.zeros(shape.head_size // 2)
        pattern = [steps(frequencies(shape.head_size, base) if base else still) for base in bases]
        layers = [pattern[layer % len(pattern)] for layer in range(shape.layers)]
        self.steps = Constant(jnp.asarray(np.stack(layers)), axes=("layer", "part", "plane"))

    def wave(self, at: Positions, keys: Positions) -> Wave:
        # Behind a barrier, because XLA would otherwise recompute each sine for every row and head.
        return Wave(*jax.lax.optimization_barrier(tuple(wave(angles(at.index, self.steps[...])))))


class LinearRotary(Rotary):
    """Position interpolation: positions are divided by `factor` (arXiv 2306.15595, section 2.2)."""

    def __init__(self, base: float, factor: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, shape=shape, rngs=rngs)
        self.factor = above("factor", factor, 1, "how many times the trained length is to be reached", equal=True)

    def frequency(self) -> np.ndarray:
        return frequencies(self.head_size, self.base) / self.factor


class NTKRotary(LinearRotary):
    """NTK-aware scaling: the base grows so that the lowest frequency is divided by `factor` and the highest stays.

    Sources: bloc97 2023; arXiv 2309.00071, section 3.1.
    """

    def __init__(self, base: float, factor: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, factor, shape=shape, rngs=rngs)
        _two_planes(shape)

    def frequency(self) -> np.ndarray:
        return frequencies(self.head_size, self.base * self.factor ** (self.head_size / (self.head_size - 2)))


class DynamicRotary(LinearRotary):
    """Dynamic NTK: NTK-aware scaling by how far a document exceeds `trained_length`, in tokens.

    Sources: emozilla 2023; arXiv 2309.00071, section 3.3, in the form of Hugging Face's `dynamic`, with its `factor`.
    Each document of a row is scaled by its own length. Up to the trained length it is plain rotary. Beyond it, a full
    pass rotates early tokens differently from decoding, which saw a shorter text at the time; this is inherent in the
    method.
    """

    turns_alone = False  # a key's angle depends on the length of its document

    def __init__(self, base: float, factor: float, trained_length: int, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, factor, shape=shape, rngs=rngs)
        _two_planes(shape)
        self.trained_length = _trained(trained_length)

    def wave(self, at: Positions, keys: Positions) -> Wave:
        if keys.start is None:
            same = at.segment[:, :, None] == keys.segment[:, None, :]
            length = 1 + jnp.max(jnp.where(same, keys.index[:, None, :], 0), axis=-1)  # [B T], of the token's document
        else:
            length = jnp.full((1, 1), keys.start + keys.length)
        beyond = jnp.maximum(length, self.trained_length).astype(jnp.float32) / self.trained_length
        base = self.base * (self.factor * beyond - (self.factor - 1)) ** (self.head_size / (self.head_size - 2))
        frequency = base[..., None] ** (-jnp.arange(0, self.head_size, 2, dtype=jnp.float32) / self.head_size)
        return wave(at.index.astype(jnp.float32)[..., None] * frequency)


class YaRN(LinearRotary):
    """YaRN (arXiv 2309.00071, sections 3.2 to 3.4): interpolate slow planes, keep fast ones, and scale the logits.

    Planes that turn more than `beta_fast` times in `trained_length` tokens stay. Planes that turn less than `beta_slow`
    times are divided by `factor`. A ramp runs between the (whole) planes at these two bounds. Queries and keys are each
    scaled by 0.1 ln(factor) + 1 = sqrt(1/t), and so the logits by 1/t.
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
        self.trained_length = _trained(trained_length)
        self.beta_slow = above("beta_slow", beta_slow, 0, "turns in the trained length; 1 in the paper")
        self.beta_fast = above("beta_fast", beta_fast, beta_slow, "beta_slow; 32 turns in the paper")
        self.amplitude = 0.1 * math.log(factor) + 1

    def frequency(self) -> np.ndarray:
        def plane(turns: float) -> float:
            """Return the plane that turns this many times in the trained length."""
            wavelengths = self.trained_length / (turns * 2 * math.pi)
            return self.head_size * math.log(wavelengths) / (2 * math.log(self.base))

        plain = frequencies(self.head_size, self.base)
        first = max(math.floor(plane(self.beta_fast)), 0)
        last = min(math.ceil(plane(self.beta_slow)), self.head_size - 1)
        ramp = np.clip((np.arange(self.head_size // 2) - first) / max(last - first, 1e-3), 0, 1)
        return plain * (1 - ramp) + plain / self.factor * ramp


class Llama3Rotary(LinearRotary):
    """Llama 3.1's scaling (arXiv 2407.21783, section 3.4.2; the released code has 8, 1, 4).

    Wavelengths above trained_length/`low_freq_factor` tokens are stretched by `factor`, those below
    trained_length/`high_freq_factor` are kept, and those in between are interpolated.
    """

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
        self.trained_length = _trained(trained_length)
        self.low = above("low_freq_factor", low_freq_factor, 0, "1 in Llama 3.1")
        self.high = above("high_freq_factor", high_freq_factor, low_freq_factor, "low_freq_factor; 4 in Llama 3.1")

    def frequency(self) -> np.ndarray:
        plain = frequencies(self.head_size, self.base)
        turns = self.trained_length * plain / (2 * np.pi)
        smooth = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return plain * smooth + plain / self.factor * (1 - smooth)


class XPos(Rotary):
    """xPos: rotary whose planes fade with distance, the fast ones faster (arXiv 2212.10554, section 3).

    Queries are scaled by z ** (i / `fade`) and keys by z ** (-j / fade), z = (2 i/H + 0.4) / 1.4 of plane i. The powers
    are taken from the middle of the keys, so that a shift of all positions changes nothing. Float32 can hold 70,000
    tokens between the first and the last key (fade = 512, as in the paper).
    """

    turns_alone = False  # powers are taken from the middle of all keys
    looks_back = True  # it would grow towards keys ahead
    relative_norms = True

    def __init__(self, base: float, fade: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, shape=shape, rngs=rngs)
        self.fade = above("fade", fade, 0, "tokens; 512 in the paper")

    def rotate(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], view: View
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
        log_z = np.log((np.arange(0, self.head_size, 2) / self.head_size + 0.4) / 1.4).astype(np.float32)
        middle = (view.k.index.max() + view.k.index.min()) // 2

        def turn(x: Float[Array, "B T N H"], index: Int[Array, "#B T"], sign: float) -> Float[Array, "B T N H"]:
            power = sign / self.fade * (index - middle).astype(jnp.float32)[..., None]
            return rotate(x, wave(angles(index, self.frequency()), jnp.exp(power * log_z)))

        return turn(q, view.q.index, 1.0), turn(k, view.k.index, -1.0)


def above(name: str, value: float, least: float, note: str, equal: bool = False) -> float:
    """Return the value of a key of model.position. Raises Refusal unless it is above `least` (or equal, if `equal`)."""
    if not (value >= least if equal else value > least):
        raise Refusal(f"model.position.{name}={value}: must be {'at least' if equal else 'above'} {least:g} ({note})")
    return value


def _trained(length: int) -> int:
    return int(above("trained_length", length, 1, "the length that the model was trained on", equal=True))


def _two_planes(shape: Shape) -> None:
    """Raise Refusal for heads of one plane, because the base is raised to H / (H - 2)."""
    if shape.head_size < 4:
        raise Refusal(
            f"NTK-aware scaling keeps one plane and stretches the others, the head size {shape.head_size} has one "
            "plane: choose model.width and model.heads so that width/heads is at least 4"
        )


def _planes(fraction: float, head_size: int) -> int:
    """Return the number of planes in a fraction of a head."""
    if not 0 < fraction <= 1:
        raise Refusal(f"model.position.fraction={fraction}: must be above 0 and at most 1")
    turned, least = int(fraction * head_size / 2), 2 / head_size
    if turned < 1:
        raise Refusal(f"model.position.fraction={fraction}: turns nothing in a head of {head_size}; at least {least:g}")
    return turned


def _padded(frequency: np.ndarray, planes: int) -> np.ndarray:
    return np.concatenate([frequency, np.zeros(planes - len(frequency))])
