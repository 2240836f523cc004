"""Is a run directory what it says it is? Every file is read again, every sum and every batch computed again."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rope_lm import checkpoint, data, journal
from rope_lm.data import batches
from rope_lm.refusal import Refusal
from rope_lm.run import ENDED
from rope_lm.settings import bind


@dataclass(frozen=True)
class Finding:
    """One line about a run: something that is wrong with it, or a note that leaves it whole."""

    wrong: bool
    text: str


def verify(workdir: Path) -> Iterator[Finding]:
    """What is wrong with a run directory, and what should be known of it, as it is found.

    Checkpoints against their sha256, metrics for completeness, the manifest against config, text and installed
    versions; the batches that were consumed are read again and hashed. Raises Refusal where there is no run.
    """
    if not (workdir / "config.json").exists():
        raise Refusal(f"{str(workdir)!r} holds no run (no config.json in it): give the --workdir of a run or a sweep")
    try:
        config, manifest, status = (
            journal.read_json(workdir / f"{name}.json") for name in ("config", "manifest", "status")
        )
        for name, value in (("config", config), ("manifest", manifest), ("status", status)):
            if not isinstance(value, dict):
                yield Finding(True, f"{name}.json is missing, or is not a run's")
                return
        yield from _ending(workdir, status)
        yield from _checkpoints(workdir / "checkpoints", status)
        yield from _metrics(workdir / "metrics.jsonl", config, manifest, status)
        yield from _members(config, manifest)
        yield from _batches(config, manifest)
        yield from _versions(manifest)
    except Refusal as refusal:
        yield Finding(True, str(refusal))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        yield Finding(
            True, f"a file of the run has not the form that this version writes ({type(error).__name__}: {error})"
        )


def _ending(workdir: Path, status: Mapping[str, Any]) -> Iterator[Finding]:
    by = journal.holder(workdir)
    if by:
        yield Finding(False, f"{by} trains it now: what follows is of a moment")
    elif status["status"] == "running":
        yield Finding(True, "status.json says that it is running, and no process is: it was killed; train it again")
    elif status["status"] not in ENDED:
        yield Finding(True, f"it {status['status']}: {status['why']}")


def _checkpoints(folder: Path, status: Mapping[str, Any]) -> Iterator[Finding]:
    saved = sorted((each for each in folder.glob("*") if each.name.isdigit()), key=lambda each: int(each.name))
    for each in saved:
        if fault := checkpoint.damage(each):
            yield Finding(True, f"checkpoint of step {each.name}: {fault}")
    newest = int(saved[-1].name) if saved else None
    if status["status"] in ENDED and newest != status["step"]:
        was = "there is none" if newest is None else f"the newest is of {newest}"
        yield Finding(True, f"it {status['status']} at step {status['step']}, and its checkpoint is not there: {was}")
    for each in sorted((folder / "bad").glob("*")):
        yield Finding(False, f"checkpoints/bad/{each.name} was damaged and set aside")


def _metrics(path: Path, config: Mapping, manifest: Mapping, status: Mapping) -> Iterator[Finding]:
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        yield Finding(True, "metrics.jsonl ends in a torn line; going on with the run drops it")
        return
    there = {(row["split"], row["member"], row["step"]) for row in journal.read_rows(path)}
    until = status["step"]  # of a run that was killed: where it last began, so that more rows may be there
    for split, key in (("train", "log"), ("validation", "evaluate")):
        steps = set(_cadence(key, config, manifest, until))
        if status["status"] == "finished":
            steps.add(until)
        if split == "validation":
            steps.add(0)
        for member in manifest["members"]:
            number = member["member"]
            alive = status["diverged"].get(str(number), math.inf)
            missing = sorted(each for each in steps if each <= alive and (split, number, each) not in there)
            if missing:
                many = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                yield Finding(
                    True, f"metrics.jsonl lacks the {split} row of member {number} at step {missing[0]}{many}"
                )


def _cadence(key: str, config: Mapping, manifest: Mapping, until: int) -> Iterator[int]:
    """The steps at which a run wrote a row, whose cadence may have been changed where it went on."""
    every, end = config["every"][key], until
    for segment in reversed(manifest["segments"]):
        yield from (step for step in range(every, end + 1, every) if step > segment["step"])
        every, end = segment["changed"].get(f"every.{key}", [every])[0], segment["step"]


def _members(config: Mapping, manifest: Mapping) -> Iterator[Finding]:
    wanted = [(seed, rate) for seed in config["seeds"] for rate in config["optimizer"]["learning_rate"]]
    if [(member["seed"], member["learning_rate"]) for member in manifest["members"]] != wanted:
        yield Finding(True, "the members in manifest.json are not the seeds and rates of config.json")


def _batches(config: Mapping, manifest: Mapping) -> Iterator[Finding]:
    """Reads what the run consumed once more: a batch is a pure function of text, seed and step."""
    said = manifest.get("batches")
    if said is None:
        yield Finding(False, "it has saved nothing yet: no batches to check")
        return
    try:
        text = data.make(**bind(data.make, config["data"], "data", {}))
    except Refusal as refusal:
        yield Finding(False, f"the batches were not checked, for the text is not here ({refusal})")
        return
    differ = journal.differences(manifest["data"]["fingerprint"], dict(text.fingerprint))
    if differ:
        what = "; ".join(f"{key} {was[:16]}, here {now[:16]}" for key, was, now in differ)
        yield Finding(False, f"the batches were not checked, for the text here is another ({what})")
        return
    seeds = [member["seed"] for member in manifest["members"]]
    consumed = [""] * len(seeds)
    for batch in text.batches(seeds, 0, said["step"]):
        consumed = batches.chain(consumed, batch)
    for seed, was, now in zip(seeds, said["sha256"], consumed, strict=True):
        if was != now:
            yield Finding(True, f"seed {seed} consumed other batches than it should: {was[:16]}, should be {now[:16]}")


def _versions(manifest: Mapping) -> Iterator[Finding]:
    here = journal.provenance([], {})
    for key, was, now in journal.differences(manifest["versions"], here["versions"]):
        yield Finding(False, f"{key} was {was}, here it is {now}: the same bits are not to be expected")
    if manifest["python"] != here["python"]:
        yield Finding(False, f"Python was {manifest['python']}, here it is {here['python']}")
    if manifest["commit"] != here["commit"] or manifest["diff"] != here["diff"]:
        was, now = (f"{of['commit'][:12]}{' with changes' * bool(of['diff'])}" for of in (manifest, here))
        yield Finding(False, f"the code was {was or 'unknown'}, here it is {now or 'unknown'}")
