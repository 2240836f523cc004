"""A run that was trained, opened to be used: its model with the parameters of its newest whole checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rope_lm import attention, journal, positional, sharding, training
from rope_lm.checkpoint import Checkpoints
from rope_lm.data import tokenizer
from rope_lm.data.tokenizer import Tokenizer
from rope_lm.objective import Objective
from rope_lm.refusal import Refusal
from rope_lm.transformer import Transformer


@dataclass(frozen=True)
class Trained:
    """The models of a run, one for each member, and its tokenizer."""

    config: Mapping[str, Any]
    step: int
    seeds: tuple[int, ...]
    models: tuple[Transformer, ...]
    objective: Objective
    coder: Tokenizer


def load(workdir: Path, position: Mapping[str, Any] | None = None, length: int | None = None) -> Trained:
    """The run in `workdir`, ready for rows of `length` tokens (as trained, if None), with its encoding's config row or,
    without training anything again, with another one whose parameters are the same (rotary as yarn, say).

    Reads the run directory alone: neither the text nor the devices that it was trained on have to be there. Raises
    Refusal where there is no run or no whole checkpoint, for a tree of another architecture, and for rows that are
    longer than an encoding can encode.
    """
    config, manifest = (journal.read_json(workdir / f"{name}.json") for name in ("config", "manifest"))
    if not isinstance(config, dict) or not isinstance(manifest, dict):
        raise Refusal(f"{str(workdir)!r} holds no run (no config.json and manifest.json in it): give its --workdir")
    mesh = sharding.make(1, 1, 1, 1)
    model = {**config["model"], "position": dict(position or config["model"]["position"])}
    biased = positional.encoding(model["position"]).biased()
    auto = {**model["attention"], **({"kernel": "auto"} if "kernel" in model["attention"] else {})}
    model["attention"] = attention.resolve(auto, mesh.devices.flat[0].platform, model["dtype"], biased)
    program = training.make(
        model,
        {**config["optimizer"], "rate": tuple(config["optimizer"]["rate"])},
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
        config=config,
        step=saved.step,
        seeds=tuple(member["seed"] for member in manifest["members"]),
        models=tuple(program.model(saved.tree, i) for i in range(len(manifest["members"]))),
        objective=program.objective,
        coder=tokenizer.load(config["data"]["tokenizer"], workdir, manifest["data"]["fingerprint"]["tokenizer"]),
    )
