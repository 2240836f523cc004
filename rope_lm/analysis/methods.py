"""The methods section of a paper, written from what the runs themselves recorded."""

import math
from collections.abc import Iterable
from typing import Any

from rope_lm.analysis.convergence import MARGIN
from rope_lm.analysis.runs import Run, Sweep

TEXT = """\
{name}: transformers ({block}; {layers} layers, width {width}, {heads} heads, feed-forward width {hidden}, {precision},
token embeddings of standard deviation {embedding_scale}; {parameters} parameters besides an encoding's own) were
trained on {text} ({tokenizer} tokens, {tokens} of them for training; sha256 of the text {fingerprint}) for {steps}
steps of {batch} rows of {length} tokens, with AdamW (b1 {b1}, b2 {b2}, epsilon {epsilon}, weight decay {weight_decay}
on matrices but an encoding's own, gradients clipped at {gradient_clip}) and a {schedule} schedule with {warmup}% warm-up.
{settings} Each arm ran seeds {seeds}; a seed fixes the initial values of all shared parameters and the order of the
data, so arms are paired. The validation set is {validation} fixed rows, evaluated every {evaluate} steps. Device:
{device}; {hours:.2f} hours of training, compiling left out, for {runs} runs, begun {began}; jax {jax}, flax {flax},
optax {optax}, Python {python}; commit {commit}."""

STATISTICS = f"""\
A speed-up is the ratio of steps to a target, the baseline's over the treatment's: the geometric mean over seeds with
Student's t interval (95%) on the logarithms, p by the exact two-sided sign-flip test and, in brackets, by Holm's
correction over the arms. The first crossing is interpolated between evaluations in log-steps. The target is the
baseline's median final validation loss; a seed of the baseline that does not reach it counts with its whole budget, and
the speed-up is then a lower bound, whose interval's upper end is no limit. Seeds that diverge count so too. It is
supported that the treatment is faster where the interval lies wholly above 1. What a bound cannot decide is decided at
the loss that every seed of both arms reaches: refuted, where the interval lies wholly below 1; equivalent, where it
lies wholly between 1/{MARGIN:g} and {MARGIN:g} (two one-sided tests at 2.5%); else it is inconclusive. Verdicts are
each comparison's own, from intervals that are not corrected for how many comparisons there are; with k of them Holm's
sign-flip p over n pairs cannot be below k * 2 / 2^n. The noise floor is that of arms against themselves (A/A): the
first half of their seeds over the second, to the loss that both reach. The smallest detectable effect is that of a
two-sided t test at 5% with 80% power, from the standard deviation over the pairs. Claims are tested with Student's t
against their threshold, a claim of no difference by two one-sided tests with the larger p doubled, and corrected (Holm)
over all claims."""

WORDS = {
    "pre": "pre-norm",
    "parallel": "pre-norm, attention and MLP in parallel",
    "post": "post-norm",
    "rms": "RMSNorm",
    "layer": "LayerNorm",
    "gelu": "GELU by tanh",
    "gelu_exact": "GELU",
    "swiglu": "SwiGLU",
}
# Of every run from before there was a choice.
BLOCK = {"norm": "rms", "mlp": "gelu", "biases": False, "residual": "pre", "transform": False}


def paragraph(sweep: Sweep) -> str:
    """What was trained, on what, how and where: for one sweep, all its settings together. "" where nothing ran."""
    runs = [run for run in sweep.runs if run.manifest.get("data")]
    if not runs:
        return ""
    facts = [_facts(run) for run in runs]
    own = [run.manifest["parameters"] - run.manifest["parameters_position"] for run in runs]
    return TEXT.replace("\n", " ").format(
        **{key: _list(each[key] for each in facts) for key in facts[0]},
        name=sweep.name,
        parameters=f"{min(own):,}" if min(own) == max(own) else f"{min(own):,} to {max(own):,}",
        settings=" ".join(_setting(each) for each in sweep.settings),
        seeds=_list(member["seed"] for run in runs for member in run.manifest["members"]),
        hours=sum(run.hours for run in runs),
        runs=len(runs),
        began=min((run.began[:10] for run in runs if run.began), default="at an unknown time"),
    )


def _facts(run: Run) -> dict[str, object]:
    """The words of TEXT that one run knows."""
    config, manifest = run.config, run.manifest
    model = ("layers", "width", "heads", "hidden", "embedding_scale")
    optimizer = ("b1", "b2", "epsilon", "weight_decay", "gradient_clip", "schedule")
    data = ("tokenizer", "batch", "length", "validation")
    device = manifest["device"]
    return {
        **{key: config["model"].get(key, "unknown") for key in model},
        "block": _block(config["model"]),
        **{key: config["optimizer"].get(key, "unknown") for key in optimizer},
        **{key: config["data"].get(key, "unknown") for key in data},
        **{key: manifest["versions"].get(key, "unknown") for key in ("jax", "flax", "optax")},
        "precision": manifest["precision"],
        "text": config["data"]["name"],
        "tokens": f"{manifest['data']['tokens']['train']:,}",
        "fingerprint": _short(manifest["data"]["fingerprint"].get("text")),
        "steps": f"{run.steps:,}",
        "warmup": 100 * config["optimizer"].get("warmup", math.nan),
        "evaluate": config.get("every", {}).get("evaluate", "unknown"),
        "device": f"{device['count']} x {device['kind']} ({device['platform']})",
        "python": manifest["python"],
        "commit": _short(manifest["commit"]) + (" with uncommitted changes" if manifest["diff"] else ""),
    }


def _block(model: dict[str, Any]) -> str:
    """What a layer is made of, and what the logits are."""
    block = model.get("block", BLOCK)
    words = [WORDS.get(block[key], block[key]) for key in ("residual", "norm", "mlp")]
    words += ["biases" if block["biases"] else "no biases"]
    words += ["a transform before the logits"] * block["transform"]
    return ", ".join([*words, "tied embeddings" if model.get("tied") else "untied embeddings"])


def _setting(sweep: Sweep) -> str:
    """Objective, attention and rates of one setting; "" where nothing of it ran."""
    runs = [run for run in sweep.runs if run.manifest.get("data")]
    if not runs:
        return ""
    objective = _list(_named(run.config.get("objective", {"name": "causal"})) for run in runs)
    attention = _list(_named(run.config["model"].get("attention", {"name": "softmax"})) for run in runs)
    kernel = _list(run.manifest["kernel"] for run in runs)
    arms = {run.arm: _list(run.rates) for run in runs}
    alike = len(set(arms.values())) == 1
    rates = f"{', '.join(arms)} at {_list(arms.values())}" if alike else ", ".join(map(" ".join, arms.items()))
    what = f"{objective} language modelling, {attention} attention (kernel: {kernel}); peak learning rates"
    return f"{sweep.setting or 'Task'}: {what} {'of a grid, ' if sweep.grid else ''}{rates}."


def _named(section: dict[str, Any]) -> str:
    """An objective or a kind of attention, with its numbers."""
    rest = ", ".join(f"{key} {value:g}" for key, value in section.items() if isinstance(value, (int, float)))
    return f"{section['name']} ({rest})" if rest else section["name"]


def _list(values: Iterable[object]) -> str:
    """The different values, in order."""
    return ", ".join(dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in values))


def _short(value: str | None) -> str:
    return value[:16] if value else "unknown"
