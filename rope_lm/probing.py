"""Accuracy of a run that was trained on a probe, by the distance to the token that the answer repeats."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rope_lm import trained
from rope_lm.data.probes import Probe
from rope_lm.refusal import Refusal
from rope_lm.transformer import Transformer


def check(workdir: Path) -> None:
    """Raise Refusal for a run that was not trained on a probe, or not to predict the next token."""
    config, _ = trained.read(workdir)
    if not config["data"]["name"].startswith("probe:"):
        raise Refusal(f"{str(workdir)!r} was trained on {config['data']['name']}: give a run of data=probe:NAME")
    if config["objective"]["name"] != "causal":
        raise Refusal(
            f"{str(workdir)!r} was trained with objective={config['objective']['name']}: a probe asks for the next "
            "token; give a causal run"
        )


def measure(workdir: Path, rows: int, multiple: int) -> dict[str, Any]:
    """Measure the accuracy of every finite member of a run on `rows` test rows of its probe.

    The rows have `multiple` times the trained length. `distances` are ranges in tokens, from a power of two to the
    next; `answers` counts the answers in each range; `accuracy` is the share, by member, for which the likeliest token
    is right. Raises Refusal as `check` does, and if the encoding cannot encode such rows.
    """
    check(workdir)
    run = trained.load(workdir).finite()
    name = run.config["data"]["name"].partition(":")[2]
    probe = Probe(name, run.config["data"]["length"] * multiple, "test")
    if not 1 <= rows <= len(probe):
        raise Refusal(f"--rows={rows}: must be from 1 to {len(probe):,}")
    if multiple > 1:
        run = trained.load(workdir, length=probe.length).finite()
    text = probe[np.arange(rows)]
    mask, distance = (np.stack(each) for each in zip(*map(probe.answers, range(rows)), strict=True))
    ranges = np.log2(distance[mask]).astype(int)
    answers = np.bincount(ranges)
    right = [np.bincount(ranges, trained.over_rows(_right, model, text)[mask]) for model in run.models]
    there = np.flatnonzero(answers)
    return {
        "multiple": multiple,
        "length": probe.length,
        "rows": rows,
        "seeds": list(run.seeds),
        "guessing": 1 / probe.task.choices,
        "distances": [[2**each, 2 ** (each + 1) - 1] for each in there.tolist()],
        "answers": answers[there].tolist(),
        "accuracy": [(hits[there] / answers[there]).tolist() for hits in right],
        "overall": [float(hits.sum() / answers.sum()) for hits in right],
    }


def _right(model: Transformer, rows: jax.Array) -> jax.Array:
    """Return bool [rows, T]: True where the likeliest token is the next one."""
    return jnp.argmax(model(rows[:, :-1])[0], -1) == rows[:, 1:]
