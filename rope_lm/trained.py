"""Trained runs as models, with the parameters of the newest undamaged checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rope_lm import data, run_directory, sharding, training
from rope_lm.checkpoint import Checkpoints
from rope_lm.data import tokenizer
from rope_lm.data.tokenizer import Tokenizer
from rope_lm.objective import Objective
from rope_lm.refusal import Refusal
from rope_lm.settings import bind
from rope_lm.transformer import Transformer

TOKENS = 16_384  # per call, so that long rows need no more memory than short ones


@dataclass(frozen=True)
class Trained:
    """The models of a run, one per member, and its tokenizer."""

    workdir: Path
    config: Mapping[str, Any]
    step: int
    seeds: tuple[int, ...]
    models: tuple[Transformer, ...]
    diverged: tuple[bool, ...]
    objective: Objective
    coder: Tokenizer

    def finite(self) -> "Trained":
        """Return the members that did not diverge. Raises Refusal if all did."""
        kept = [i for i, diverged in enumerate(self.diverged) if not diverged]
        if not kept:
            raise Refusal(
                f"every member of the run in {str(self.workdir)!r} diverged: train it at a lower learning rate"
            )
        return replace(
            self,
            seeds=tuple(self.seeds[i] for i in kept),
            models=tuple(self.models[i] for i in kept),
            diverged=(False,) * len(kept),
        )


def read(workdir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config and the manifest of a run. Raises Refusal if there is none."""
    config, manifest, _ = run_directory.read(workdir)
    if not isinstance(config, dict) or not isinstance(manifest, dict) or "data" not in config:
        raise Refusal(f"{str(workdir)!r} holds no run (no config.json and manifest.json in it): give its --workdir")
    return config, manifest


def text(workdir: Path, rows: int, multiple: int = 1) -> np.ndarray:
    """Return int32 [rows, multiple * T + 1]: rows spread evenly over a run's validation text.

    Raises Refusal if the text here is not that of the run, or has fewer such rows.
    """
    config, manifest = read(workdir)
    section = {**config["data"], "length": config["data"]["length"] * multiple, "validation_rows": rows, "batch": 1}
    found = data.make(**bind(data.make, section, "data", {}))
    probe = section["name"].startswith("probe:")  # its fingerprint depends on the length of its rows
    differ = run_directory.differences(manifest["data"]["fingerprint"], dict(found.fingerprint))
    if differ and not probe:
        raise Refusal(
            f"{str(workdir)!r} was trained on another text than data.name={section['name']} is here (other "
            f"{', '.join(key for key, *_ in differ)}): read it where it was trained, or give the same files"
        )
    return found.validation


def over_rows(function: Callable[[Transformer, Any], Any], model: Transformer, rows: np.ndarray) -> np.ndarray:
    """Apply a jittable function of a model and rows to all rows, in groups of at most TOKENS tokens."""
    graph, state = nnx.split(model)
    size = max(1, TOKENS // rows.shape[1])
    groups = (jnp.asarray(rows[start : start + size]) for start in range(0, len(rows), size))
    return np.concatenate([np.asarray(_call(function, graph, state, group)) for group in groups])


@jax.jit(static_argnums=(0, 1))
def _call(function: Callable, graph: nnx.GraphDef, state: nnx.State, rows: jax.Array) -> jax.Array:
    return function(nnx.merge(graph, state), rows)


def load(workdir: Path, position: Mapping[str, Any] | None = None, length: int | None = None) -> Trained:
    """Open the run in `workdir` for rows of `length` tokens; None for the trained length.

    `position`: config row of another encoding with the same parameters, to use without training (such as yarn for a
    rotary run); None for the run's own. Only the run directory is read: neither the text nor the devices of training
    are needed. Raises Refusal if there is no run or no undamaged checkpoint, for parameters of another architecture,
    and for rows longer than the encoding can encode.
    """
    config, manifest = read(workdir)
    model = {**config["model"], "position": dict(position or config["model"]["position"])}
    if "kernel" in model["attention"]:
        model["attention"] = {**model["attention"], "kernel": "auto"}
    rows = {**config["data"], "length": length or config["data"]["length"]}
    optimizer = {**config["optimizer"], "accumulation_steps": 1}
    members = manifest["members"]
    program = training.make(
        {**config, "model": model, "data": rows, "optimizer": optimizer},
        vocabulary=manifest["data"]["vocabulary"],
        members=len(members),
        mesh=sharding.make(1, 1, 1, 1),
    )
    saved = Checkpoints.read(workdir / "checkpoints", program.abstract)
    return Trained(
        workdir=workdir,
        config=config,
        step=saved.step,
        seeds=tuple(member["seed"] for member in members),
        models=tuple(program.model(saved.tree, i) for i in range(len(members))),
        diverged=tuple(bool(at >= 0) for at in np.asarray(saved.tree.diverged)),
        objective=program.objective,
        coder=tokenizer.load(config["data"]["tokenizer"], workdir, manifest["data"]["fingerprint"]["tokenizer"]),
    )
