"""The figures: for print, for the colour-blind, and for a page in the dark. The same data gives the same bytes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from rope_lm.analysis.comparison import Comparison, Sensitivity, Tuning
from rope_lm.analysis.convergence import Floor, Speedup, interval
from rope_lm.analysis.runs import Run

# Okabe and Ito's colours, each with a dash and a marker of its own: a line can be told apart without its colour.
STYLES = [
    ("#D55E00", "-", "o"),
    ("#0072B2", (0, (5, 1.5)), "s"),
    ("#009E73", (0, (3, 1, 1, 1)), "^"),
    ("#CC79A7", (0, (1.5, 1)), "D"),
    ("#E69F00", (0, (6, 1, 1, 1, 1, 1)), "v"),
    ("#56B4E9", "-.", "P"),
    ("#8C8C8C", ":", "X"),
]
FIXED = {"rotary": 0, "sinusoidal": 1, "relative_bias": 2, "learned": 3, "none": 6}
OFTEN = {"rotary_features": 4, "rotary_sinusoidal": 5}  # theirs where they are, a stranger's where they are not
GREY = "#7a7a7a"  # 4.3:1 on white and 4.5:1 on the dark page: one file for both
RC = {
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
    **{
        key: GREY
        for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    },
}


def style(name: str, others: Sequence[str]) -> dict[str, object]:
    """Colour, dash and marker of an arm; the same arm looks the same in every figure."""
    known = FIXED | {each: OFTEN[each] for each in OFTEN if each in others}
    free = [i for i in range(len(STYLES)) if i not in known.values()]
    strangers = sorted(set(others) - set(known))
    # The colours that are left first; where there are more arms, all colours again with other dashes and markers.
    number = known[name] if name in known else [*free, *range(len(STYLES), 7 * len(STYLES))][strangers.index(name)]
    again, number = divmod(number, len(STYLES))
    color, dash, marker = (STYLES[(number + again * shift) % len(STYLES)][part] for part, shift in enumerate((0, 1, 3)))
    return {"color": color, "linestyle": dash, "marker": marker}


def _legend(axes: plt.Axes, beside: bool = False) -> None:
    """In the axes, or beside them where it would cover the lines."""
    count = len(axes.get_legend_handles_labels()[1])
    if count > 8:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
        axes.figure.set_figheight(max(axes.figure.get_figheight(), 0.4 + 0.19 * count))  # a line of it takes 0.17 inch
    else:
        axes.legend(**({"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if beside else {}))


def save(figure: Figure, path: Path) -> None:
    """Writes path.svg and path.png, without dates."""
    with matplotlib.rc_context(RC):
        figure.savefig(f"{path}.svg", metadata={"Date": None, "Creator": None})
        figure.savefig(f"{path}.png", dpi=160, metadata={"Software": None})
    plt.close(figure)


def drawn(size: tuple[float, float]) -> Callable[[Callable], Callable[..., Figure]]:
    """Gives the function a pair of axes to draw on, and returns the figure."""

    def wrap(draw: Callable) -> Callable[..., Figure]:
        def make(*arguments: object) -> Figure:
            with matplotlib.rc_context(RC):
                figure, axes = plt.subplots(figsize=size)
                draw(axes, *arguments)
                return figure

        make.__doc__, make.__name__ = draw.__doc__, draw.__name__
        return make

    return wrap


@drawn((7.2, 4.4))
def loss_curves(axes: plt.Axes, arms: Comparison) -> None:
    """Validation loss against steps: the mean over seeds, and the 95% interval of that mean as a band."""
    names = [arm.name for arm in arms]
    for arm in arms:
        steps = arm.run.curves[0].steps
        table = np.array([np.interp(steps, curve.steps, curve.nats) for curve in arm.run.curves])
        estimates = [interval(column) for column in table.T]
        look = style(arm.name, names)
        late = steps > 0
        axes.plot(steps[late], table.mean(0)[late], label=arm.name, markevery=0.12, markersize=5, **look)
        low, high = (np.array([getattr(each, end) for each in estimates])[late] for end in ("low", "high"))
        axes.fill_between(steps[late], low, high, color=look["color"], alpha=0.18, linewidth=0)
    run = arms.arms[0].run
    axes.set(xscale="log", xlabel="steps", ylabel=f"{run.objective} validation loss, {arms.unit}")
    tokens = run.tokens_per_step
    top = axes.secondary_xaxis("top", functions=(lambda step: step * tokens, lambda token: token / tokens))
    top.set_xlabel("tokens")
    for axis in (axes.xaxis, top.xaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())
    first = max(np.nanmin(arm.run.curves[0].steps[arm.run.curves[0].steps > 0]) for arm in arms)
    highest = max(np.interp(first, arm.run.curves[0].steps, arm.run.curves[0].nats) for arm in arms)
    lowest = min(arm.final.mean for arm in arms)
    axes.set_ylim(lowest - 0.03 * (highest - lowest), highest)
    _legend(axes)


@drawn((7.2, 3.2))
def speedups(axes: plt.Axes, arms: Comparison) -> None:
    """The treatment's speed-up over each baseline, to the baseline's own final loss, with its 95% interval. The grey
    band is what arms against themselves give."""
    names = [arm.name for arm in arms]
    axes.figure.set_figheight(max(3.2, 1.2 + 0.3 * len(arms.tested)))
    _floor(axes.axvspan, arms.floor)
    for row, arm in enumerate(arms.tested):
        _whisker(axes, row, arm.speedup, style(arm.name, names))
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(range(len(arms.tested)), [f"over {arm.name}" for arm in arms.tested])
    axes.set(ylim=(-0.5, len(arms.tested) - 0.2), xscale="log")
    axes.set_xlabel(f"speed-up of {arms.treatment} (1: as fast), log scale")
    _plain_log(axes)
    axes.grid(axis="y", visible=False)


def _whisker(axes: plt.Axes, row: float, s: Speedup, look: dict) -> None:
    color = look["color"]
    if np.isfinite(s.low):
        axes.plot([s.low, s.high], [row, row], color=color, linewidth=3, solid_capstyle="butt")
        axes.plot([s.low, s.high], [row, row], "|", color=color, markersize=9)
    axes.plot(s.mean, row, marker=look["marker"], color=color, markersize=9)
    right = (np.nanmax([s.mean, s.high]), row)
    axes.annotate(f"{s.mean:.2f}x  {s.verdict}", right, (10, 0), textcoords="offset points", va="center")


def _floor(span: Callable, floor: Floor) -> None:
    """The band of noise: `span` is that of the axis that has speed-ups."""
    if np.isfinite(floor.low):
        span(floor.low, floor.high, color=GREY, alpha=0.22, linewidth=0)


TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 100)


def _plain_log(axes: plt.Axes) -> None:
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 1.12) ** 1.6)  # room for the words
    _ticks(axes.xaxis, axes.get_xlim())


def _plain_log_y(axes: plt.Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), max(high, 1.12))
    _ticks(axes.yaxis, axes.get_ylim())


def _ticks(axis: Axis, limits: tuple[float, float]) -> None:
    ticks = [tick for tick in TICKS if limits[0] <= tick <= limits[1]]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_formatter(NullFormatter())


@drawn((7.2, 3.8))
def profile(axes: plt.Axes, arms: Comparison) -> None:
    """Speed-up against the target: the answer hangs on how low a loss one asks for. A line ends where the treatment
    does not reach the target on every seed: what would follow bounds the speed-up, and is none. The grey band is what
    arms against themselves give at the final target."""
    means = []
    names = [arm.name for arm in arms]
    _floor(axes.axhspan, arms.floor)
    for arm in arms.tested:
        look = style(arm.name, names)
        reached = [s for s in arm.contrast.profile if s.bound in ("", "lower")]
        targets, drawn_means = [s.target for s in reached], [s.mean for s in reached]
        axes.plot(targets, drawn_means, label=f"over {arm.name}", markevery=4, markersize=5, **look)
        low, high = ([getattr(s, end) for s in reached] for end in ("low", "high"))
        axes.fill_between(targets, low, high, color=look["color"], alpha=0.15, linewidth=0)
        means += drawn_means
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_ylim(min(0.8, min(means, default=1) * 0.9), max(1.2, max(means, default=1) * 1.15))
    axes.invert_xaxis()
    axes.set(xlabel=f"target: validation loss, {arms.unit} (harder to the right)")
    axes.set_ylabel(f"speed-up of {arms.treatment}")
    _legend(axes)


@drawn((7.2, 3.8))
def against(axes: plt.Axes, settings: Sequence[Comparison], values: Sequence[float], label: str) -> None:
    """Speed-up against a number that differs between settings, such as their size, with 95% intervals. Hollow where
    censoring makes it a bound; the grey bars are what arms against themselves give."""
    names = sorted({arm.name for setting in settings for arm in setting})
    baselines = sorted({arm.name for setting in settings for arm in setting.tested})
    for value, setting in zip(values, settings, strict=True):
        if np.isfinite(setting.floor.low):
            axes.plot([value] * 2, setting.floor[:2], color=GREY, alpha=0.22, linewidth=22, solid_capstyle="butt")
    for number, name in enumerate(baselines):
        found = [
            (value, arm.speedup)
            for value, setting in zip(values, settings, strict=True)
            for arm in setting.tested
            if arm.name == name
        ]
        look, shift = style(name, names), 1.03 ** (number - (len(baselines) - 1) / 2)  # side by side
        at, means = [value * shift for value, _ in found], [s.mean for _, s in found]
        axes.plot(at, means, label=f"over {name}", **look | {"marker": ""})
        for x, (_, s) in zip(at, found, strict=True):
            axes.plot([x, x], [s.low, s.high], color=look["color"], linewidth=2)
            hollow = {"markerfacecolor": "none"} if s.bound else {}
            axes.plot(x, s.mean, marker=look["marker"], color=look["color"], markersize=8, **hollow)
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=f"speed-up of {settings[0].treatment}, log scale")
    axes.set_xticks(values, [f"{value:,g}" for value in values])
    axes.margins(x=0.12)
    axes.xaxis.set_minor_formatter(NullFormatter())
    _plain_log_y(axes)
    _legend(axes, beside=True)


@drawn((7.2, 3.8))
def sensitivity(axes: plt.Axes, tunings: Sequence[Tuning]) -> None:
    """Final loss of the arms of one setting against the peak learning rate; a ring marks each arm's best."""
    names = [tuning.arm for tuning in tunings]
    for tuning in tunings:
        look = style(tuning.arm, names)
        finals = [final if np.isfinite(final) else np.nan for final in tuning.finals]
        axes.plot(tuning.rates, finals, label=tuning.arm, **look)
        axes.plot(tuning.best, min(tuning.finals), "o", markersize=14, fillstyle="none", color=look["color"])
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="final validation loss, nats per token")
    rates = sorted({rate for tuning in tunings for rate in tuning.rates})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(axes, beside=True)


@drawn((7.2, 3.8))
def by_rate(axes: plt.Axes, found: Sequence[Sensitivity], treatment: str) -> None:
    """Speed-up of the treatment at each shared peak learning rate and, at the right, with each arm at its own best."""
    names = [treatment, *(each.baseline for each in found)]
    rates = sorted({rate for each in found for rate in each.rates})
    for each in found:
        look = style(each.baseline, names)
        at = [(rates.index(rate), s.mean) for rate, s in zip(each.rates, each.shared, strict=True) if s]
        axes.plot(*zip(*at, strict=True), label=f"over {each.baseline}", **look) if at else None
        if each.tuned:
            axes.plot(len(rates), each.tuned.mean, marker=look["marker"], color=look["color"], markersize=9)
    axes.axhline(1, color=GREY, linewidth=1)
    axes.axvline(len(rates) - 0.5, color=GREY, linewidth=1, linestyle=":")
    axes.set_xticks(range(len(rates) + 1), [*(f"{rate:g}" for rate in rates), "each its\nown best"])
    axes.set(xlabel="peak learning rate of both arms", ylabel=f"speed-up of {treatment}, log scale", yscale="log")
    _plain_log_y(axes)
    _legend(axes, beside=True)


@drawn((7.2, 4.2))
def beyond(axes: plt.Axes, runs: Sequence[Run]) -> None:
    """Loss against the length of the text that is read, in pieces that do not overlap; thin lines are rotary scaled at
    evaluation. A line ends where the encoding does."""
    for name, look, rows in _evaluated(runs):
        lengths = [row["multiple"] * row["length"] for row in rows]
        axes.plot(lengths, [np.mean(row["apart"]) for row in rows], label=name, markersize=5, **look)
    lengths = sorted({row["multiple"] * run.beyond["length"] for run in runs for row in run.beyond["rows"]})
    axes.set(xscale="log", xlabel="tokens read at once (trained on the fewest)", ylabel="nats per token")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(axes)


@drawn((7.2, 4.2))
def by_position(axes: plt.Axes, runs: Sequence[Run]) -> None:
    """Loss by position in the longest text that was read; the upright line is the trained length."""
    for name, look, rows in _evaluated(runs):
        row = rows[-1]
        axes.plot(row["positions"], np.mean(row["by_position"], 0), label=name, **look | {"marker": ""})
    axes.axvline(max(run.beyond["length"] for run in runs), color=GREY, linewidth=1)
    axes.set(xscale="log", xlabel="place in the piece, in tokens", ylabel="nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _legend(axes)


def _evaluated(runs: Sequence[Run]) -> Iterator[tuple[str, dict, list[dict]]]:
    """Name, look and rows of each line: the runs as they were trained, then as they were scaled."""
    names = [run.arm for run in runs]
    for run in runs:
        for scaling in dict.fromkeys(row["scaling"] for row in run.beyond["rows"]):
            rows = [row | {"length": run.beyond["length"]} for row in run.beyond["rows"] if row["scaling"] == scaling]
            name = f"{run.arm} as {scaling}" if scaling else run.arm
            look = style(name, [*names, *(f"{run.arm} as {row['scaling']}" for row in run.beyond["rows"])])
            yield name, look | ({"linewidth": 1} if scaling else {}), rows


@drawn((7.2, 4.2))
def by_distance(axes: plt.Axes, runs: Sequence[Run]) -> None:
    """Share of attention by distance, in bins that double in width: mean over members, layers and heads."""
    edges = runs[0].looks["edges"]
    for run in runs:
        share = np.mean(run.looks["mass"], axis=(0, 1, 2))
        axes.plot(range(len(share)), share, label=run.arm, markersize=5, **style(run.arm, [each.arm for each in runs]))
    words = [f"{low}" if high - low == 1 else f"{low} to {high - 1}" for low, high in pairwise(edges)]
    axes.set_xticks(range(len(words)), words, rotation=35, ha="right")
    axes.set(xlabel="distance of the key, in tokens before the query", ylabel="share of attention", ylim=(0, None))
    _legend(axes)


@drawn((7.2, 4.2))
def by_head(axes: plt.Axes, runs: Sequence[Run]) -> None:
    """Mean attended distance of each head: a mark for each head of each member, layers beside each other."""
    axes.figure.set_figwidth(max(7.2, 0.5 * len(runs)))
    for place, run in enumerate(runs):
        mean = np.array(run.looks["mean"])  # [members layers heads]
        look = style(run.arm, [each.arm for each in runs])
        for layer in range(mean.shape[1]):
            values = mean[:, layer].ravel()
            at = place + (layer - (mean.shape[1] - 1) / 2) * 0.7 / mean.shape[1]
            axes.plot([at] * len(values), values, look["marker"], color=look["color"], markersize=5, alpha=0.7)
    axes.set_xticks(range(len(runs)), [run.arm for run in runs], rotation=20, ha="right")
    axes.set(ylabel="mean distance, tokens", xlabel="layers from left to right", ylim=(0, None))


@drawn((7.2, 6.4))
def decay(
    axes: plt.Axes,
    distances: np.ndarray,
    kept: Mapping[str, np.ndarray],
    bound: np.ndarray,
    added: Mapping[str, np.ndarray],
) -> None:
    """What encodings do to a score as two tokens move apart. Above: the share that rotations leave of the score of a
    vector with itself, and RoFormer's upper bound (section 3.4.3). Below: what is added to logits, mean over heads."""
    figure = axes.figure
    axes.remove()
    above, below = figure.subplots(2, 1, sharex=True)
    names = [*kept, *added]
    for name, values in kept.items():
        above.plot(distances + 1, values, label=name, linewidth=1.2, **style(name, names) | {"marker": ""})
    above.plot(distances + 1, bound, color=GREY, linestyle=":", label="RoFormer's bound of rotary")
    for name, values in added.items():
        below.plot(distances + 1, values.mean(0), label=name, **style(name, names) | {"marker": ""})
    above.set(ylabel="share of the score that is left")
    below.set(xscale="log", xlabel="distance in tokens, plus one", ylabel="added to the logit")
    below.set_yscale("symlog")
    below.set_ylim(top=1)
    for part in (above, below):
        part.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)


@drawn((7.2, 3.4))
def speeds(axes: plt.Axes, rows: Sequence[dict]) -> None:
    """Tokens a second of each encoding, from the rows of a benchmark."""
    axes.figure.set_figheight(max(3.4, 1 + 0.28 * len(rows)))
    labels = [f"{row['encoding']} ({row['scale']})" for row in rows]
    colors = [style(row["encoding"], [each["encoding"] for each in rows])["color"] for row in rows]
    bars = axes.barh(range(len(rows)), [row["tokens_per_second"] for row in rows], color=colors, height=0.6)
    axes.bar_label(bars, [f" {row['tokens_per_second']:,.0f}" for row in rows], color=GREY)
    axes.set_yticks(range(len(rows)), labels)
    axes.set(xlabel="tokens a second, training")
    axes.margins(x=0.14)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
