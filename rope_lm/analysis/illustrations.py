"""The figures of docs/rotary.md. Each draws arrays that the caller computed, so none needs JAX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Arc

from rope_lm.analysis.figures import GREY, RC, STYLES

BLUE, ORANGE, GREEN = (STYLES[number][0] for number in (1, 0, 2))
HEAT = "PuOr"  # white at 0, safe for the colour-blind
LABEL = "#333333"  # on white and on pale cells
LOOK: dict[Any, Any] = {**RC, "axes.grid": False, "mathtext.fontset": "cm"}


def draw(figures: Mapping[str, Figure], folder: Path) -> None:
    """Write each figure to folder/NAME.svg. The same arrays give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(LOOK):
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def planes(vectors: np.ndarray, frequency: np.ndarray) -> Figure:
    """Draw one vector in each plane, rotated to positions 0, 1, 2, ...

    Args:
      vectors: [T P 2], the two components of each of P planes at T positions.
      frequency: [P], radians per token of each plane.
    """
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(8.4, 3.1))
        for number, axes in enumerate(figure.subplots(1, len(frequency))):
            _plane(axes, vectors[:, number], float(frequency[number]))
            axes.set_title(rf"pair {number}: $\theta_{number}$ = {frequency[number]:g} radians per token", fontsize=9)
        return figure


def _plane(axes: Axes, vectors: np.ndarray, frequency: float) -> None:
    last, apart = len(vectors) - 1, frequency > 0.5  # radians
    labels = {m: f"m = {m}" for m in range(last + 1)} if apart else {0: "m = 0", last: f"m = {last}"}
    labels = {0: f"m = 0 to {last}"} if frequency < 0.05 else labels  # closer arrows have no room for more
    axes.add_artist(Arc((0, 0), 2, 2, color=GREY, lw=0.8, alpha=0.6))
    for position, (x, y) in enumerate(vectors):
        shade = 1 - 0.75 * position / last
        arrow = {"arrowstyle": "-|>", "color": BLUE, "alpha": shade, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (x, y), (0, 0), arrowprops=arrow)
    for position, label in labels.items():
        x, y = 1.2 * vectors[position]
        axes.text(x, y, label, ha="left" if x > 0.6 else "center", va="center", fontsize=8)
    if apart:
        start = np.degrees(np.arctan2(vectors[0, 1], vectors[0, 0]))
        axes.add_artist(Arc((0, 0), 0.7, 0.7, theta1=start, theta2=start + np.degrees(frequency), color=ORANGE, lw=1.6))
        middle = np.radians(start) + frequency / 2
        axes.text(0.5 * np.cos(middle), 0.5 * np.sin(middle), r"$\theta$", color=ORANGE, ha="center", va="center")
    axes.set(xlim=(-1.45, 1.45), ylim=(-1.45, 1.45), aspect="equal")
    axes.axis("off")


def forms(matrix: np.ndarray, x: np.ndarray, cosine: np.ndarray, swapped: np.ndarray, sine: np.ndarray) -> Figure:
    """Draw one rotation as a matrix product and as two multiplications and an addition.

    Args:
      matrix: [H H], the rotation.
      x: [H], the vector to rotate.
      cosine: [H], the factor of x.
      swapped: [H], x with its halves exchanged, the second one negated.
      sine: [H], the factor of `swapped`.
    """
    size = len(x)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(9.2, 3.3))
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        place = _table(left, matrix, 0, r"$R_m$")
        place = _table(left, x[:, None], _word(left, place, "", size), r"$x$")
        place = _table(left, (matrix @ x)[:, None], _word(left, place, "=", size), r"$R_m x$")
        left.set_xlim(-0.5, place + 0.3)
        left.set_title(f"matrix form: {size}² multiplications", fontsize=10)
        place = 0.0
        for word, column, name in (
            ("", x, r"$x$"),
            ("⊙", cosine, r"$\cos m\theta$"),
            ("+", swapped, r"$\tilde x$"),
            ("⊙", sine, r"$\sin m\theta$"),
            ("=", x * cosine + swapped * sine, r"$R_m x$"),
        ):
            place = _table(right, column[:, None], _word(right, place, word, size) if word else place, name)
        right.set_xlim(-0.5, place + 0.3)
        right.set_title(f"what is computed: 2 × {size} multiplications, {size} additions", fontsize=10)
        for axes in (left, right):
            axes.set_ylim(size + 0.2, -1.4)
            axes.set_aspect("equal")
            axes.axis("off")
        return figure


def _table(axes: Axes, values: np.ndarray, left: float, name: str) -> float:
    """Draw numbers as coloured cells from `left` on; return where they end."""
    rows, columns = values.shape
    edges = left + np.arange(columns + 1), np.arange(rows + 1)
    axes.pcolormesh(*edges, values, cmap=HEAT, norm=Normalize(-2, 2), edgecolors="white", linewidth=0.8)
    for row, column in np.ndindex(rows, columns):
        value = values[row, column]
        if value:
            axes.text(left + column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=6, color=LABEL)
    axes.text(left + columns / 2, -0.5, name, ha="center", va="center", fontsize=11)
    return left + columns


def _word(axes: Axes, left: float, word: str, size: int) -> float:
    axes.text(left + 0.5, size / 2, word, ha="center", va="center", fontsize=12)
    return left + 1


def scores(table: np.ndarray, distances: np.ndarray, shifted: Mapping[str, np.ndarray]) -> Figure:
    """Draw the score of one query and one key at any pair of positions.

    Args:
      table: [T S], the score with the query at m and the key at n.
      distances: [D], tokens from the key to the query.
      shifted: for each label the scores [D] at these distances, with the key at another position.
    """
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(8.4, 3.4))
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
        most = float(np.abs(table).max())
        image = left.pcolormesh(table, cmap=HEAT, norm=Normalize(-most, most))
        figure.colorbar(image, ax=left, label="score", shrink=0.9)
        left.set(xlabel="position n of the key", ylabel="position m of the query", aspect="equal")
        left.invert_yaxis()
        for (label, values), (color, dash, _), width in zip(shifted.items(), STYLES, (5, 3, 1.4), strict=False):
            right.plot(distances, values, label=label, color=color, linestyle=dash, linewidth=width, alpha=0.85)
        right.set(xlabel="distance m - n, in tokens", ylabel="score")
        right.grid(alpha=0.25)
        right.legend(fontsize=9)
        return figure


def decay(distances: np.ndarray, bounds: Mapping[str, np.ndarray], window: int) -> Figure:
    """Draw the bound on the score against the distance, and its mean over windows of `window` tokens.

    Args:
      distances: [D], tokens, from 0 on.
      bounds: for each label the bound at each distance [D], as a share of that at distance 0.
      window: tokens. Windows start at distance 1.
    """
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(7.2, 3.4))
        axes = figure.subplots()
        for (label, bound), color in zip(bounds.items(), (BLUE, GREEN), strict=False):
            axes.plot(distances, bound, color=color, linewidth=1, alpha=0.6, label=label)
            means = bound[1:].reshape(-1, window).mean(1)
            edges = np.append(distances[1::window], distances[-1] + 1)
            axes.stairs(means, edges, color=color, linewidth=2.2, baseline=None, label=f"its mean over {window} tokens")
        axes.set(xlabel="distance, in tokens", ylabel="bound on the score, share", xlim=(0, None), ylim=(0, 1))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=9)
        return figure
