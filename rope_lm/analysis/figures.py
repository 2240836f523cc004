"""Figures for print, for colour-blind readers and for dark pages. The same data gives the same bytes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVarTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from rope_lm.analysis.comparison import Comparison
from rope_lm.analysis.estimates import Effect, NoiseFloor, interval
from rope_lm.analysis.findings import Findings
from rope_lm.analysis.runs import Run
from rope_lm.analysis.tuning import Sensitivity, Tuning

Arguments = TypeVarTuple("Arguments")
# Okabe and Ito's colours, each with its own dash and marker: lines differ in more than colour.
STYLES: list[tuple[str, Any, str]] = [
    ("#D55E00", "-", "o"),
    ("#0072B2", (0, (5, 1.5)), "s"),
    ("#009E73", (0, (3, 1, 1, 1)), "^"),
    ("#CC79A7", (0, (1.5, 1)), "D"),
    ("#E69F00", (0, (6, 1, 1, 1, 1, 1)), "v"),
    ("#56B4E9", "-.", "P"),
    ("#8C8C8C", ":", "X"),
]
FIXED = {"rotary": 0, "sinusoidal": 1, "relative_bias": 2, "learned": 3, "none": 6}
OFTEN = {"rotary_features": 4, "rotary_sinusoidal": 5}  # reserved for these arms only where they occur
GREY = "#7a7a7a"  # 4.3:1 on white and 4.5:1 on the dark page: one file for both
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 100)
RC: dict[Any, Any] = {
    "svg.hashsalt": "rope_lm",
    "svg.fonttype": "path",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "figure.constrained_layout.use": True,
    "savefig.transparent": True,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), GREY
    ),
}


def of(findings: Findings) -> Iterator[tuple[str, Figure]]:
    """Yield the figures that the data allows, each with its name."""
    for section in findings.sections:
        prefix, comparison = section.prefix, section.comparison
        if comparison and comparison.arms:
            yield f"{prefix}loss", loss_curves(comparison)
        if comparison and comparison.tested:
            yield f"{prefix}speedup", speedups(comparison)
            yield f"{prefix}profile", profile(comparison)
        if looked := [run for run in section.sweep.runs if "distance" in run.measured]:
            yield f"{prefix}distance", by_distance(looked)
            yield f"{prefix}heads", by_head(looked)
        if read := [run for run in section.sweep.runs if run.measured.get("extrapolation", {}).get("rows")]:
            yield f"{prefix}beyond", beyond(read)
            yield f"{prefix}position", by_position(read)
        if section.tunings:
            yield f"{prefix}tuning", grid(section.tunings)
        if section.sensitivities:
            yield f"{prefix}rates", by_rate(section.sensitivities, findings.treatment)
    for factor in findings.factors:
        yield f"{factor.prefix}factor", against(factor.settings, factor.values, factor.name)


def save(figure: Figure, path: Path) -> None:
    """Write path.svg and path.png, without dates."""
    with matplotlib.rc_context(RC):
        figure.savefig(f"{path}.svg", metadata={"Date": None, "Creator": None})
        figure.savefig(f"{path}.png", dpi=160, metadata={"Software": None})


def drawn(
    size: tuple[float, float],
) -> Callable[[Callable[[Axes, *Arguments], None]], Callable[[*Arguments], Figure]]:
    """Return a decorator that gives a function an `Axes` to draw on and returns the figure."""

    def decorate(draw: Callable[[Axes, *Arguments], None]) -> Callable[[*Arguments], Figure]:
        @wraps(draw)
        def drawing(*arguments: *Arguments) -> Figure:
            with matplotlib.rc_context(RC):
                figure = Figure(figsize=size)
                draw(figure.add_subplot(), *arguments)
            return figure

        return drawing

    return decorate


def style(name: str, others: Sequence[str]) -> dict[str, Any]:
    """Return colour, dash and marker of an arm. Common arms look the same in every figure."""
    known = FIXED | {other: OFTEN[other] for other in OFTEN if other in others}
    free = [i for i in range(len(STYLES)) if i not in known.values()]
    unknown = sorted(set(others) - set(known))
    # Free colours first; with more arms than colours, all colours again with other dashes and markers.
    number = known[name] if name in known else [*free, *range(len(STYLES), 7 * len(STYLES))][unknown.index(name)]
    turn, number = divmod(number, len(STYLES))
    color, dash, marker = (STYLES[(number + turn * shift) % len(STYLES)][part] for part, shift in enumerate((0, 1, 3)))
    return {"color": color, "linestyle": dash, "marker": marker}


def _legend(axes: Axes, beside: bool = False) -> None:
    """Add a legend: in the axes, or beside them if it would cover the lines."""
    count = len(axes.get_legend_handles_labels()[1])
    if count > 8:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
        _grow(axes, 0, 0.4 + 0.19 * count)  # 0.17 inches per line of text
    else:
        axes.legend(**({"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if beside else {}))


def _floor(span: Callable[..., Any], floor: NoiseFloor) -> None:
    """Draw the noise band with `span`, the method of the axis that shows speed-ups."""
    if np.isfinite(floor.low):
        span(floor.low, floor.high, color=GREY, alpha=0.22, linewidth=0)


@drawn((7.2, 4.4))
def loss_curves(axes: Axes, arms: Comparison) -> None:
    """Draw validation loss against steps: the mean over seeds, with a band for its 95% interval."""
    names = [arm.name for arm in arms]
    for arm in arms:
        steps = arm.run.curves[0].steps
        values = np.array([np.interp(steps, curve.steps, curve.nats) for curve in arm.run.curves])
        means, lows, highs = np.array([interval(column) for column in values.T]).T
        look, late = style(arm.name, names), steps > 0
        axes.plot(steps[late], means[late], label=arm.name, markevery=0.12, markersize=5, **look)
        axes.fill_between(steps[late], lows[late], highs[late], color=look["color"], alpha=0.18, linewidth=0)
    run = arms.arms[0].run
    axes.set(xscale="log", xlabel="steps", ylabel=f"{run.objective} validation loss, {arms.unit}")
    tokens = run.tokens_per_step
    top = axes.secondary_xaxis("top", functions=(partial(np.multiply, tokens), partial(np.multiply, 1 / tokens)))
    top.set(xlabel="tokens")
    for axis in (axes.xaxis, top.xaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())
    curves = [arm.run.curves[0] for arm in arms]
    first = max(np.nanmin(curve.steps[curve.steps > 0]) for curve in curves)
    highest = max(np.interp(first, curve.steps, curve.nats) for curve in curves)
    lowest = min(arm.final.mean for arm in arms)
    axes.set_ylim(lowest - 0.03 * (highest - lowest), highest)
    _legend(axes)


@drawn((7.2, 3.2))
def speedups(axes: Axes, arms: Comparison) -> None:
    """Draw the treatment's speed-up over each baseline, with its 95% interval and the noise floor as a grey band."""
    names = [arm.name for arm in arms]
    _grow(axes, 0, 1.2 + 0.3 * len(arms.tested))
    _floor(axes.axvspan, arms.floor)
    for row, (arm, contrast) in enumerate(arms.tested):
        _whisker(axes, row, contrast.steps, style(arm.name, names))
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(range(len(arms.tested)), [f"over {arm.name}" for arm, _ in arms.tested])
    words = f"speed-up of {arms.treatment} (1: as fast), log scale"
    axes.set(ylim=(-0.5, len(arms.tested) - 0.2), xscale="log", xlabel=words)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 1.12) ** 1.6)  # room for the words
    _speedup_ticks(axes.xaxis)
    axes.grid(axis="y", visible=False)


def _whisker(axes: Axes, row: float, s: Effect, look: dict[str, Any]) -> None:
    color = look["color"]
    if np.isfinite(s.low):
        axes.plot([s.low, s.high], [row, row], color=color, linewidth=3, solid_capstyle="butt")
        axes.plot([s.low, s.high], [row, row], "|", color=color, markersize=9)
    axes.plot(s.mean, row, marker=look["marker"], color=color, markersize=9)
    right = (np.nanmax([s.mean, s.high]), row)
    axes.annotate(f"{s.mean:.2f}x  {s.verdict}", right, (10, 0), textcoords="offset points", va="center")


@drawn((7.2, 3.8))
def profile(axes: Axes, arms: Comparison) -> None:
    """Draw the speed-up against the target loss.

    A line ends where the treatment does not reach the target on every seed, because the rest would be upper bounds. The
    grey band is the noise floor at the final target.
    """
    means = [1.0]
    names = [arm.name for arm in arms]
    _floor(axes.axhspan, arms.floor)
    for arm, contrast in arms.tested:
        look = style(arm.name, names)
        reached = [s for s in contrast.profile if s.bound in ("", "lower")]
        targets = [s.target for s in reached]
        axes.plot(targets, [s.mean for s in reached], label=f"over {arm.name}", markevery=4, markersize=5, **look)
        low, high = [s.low for s in reached], [s.high for s in reached]
        axes.fill_between(targets, low, high, color=look["color"], alpha=0.15, linewidth=0)
        means += [s.mean for s in reached]
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_ylim(min(0.8, min(means) * 0.9), max(1.2, max(means) * 1.15))
    axes.invert_xaxis()
    axes.set(
        xlabel=f"target: validation loss, {arms.unit} (harder to the right)", ylabel=f"speed-up of {arms.treatment}"
    )
    _legend(axes)


@drawn((7.2, 3.8))
def against(axes: Axes, settings: Sequence[Comparison], values: Sequence[float], label: str) -> None:
    """Draw the speed-up against a number that differs between settings, with 95% intervals.

    Bounds are hollow. The grey bars are the noise floors.
    """
    names = sorted({arm.name for setting in settings for arm in setting})
    baselines = sorted({arm.name for setting in settings for arm, _ in setting.tested})
    for value, setting in zip(values, settings, strict=True):
        if np.isfinite(setting.floor.low):
            axes.plot([value] * 2, setting.floor[:2], color=GREY, alpha=0.22, linewidth=22, solid_capstyle="butt")
    for number, name in enumerate(baselines):
        look, shift = style(name, names), 1.03 ** (number - (len(baselines) - 1) / 2)  # side by side
        found = [
            (value * shift, contrast.steps)
            for value, setting in zip(values, settings, strict=True)
            for arm, contrast in setting.tested
            if arm.name == name
        ]
        axes.plot([x for x, _ in found], [s.mean for _, s in found], label=f"over {name}", **look | {"marker": ""})
        for x, s in found:
            axes.plot([x, x], [s.low, s.high], color=look["color"], linewidth=2)
            filled = "none" if s.bound else look["color"]
            axes.plot(x, s.mean, marker=look["marker"], color=look["color"], markersize=8, markerfacecolor=filled)
    axes.set(xscale="log", xlabel=label)
    axes.margins(x=0.12)
    _ticks(axes.xaxis, values, ",g")
    _speedup_axis(axes, settings[0].treatment)


@drawn((7.2, 3.8))
def grid(axes: Axes, tunings: Sequence[Tuning]) -> None:
    """Draw the final loss of each arm against the peak learning rate; a ring marks its best."""
    names = [tuning.arm for tuning in tunings]
    for tuning in tunings:
        look = style(tuning.arm, names)
        finals = [final if np.isfinite(final) else np.nan for final in tuning.final_nats]
        axes.plot(tuning.learning_rates, finals, label=tuning.arm, **look)
        axes.plot(tuning.best, min(tuning.final_nats), "o", markersize=14, fillstyle="none", color=look["color"])
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="final validation loss, nats per token")
    _ticks(axes.xaxis, sorted({rate for tuning in tunings for rate in tuning.learning_rates}))
    _legend(axes, beside=True)


@drawn((7.2, 3.8))
def by_rate(axes: Axes, sensitivities: Sequence[Sensitivity], treatment: str) -> None:
    """Draw the treatment's speed-up at each shared learning rate and, on the right, with each arm at its own best."""
    names = [treatment, *(row.baseline for row in sensitivities)]
    rates = sorted({rate for row in sensitivities for rate in row.learning_rates})
    for row in sensitivities:
        look = style(row.baseline, names)
        at = [(rates.index(rate), s.mean) for rate, s in zip(row.learning_rates, row.shared, strict=True) if s]
        if at:
            axes.plot(*zip(*at, strict=True), label=f"over {row.baseline}", **look)
        if row.tuned:
            axes.plot(len(rates), row.tuned.mean, marker=look["marker"], color=look["color"], markersize=9)
    axes.axvline(len(rates) - 0.5, color=GREY, linewidth=1, linestyle=":")
    axes.set_xticks(range(len(rates) + 1), [*(f"{rate:g}" for rate in rates), "each its\nown best"])
    axes.set_xlabel("peak learning rate of both arms")
    _speedup_axis(axes, treatment)


def _speedup_axis(axes: Axes, treatment: str) -> None:
    """Make the y axis one of speed-ups on a log scale, and add the legend."""
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set(yscale="log", ylabel=f"speed-up of {treatment}, log scale")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), max(high, 1.12))
    _speedup_ticks(axes.yaxis)
    _legend(axes, beside=True)


def _speedup_ticks(axis: Axis) -> None:
    low, high = sorted(axis.get_view_interval())
    _ticks(axis, [tick for tick in TICKS if low <= tick <= high])


def _ticks(axis: Axis, values: Sequence[float], form: str = "g") -> None:
    axis.set_ticks(values, [f"{value:{form}}" for value in values])
    axis.set_minor_formatter(NullFormatter())


def _grow(axes: Axes, width: float, height: float) -> None:
    """Make the figure at least this large, in inches."""
    figure = axes.get_figure(root=True)
    if figure is not None:
        figure.set_size_inches(np.maximum(figure.get_size_inches(), (width, height)))


@drawn((7.2, 4.2))
def beyond(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the loss against the length of the text that is read, in pieces that do not overlap.

    Thin lines are rotary scaled at evaluation. A line ends at the longest text that its encoding can read.
    """
    lengths = set()
    for name, look, rows in _evaluated(runs):
        read = [row["multiple"] * row["length"] for row in rows]
        axes.plot(read, [np.mean(row["apart"]) for row in rows], label=name, markersize=5, **look)
        lengths |= set(read)
    axes.set(xscale="log", xlabel="tokens read at once (trained on the fewest)", ylabel="nats per token")
    _ticks(axes.xaxis, sorted(lengths), ",")
    _legend(axes)


@drawn((7.2, 4.2))
def by_position(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the loss by position in the longest text that was read; the vertical line is the trained length."""
    for name, look, rows in _evaluated(runs):
        row = rows[-1]
        axes.plot(row["positions"], np.mean(row["by_position"], 0), label=name, **look | {"marker": ""})
    axes.axvline(max(run.measured["extrapolation"]["length"] for run in runs), color=GREY, linewidth=1)
    axes.set(xscale="log", xlabel="position in the piece, in tokens", ylabel="nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _legend(axes)


def _evaluated(runs: Sequence[Run]) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Yield name, look and rows of each line: a run as it was trained, then as it was scaled."""
    names = [run.arm for run in runs]
    for run in runs:
        measured = run.measured["extrapolation"]
        scaled = {row["scaling"]: f"{run.arm} as {row['scaling']}" for row in measured["rows"] if row["scaling"]}
        for scaling in dict.fromkeys(row["scaling"] for row in measured["rows"]):
            rows = [row | {"length": measured["length"]} for row in measured["rows"] if row["scaling"] == scaling]
            name = scaled.get(scaling, run.arm)
            yield name, style(name, [*names, *scaled.values()]) | ({"linewidth": 1} if scaling else {}), rows


@drawn((7.2, 4.2))
def by_distance(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the share of attention by distance, in bins that double in width: mean over members, layers and heads."""
    names = [run.arm for run in runs]
    for run in runs:
        share = np.mean(run.measured["distance"]["mass"], axis=(0, 1, 2))
        axes.plot(range(len(share)), share, label=run.arm, markersize=5, **style(run.arm, names))
    bins = list(pairwise(runs[0].measured["distance"]["edges"]))
    words = [f"{low}" if high - low == 1 else f"{low} to {high - 1}" for low, high in bins]
    axes.set_xticks(range(len(words)), words, rotation=35, ha="right")
    axes.set(xlabel="distance of the key, in tokens before the query", ylabel="share of attention", ylim=(0, None))
    _legend(axes)


@drawn((7.2, 4.2))
def by_head(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the mean attended distance of each head of each member, with layers side by side."""
    names = [run.arm for run in runs]
    for place, run in enumerate(runs):
        mean = np.array(run.measured["distance"]["mean"])  # [members layers heads]
        look = style(run.arm, names)
        for layer in range(mean.shape[1]):
            values = mean[:, layer].ravel()
            at = place + (layer - (mean.shape[1] - 1) / 2) * 0.7 / mean.shape[1]
            axes.plot([at] * len(values), values, look["marker"], color=look["color"], markersize=5, alpha=0.7)
    _grow(axes, 0.5 * len(runs), 0)
    axes.set_xticks(range(len(runs)), names, rotation=20, ha="right")
    axes.set(ylabel="mean distance, tokens", xlabel="layers from left to right", ylim=(0, None))


@drawn((7.2, 6.4))
def decay(
    axes: Axes,
    distances: np.ndarray,
    kept: Mapping[str, np.ndarray],
    bound: np.ndarray,
    added: Mapping[str, np.ndarray],
) -> None:
    """Draw the effect of encodings on a score as two tokens move apart.

    Above: the share that rotations keep of the score of a vector with itself, and RoFormer's upper bound (section
    3.4.3). Below: the value added to logits, mean over heads.
    """
    figure = axes.figure
    axes.remove()
    above, below = figure.subplots(2, 1, sharex=True)
    names = [*kept, *added]
    for name, values in kept.items():
        above.plot(distances + 1, values, label=name, linewidth=1.2, **style(name, names) | {"marker": ""})
    above.plot(distances + 1, bound, color=GREY, linestyle=":", label="RoFormer's bound for rotary")
    for name, values in added.items():
        below.plot(distances + 1, values.mean(0), label=name, **style(name, names) | {"marker": ""})
    above.set(ylabel="share of the score that is kept")
    below.set(xscale="log", xlabel="distance in tokens, plus one", yscale="symlog", ylabel="added to the logit")
    below.set_ylim(top=1)
    for part in (above, below):
        part.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)


@drawn((7.2, 3.4))
def speeds(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the tokens per second of each encoding, from the rows of a benchmark."""
    _grow(axes, 0, 1 + 0.28 * len(rows))
    names = [row["encoding"] for row in rows]
    speeds = [row["tokens_per_second"] for row in rows]
    bars = axes.barh(range(len(rows)), speeds, color=[style(name, names)["color"] for name in names], height=0.6)
    axes.bar_label(bars, [f" {speed:,.0f}" for speed in speeds], color=GREY)
    axes.set_yticks(range(len(rows)), [f"{row['encoding']} ({row['scale']})" for row in rows])
    axes.set(xlabel="tokens per second, training")
    axes.margins(x=0.14)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
