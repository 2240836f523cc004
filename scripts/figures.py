"""Draw the figures of docs/rotary.md with the project's own rotation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/figures.py`

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from matplotlib.figure import Figure

from rope_lm import environment
from rope_lm.analysis import illustrations
from rope_lm.positional.rotary import angles, frequencies, rotate, upper_bound, wave
from rope_lm.refusal import Refusal
from scripts import entry

ROOT = Path(__file__).parents[1]
EXAMPLES = """examples:
  python -m scripts.figures                    docs/figures/*.svg
  python -m scripts.figures --out=elsewhere

The same code draws the same bytes every time.
exit status: 0, or 2 for a mistake in the command."""
BASE = 10_000.0
SMALL, LARGE = 8, 128  # components of a head: where its numbers are shown, and where its scores are
WINDOW = 32  # tokens


def main() -> int:
    parser = entry.parser("figures", __doc__, EXAMPLES)
    parser.add_argument("--out", type=entry.path, default=ROOT / "docs/figures", help="the folder to draw into")
    out = parser.parse_args().out
    environment.pin()
    drawn = figures()
    try:
        illustrations.draw(drawn, out)
    except OSError as error:
        raise Refusal(f"--out={str(out)!r} cannot be written ({error.strerror}): choose another folder") from error
    print("\n".join(str(out / f"{name}.svg") for name in drawn))
    return 0


def figures() -> dict[str, Figure]:
    """Return every figure of docs/rotary.md by its file's name."""
    return {"planes": planes(), "forms": forms(), "scores": scores(), "decay": decay()}


def turned(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the vector x [H] as a token at each of T positions has it, [T H]."""
    by = wave(angles(jnp.asarray(positions)[None], frequencies(len(x), BASE)))
    rows = jnp.broadcast_to(jnp.asarray(x, jnp.float32), (1, len(positions), 1, len(x)))
    return rounded(rotate(rows, by)[0, :, 0])


def rounded(values: ArrayLike) -> np.ndarray:
    """Return values in float64 without the last bits, which differ between machines."""
    return np.round(np.asarray(values, np.float64), 4)


def planes() -> Figure:
    """Draw the first pairs of a small head at positions 0 to 5."""
    start = np.repeat([np.cos(0.4), np.sin(0.4)], SMALL // 2)
    pairs = turned(start, np.arange(6)).reshape(-1, 2, SMALL // 2).swapaxes(1, 2)
    return illustrations.planes(pairs[:, :3], frequencies(SMALL, BASE)[:3])


def forms() -> Figure:
    """Draw the rotation of a small head at position 30 in both of its forms."""
    position = np.array([30])
    matrix = np.stack([turned(row, position)[0] for row in np.eye(SMALL)], axis=1)
    angle = angles(jnp.asarray(position)[None], frequencies(SMALL, BASE))
    cos, sin = (rounded(np.tile(part[0, 0], 2)) for part in wave(angle))
    x = np.array([1.0, -0.5, 0.8, 0.3, 0.6, 1.2, -0.9, 0.4])
    first, second = np.split(x, 2)
    return illustrations.forms(matrix, x, cos, np.concatenate([-second, first]), sin)


def scores() -> Figure:
    """Draw the score of one vector with itself at pairs of positions, and at the same distances further on."""
    x = np.random.default_rng(0).normal(size=LARGE) / LARGE**0.5
    near = turned(x, np.arange(24))
    distances = np.arange(65)
    shifted = {
        f"key at {start:,}": rounded(turned(x, start + distances) @ turned(x, np.array([start]))[0])
        for start in (0, 1_000, 100_000)
    }
    return illustrations.scores(rounded(near @ near.T), distances, shifted)


def decay() -> Figure:
    """Draw RoFormer's bound on the score as two tokens move apart."""
    distances = np.arange(257)
    bounds = {f"base {base:,}": upper_bound(frequencies(LARGE, base), distances) for base in (10_000, 500_000)}
    shares = {label: rounded(bound / bound[0]) for label, bound in bounds.items()}
    return illustrations.decay(distances, shares, WINDOW)


if __name__ == "__main__":
    entry.end(main)
