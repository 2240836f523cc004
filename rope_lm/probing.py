"""What a run that was trained on a probe answers: how often it is right, by the distance to where the answer stands."""

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
    """Raises Refusal for a run that was not trained on a probe, or not to predict the next token."""
    config, _ = trained.read(workdir)
    if not config["data"]["name"].startswith("probe:"):
        raise Refusal(f"{str(workdir)!r} was trained on {config['data']['name']}: give a run of data=probe:NAME")
    if config["objective"]["name"] != "causal":
        raise Refusal(
            f"{str(workdir)!r} was trained with objective={config['objective']['name']}: a probe asks for the next "
            "token; give a causal run"
        )


def measure(workdir: Path, rows: int, multiple: int) -> dict[str, Any]:
    """The accuracy of every member of a run that did not diverge on so many rows of its probe, of `multiple` times its
    length, that it was neither trained nor validated on.

    `distances` are ranges in tokens, each from a power of two to the next; `answers` counts those in each range, and
    `accuracy` is the share, by member, for which the likeliest token is the right one. Raises Refusal for a run that
    was not trained on a probe, or not to predict the next token, and where its encoding cannot encode such rows.
    """
    check(workdir)
    run = trained.load(workdir).whole()
    name = run.config["data"]["name"].partition(":")[2]
    probe = Probe(name, run.config["data"]["length"] * multiple, "test")
    if not 1 <= rows <= len(probe):
        raise Refusal(f"--rows={rows}: must be from 1 to {len(probe):,}")
    if multiple > 1:
        run = trained.load(workdir, length=probe.length).whole()
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
    """bool [rows T]: where the likeliest token is the one that comes."""
    return jnp.argmax(model(rows[:, :-1])[0], -1) == rows[:, 1:]
