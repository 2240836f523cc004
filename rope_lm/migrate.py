"""Rename the keys of configs, manifests, metrics, checkpoints and archives of earlier versions to the current ones.

Standard library only: anything that reads a file of a run may import this.
"""

import re
from collections.abc import Mapping
from typing import Any

CONFIG = {  # config keys: old name -> today's
    "data.validation": "data.validation_rows",
    "objective.rate": "objective.mask_rate",
    "objective.mask": "objective.mask_share",
    "objective.random": "objective.random_share",
    "optimizer.rate": "optimizer.learning_rate",
    "optimizer.clip": "optimizer.gradient_clip",
    "optimizer.accumulate": "optimizer.accumulation_steps",
    "model.position.farthest": "model.position.max_distance",
    "model.position.trained": "model.position.trained_length",
    "model.position.fast": "model.position.beta_fast",
    "model.position.slow": "model.position.beta_slow",
    "model.position.low": "model.position.low_freq_factor",
    "model.position.high": "model.position.high_freq_factor",
}
ADDED: dict[str, dict[str, Any]] = {
    "model": {"head_size": None},
    "optimizer": {"name": "adamw"},
}  # keys that earlier versions did not have
FIELDS = {"rate": "learning_rate"}  # of a manifest's members and of a row of metrics


def config(old: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Return a config, or one of its sections, with current keys."""
    new = dict(ADDED.get(section, {}))
    for key, value in old.items():
        path = f"{section}.{key}" if section else key
        new[_key(path).rpartition(".")[2]] = config(value, path) if isinstance(value, Mapping) else value
    return new


def manifest(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with current names. Entries in a form that no version wrote are left as they are."""
    new = dict(old)
    if isinstance(old.get("members"), list):
        new["members"] = [row(member) for member in old["members"]]
    if isinstance(old.get("overrides"), Mapping):
        new["overrides"] = _keys(old["overrides"])
    if isinstance(old.get("segments"), list):
        new["segments"] = [
            {**segment, "changed": _keys(segment["changed"])} if "changed" in segment else segment
            for segment in old["segments"]
        ]
    return new


def row(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of metrics.jsonl, or a member of a manifest, with current names."""
    return {FIELDS.get(key, key): value for key, value in old.items()}


def leaf(path: str) -> str:
    """Return the current name of a leaf of a checkpoint's tree, whichever version wrote it.

    >>> leaf(".params['head']['weight']"), leaf(".moments[1].count")
    ('params/head/weight', 'moments/1/count')
    """
    return "/".join(re.findall(r"\w+", path))


def _key(path: str) -> str:
    return CONFIG.get(path, path)


def _keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_key(path): value for path, value in values.items()}


def summary(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary.json of a report with current keys."""
    if old.get("schema", 1) > 1:
        return dict(old)
    treatment = old.get("treatment", "rotary")
    keys = {"rate": "learning_rate", "rates": "learning_rates"}
    keys |= {f"speedup_of_{treatment}": "speedup", f"above_{treatment}": "gap", treatment: "treated"}

    def renamed(value: Mapping[str, Any]) -> dict[str, Any]:
        return {keys.get(key, key): nested for key, nested in value.items()}

    new = {**old, "schema": 2} | {key: [renamed(row) for row in old.get(key, [])] for key in ("runs", "sensitivity")}
    new["arms"] = [
        renamed(arm) | {"treatment": treatment, "steps_to_target": renamed(arm["steps_to_target"])}
        for arm in old["arms"]
    ]
    new["tuning"] = [{"setting": ""} | renamed(tuning) for tuning in old["tuning"]]
    seeds = {run["arm"]: run["seeds"] for run in old["runs"]}
    for tuning in new["tuning"]:  # a count of seeds becomes the seeds, if the runs of the grid are listed
        listed = seeds.get(f"{tuning['setting']}/{tuning['arm']}".lstrip("/"), [])
        tuning["seeds"] = listed if len(listed) == tuning["seeds"] else []
    return new
