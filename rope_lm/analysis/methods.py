"""The methods section of a paper, written from what the runs recorded."""

import math
from collections.abc import Iterable
from typing import Any

from rope_lm.analysis.estimates import MARGIN
from rope_lm.analysis.runs import Run, Sweep

TEXT = """\
{name}: transformers ({block}; {layers} layers, width {width}, {heads} heads, feed-forward width {hidden}, {precision},
token embeddings of standard deviation {embedding_scale}; {parameters} parameters besides an encoding's own) were
trained on {text} ({tokenizer} tokens, {tokens} of them for training; sha256 of the text {fingerprint}) for {steps}
steps of {batch} rows of {length} tokens, with {optimizer} (b1 {b1}, b2 {b2}, epsilon {epsilon}, weight decay
{weight_decay} on matrices except an encoding's own, gradients clipped at {gradient_clip}) and a {schedule} schedule
with {warmup}% warm-up. {settings} Each arm ran seeds {seeds}; a seed fixes the initial values of all shared parameters
and the order of the data, so arms are paired. The validation set is {validation_rows} fixed rows, evaluated every
{evaluate} steps. Device: {device}; {hours:.2f} hours of training, without compilation, for {runs} runs, begun {began};
jax {jax}, flax {flax}, optax {optax}, Python {python}; commit {commit}."""

STATISTICS = f"""\
A speed-up is the ratio of steps to a target, the baseline's over the treatment's: the geometric mean over seeds, with
Student's t interval (95%) on the logarithms, p from the exact two-sided sign-flip test and, in brackets, after Holm's
correction over the arms. The first crossing is interpolated between evaluations in log-steps. The target is the
baseline's median final validation loss. A seed of the baseline that does not reach it counts with its whole budget; the
speed-up is then a lower bound, and the upper end of its interval is not a limit. Seeds that diverge count in the same
way. A faster treatment is supported if the interval lies entirely above 1. If a bound cannot decide, the decision is
made at the loss that every seed of both arms reaches: refuted if the interval lies entirely below 1; equivalent if it
lies entirely between 1/{MARGIN:g} and {MARGIN:g} (two one-sided tests at 2.5%); otherwise inconclusive. Each verdict is
for its own comparison, from an interval that is not corrected for the number of comparisons; with k of them, Holm's
sign-flip p over n pairs cannot be below k * 2 / 2^n. The noise floor is that of arms compared with themselves (A/A):
the first half of their seeds over the second, to the loss that both reach. The smallest detectable effect is that of a
two-sided t test at 5% with 80% power, from the standard deviation over the pairs. Claims are tested with Student's t
against their threshold, claims of no difference by two one-sided tests with the larger p doubled, and corrected (Holm)
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
    "adamw": "AdamW",
}
# The block of runs older than the key.
BLOCK = {"norm": "rms", "mlp": "gelu", "biases": False, "residual": "pre", "transform": False}
# The values of a config that TEXT names, by section.
CONFIG = {
    "model": ("layers", "width", "heads", "hidden", "embedding_scale"),
    "optimizer": ("b1", "b2", "epsilon", "weight_decay", "gradient_clip", "schedule"),
    "data": ("tokenizer", "batch", "length", "validation_rows"),
    "every": ("evaluate",),
}


def paragraph(sweep: Sweep) -> str:
    """Return what was trained, on what, how and where, for all settings of a sweep; "" if nothing ran."""
    runs = [run for run in sweep.runs if run.manifest.get("data")]
    if not runs:
        return ""
    facts = [_facts(run) for run in runs]
    own = [run.manifest["parameters"] - run.manifest["parameters_position"] for run in runs]
    return TEXT.replace("\n", " ").format(
        **{key: _list(fact[key] for fact in facts) for key in facts[0]},
        name=sweep.name,
        parameters=f"{min(own):,}" if min(own) == max(own) else f"{min(own):,} to {max(own):,}",
        settings=" ".join(_setting(setting) for setting in sweep.settings),
        seeds=_list(member["seed"] for run in runs for member in run.manifest["members"]),
        hours=sum(run.hours for run in runs),
        runs=len(runs),
        began=min((run.began[:10] for run in runs if run.began), default="at an unknown time"),
    )


def _facts(run: Run) -> dict[str, object]:
    """Return the values that TEXT takes from a single run."""
    config, manifest, optimizer = run.config, run.manifest, run.config["optimizer"]
    device, name = manifest["device"], optimizer.get("name", "adamw")
    return {
        **{key: config.get(section, {}).get(key, "unknown") for section, keys in CONFIG.items() for key in keys},
        **{key: manifest["versions"].get(key, "unknown") for key in ("jax", "flax", "optax")},
        "block": _block(config["model"]),
        "optimizer": WORDS.get(name, name),
        "precision": manifest["precision"],
        "text": config["data"]["name"],
        "tokens": f"{manifest['data']['tokens']['train']:,}",
        "fingerprint": _short(manifest["data"]["fingerprint"].get("text")),
        "steps": f"{run.steps:,}",
        "warmup": 100 * optimizer.get("warmup", math.nan),
        "device": f"{device['count']} x {device['kind']} ({device['platform']})",
        "python": manifest["python"],
        "commit": _short(manifest["commit"]) + (" with uncommitted changes" if manifest["diff"] else ""),
    }


def _block(model: dict[str, Any]) -> str:
    """Return the parts of a layer, and how the logits are computed."""
    block = model.get("block", BLOCK)
    words = [WORDS.get(block[key], block[key]) for key in ("residual", "norm", "mlp")]
    words += ["biases" if block["biases"] else "no biases"]
    words += ["a transform before the logits"] * block["transform"]
    return ", ".join([*words, "tied embeddings" if model.get("tied") else "untied embeddings"])


def _setting(sweep: Sweep) -> str:
    """Return objective, attention and learning rates of one setting; "" if nothing of it ran."""
    runs = [run for run in sweep.runs if run.manifest.get("data")]
    if not runs:
        return ""
    objective = _list(_named(run.config.get("objective", {"name": "causal"})) for run in runs)
    attention = _list(_named(run.config["model"].get("attention", {"name": "softmax"})) for run in runs)
    arms = {run.arm: _list(run.learning_rates) for run in runs}
    alike = len(set(arms.values())) == 1
    rates = f"{', '.join(arms)} at {_list(arms.values())}" if alike else ", ".join(map(" ".join, arms.items()))
    return (
        f"{sweep.setting or 'Task'}: {objective} language modelling, {attention} attention (kernel: "
        f"{_list(run.kernel for run in runs)}); peak learning rates {'of a grid, ' if sweep.grid else ''}{rates}."
    )


def _named(section: dict[str, Any]) -> str:
    """Return the name of an objective or a kind of attention, with its numbers."""
    rest = ", ".join(f"{key} {value:g}" for key, value in section.items() if isinstance(value, (int, float)))
    return f"{section['name']} ({rest})" if rest else section["name"]


def _list(values: Iterable[object]) -> str:
    """Return the distinct values, in order."""
    return ", ".join(dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in values))


def _short(value: str | None) -> str:
    return value[:16] if value else "unknown"
