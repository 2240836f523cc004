"""Arms of a sweep: their configs, their settings, and the claims about them."""

import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rope_lm import run_directory
from rope_lm.refusal import Refusal, unknown

Config = dict[str, Any]


def expand(sweep: Mapping[str, Any], only: Sequence[str] | None, overrides: Iterable[str] = ()) -> dict[str, Config]:
    """Return the whole config of each arm: the base, with the arm's {section: {key: value}} on top.

    An arm may be named SETTING/ARM. `only` selects by such names, by settings, or by arms across settings. `overrides`
    are the keys that flags have changed ("base.steps"). Raises Refusal for an arm that changes a key missing from the
    base, for unknown names in `only`, and for an override of the base that does not reach every arm.
    """
    if set(sweep) != {"base", "arms", "claims"}:
        raise Refusal(f"a sweep has base, arms and claims, this config has {', '.join(sweep)}: see configs/ablation.py")
    names = {arm: {arm, *arm.split("/")} for arm in sweep["arms"]}
    known = set().union(*names.values())
    for name in only or ():
        if name not in known:
            raise unknown("arm in --only", name, known)
    chosen = [arm for arm in names if not only or names[arm] & set(only)]
    arms = {arm: _merge(sweep["base"], sweep["arms"][arm], arm) for arm in chosen}
    for key in (path.removeprefix("base.") for path in overrides if path.startswith("base.")):
        if own := [arm for arm, config in arms.items() if _at(config, key) != _at(sweep["base"], key)]:
            how = f"by --config.arms.ARM.{key}" if all(map(str.isidentifier, own)) else "in the sweep's function"
            raise Refusal(
                f"--config.base.{key} does not reach arms {', '.join(own)}, which have their own: set it {how}"
            )
    return arms


def _at(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path; None if there is none."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _merge(base: Mapping[str, Any], arm: Mapping[str, Any], name: str) -> Config:
    config = {key: dict(value) if isinstance(value, Mapping) else value for key, value in base.items()}
    for section, changes in arm.items():
        # The keys of an objective belong to the function that its name picks, so an objective replaces another whole.
        whole = section == "objective" or not isinstance(changes, Mapping)
        for key, value in [(None, changes)] if whole else changes.items():
            target, field = (config, section) if key is None else (config.get(section, {}), key)
            if field not in target:
                raise unknown(f"key that arm {name} changes", f"{section}.{key}" if key else section, target)
            target[field] = value
    return config


def setting(arm: str) -> str:
    """Return the setting of an arm SETTING/ARM; "" in a sweep without settings."""
    return arm.rpartition("/")[0]


def status(root: Path, arm: str) -> dict[str, Any]:
    """Return the status of the run in root/arm; "not run" if there is none that can be read."""
    try:
        return run_directory.present(root / arm, json.loads((root / arm / "status.json").read_text()))
    except (OSError, ValueError):
        return {"status": "not run", "why": "", "step": 0}


def steps_left(root: Path, arm: str, config: Config) -> int:
    """Return the number of steps that the arm still has to train."""
    now = status(root, arm)
    return 0 if now["status"] == "diverged" else max(0, config["steps"] - now["step"])


def date_claims(claims: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the claims with `since`, the time from which each has been tested in its present form.

    `before` are the dated claims of an earlier start. A claim keeps its date when only its source or the published
    result is corrected.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    dated = {}
    for name, claim in claims.items():
        earlier = before.get(name)
        dated[name] = {**claim, "since": earlier["since"] if earlier and _tested(earlier) == _tested(claim) else now}
    return dated


def _tested(claim: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in claim.items() if key not in ("source", "published", "since")}


def digest(config: Config, at_once: int) -> str:
    """Return a digest of every setting that affects step time, except the encoding; `at_once` arms share a machine."""
    model = {key: value for key, value in config["model"].items() if key != "position"}
    optimizer = config["optimizer"]
    members = config["seeds"], len(optimizer["learning_rate"])
    settings = [config["data"], model, config["mesh"], optimizer["accumulation_steps"], *members, at_once]
    return hashlib.sha256(json.dumps([settings, config.get("objective")]).encode()).hexdigest()[:16]
