"""A run that was trained, opened to be used: its model with the parameters of its newest whole checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rope_lm import attention, data, positional, run_directory, sharding, training
from rope_lm.checkpoint import Checkpoints
from rope_lm.data import tokenizer
from rope_lm.data.tokenizer import Tokenizer
from rope_lm.objective import Objective
from rope_lm.refusal import Refusal
from rope_lm.settings import bind
from rope_lm.transformer import Transformer

TOKENS = 16_384  # at once, so that long rows need no more memory than short ones


@dataclass(frozen=True)
class Trained:
    """The models of a run, one for each member, and its tokenizer."""

    workdir: Path
    config: Mapping[str, Any]
    step: int
    seeds: tuple[int, ...]
    models: tuple[Transformer, ...]
    diverged: tuple[bool, ...]
    objective: Objective
    coder: Tokenizer

    def whole(self) -> "Trained":
        """Of the members that did not diverge alone: what the others make of a text says nothing. Raises Refusal where
        all did."""
        kept = [i for i, diverged in enumerate(self.diverged) if not diverged]
        if not kept:
            raise Refusal(f"every member of the run in {str(self.workdir)!r} diverged: train it at a lower rate")
        some = {name: tuple(getattr(self, name)[i] for i in kept) for name in ("seeds", "models", "diverged")}
        return replace(self, **some)


def read(workdir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the manifest of a run. Raises Refusal where there is none."""
    config, manifest, _ = run_directory.read(workdir)
    if not isinstance(config, dict) or not isinstance(manifest, dict) or "data" not in config:
        raise Refusal(f"{str(workdir)!r} holds no run (no config.json and manifest.json in it): give its --workdir")
    return config, manifest


def text(workdir: Path, rows: int, multiple: int = 1) -> np.ndarray:
    """int32 [rows multiple * T + 1]: pieces of the validation text that a run was trained beside, evenly spread.

    Raises Refusal where the text here is not that of the run, or has fewer such pieces.
    """
    config, manifest = read(workdir)
    section = {**config["data"], "length": config["data"]["length"] * multiple, "validation_rows": rows, "batch": 1}
    made = data.make(**bind(data.make, section, "data", {}))
    probe = section["name"].startswith("probe:")  # whose fingerprint is one of rows of this length
    if not probe and (differ := run_directory.differences(manifest["data"]["fingerprint"], dict(made.fingerprint))):
        raise Refusal(
            f"{str(workdir)!r} was trained on another text than data.name={section['name']} is here (other "
            f"{', '.join(key for key, *_ in differ)}): read it where it was trained, or give the same files"
        )
    return made.validation


def over_rows(function: Callable[[Transformer, Any], Any], model: Transformer, rows: np.ndarray) -> np.ndarray:
    """What a function of a model and some rows makes of all of them, a group at a time."""
    graph, state = nnx.split(model)
    size = max(1, TOKENS // rows.shape[1])
    groups = (jnp.asarray(rows[start : start + size]) for start in range(0, len(rows), size))
    return np.concatenate([np.asarray(_call(function, graph, state, group)) for group in groups])


@jax.jit(static_argnums=(0, 1))
def _call(function: Callable, graph: nnx.GraphDef, state: nnx.State, rows: jax.Array) -> jax.Array:
    return function(nnx.merge(graph, state), rows)


def load(workdir: Path, position: Mapping[str, Any] | None = None, length: int | None = None) -> Trained:
    """The run in `workdir`, ready for rows of `length` tokens (as trained, if None), with its encoding's config row or,
    without training anything again, with another one whose parameters are the same (rotary as yarn, say).

    Reads the run directory alone: neither the text nor the devices that it was trained on have to be there. Raises
    Refusal where there is no run or no whole checkpoint, for a tree of another architecture, and for rows that are
    longer than an encoding can encode.
    """
    config, manifest = read(workdir)
    mesh = sharding.make(1, 1, 1, 1)
    model = {**config["model"], "position": dict(position or config["model"]["position"])}
    encoding = positional.encoding(model["position"])
    auto = {**model["attention"], **({"kernel": "auto"} if "kernel" in model["attention"] else {})}
    model["attention"] = attention.resolve(
        auto, mesh.devices.flat[0].platform, model["dtype"], encoding, model["width"] // model["heads"]
    )
    program = training.make(
        model,
        {**config["optimizer"], "learning_rate": tuple(config["optimizer"]["learning_rate"])},
        config["objective"],
        vocabulary=manifest["data"]["vocabulary"],
        steps=config["steps"],
        members=len(manifest["members"]),
        batch=config["data"]["batch"],
        length=length or config["data"]["length"],
        mesh=mesh,
    )
    saved = Checkpoints.read(workdir / "checkpoints", program.abstract)
    return Trained(
        workdir=workdir,
        config=config,
        step=saved.step,
        seeds=tuple(member["seed"] for member in manifest["members"]),
        models=tuple(program.model(saved.tree, i) for i in range(len(manifest["members"]))),
        diverged=tuple(bool(at >= 0) for at in np.asarray(saved.tree.diverged)),
        objective=program.objective,
        coder=tokenizer.load(config["data"]["tokenizer"], workdir, manifest["data"]["fingerprint"]["tokenizer"]),
    )
