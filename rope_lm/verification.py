"""Verification of a run directory. Files are re-read, checksums and batches are recomputed."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rope_lm import checkpoint, data, run_directory
from rope_lm.data import batches
from rope_lm.loop import ENDED
from rope_lm.provenance import provenance
from rope_lm.refusal import Refusal
from rope_lm.settings import bind

TOLERANCE = 1e-4  # relative, between a loss by document and by position: two sums of the same float32 numbers


class Finding(NamedTuple):
    """A line about a run: an error if `wrong` is True, else a note."""

    wrong: bool
    text: str


def verify(workdir: Path) -> Iterator[Finding]:
    """Yield the errors in a run directory, and notes about it, as they are found.

    Checks the checkpoints against their sha256, the metrics for missing rows, the losses by document against the
    metrics, the manifest against config, text and installed versions, and the consumed batches against the text. Raises
    Refusal if there is no run.
    """
    if not (workdir / "config.json").exists():
        raise Refusal(f"{str(workdir)!r} holds no run (no config.json in it): give the --workdir of a run or a sweep")
    try:
        config, manifest, status = run_directory.read(workdir)
        for name, value in (("config", config), ("manifest", manifest), ("status", status)):
            if not isinstance(value, dict):
                yield Finding(True, f"{name}.json is missing, or does not belong to a run")
                return
        yield from _ending(workdir, status)
        yield from _checkpoints(workdir / "checkpoints", status)
        yield from _metrics(workdir / "metrics.jsonl", config, manifest, status)
        yield from _documents(workdir)
        yield from _members(config, manifest)
        yield from _batches(config, manifest)
        yield from _versions(manifest)
    except Refusal as refusal:
        yield Finding(True, str(refusal))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        yield Finding(True, f"a file of the run is not in this version's format ({type(error).__name__}: {error})")


def _ending(workdir: Path, status: Mapping[str, Any]) -> Iterator[Finding]:
    if by := run_directory.holder(workdir):
        yield Finding(False, f"{by} is training it: the findings may change")
    elif status["status"] == "running":
        yield Finding(True, "status.json says that it is running, and no process is: it was killed; train it again")
    elif status["status"] not in ENDED:
        yield Finding(True, f"it {status['status']}: {status['why']}")


def _checkpoints(folder: Path, status: Mapping[str, Any]) -> Iterator[Finding]:
    saved = sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))
    for path in saved:
        if fault := checkpoint.damage(path):
            yield Finding(True, f"checkpoint of step {path.name}: {fault}")
    newest = int(saved[-1].name) if saved else None
    if status["status"] in ENDED and newest != status["step"]:
        found = "there is none" if newest is None else f"the newest is of {newest}"
        yield Finding(True, f"it {status['status']} at step {status['step']}, and its checkpoint is not there: {found}")
    for path in sorted((folder / "bad").glob("*")):
        yield Finding(False, f"checkpoints/bad/{path.name} was damaged and set aside")


def _metrics(path: Path, config: Mapping, manifest: Mapping, status: Mapping) -> Iterator[Finding]:
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        yield Finding(True, "metrics.jsonl ends in a torn line; going on with the run drops it")
        return
    found = {(row["split"], row["member"], row["step"]) for row in run_directory.read_rows(path)}
    until = status["step"]  # where a run that was killed last began: more rows may follow
    for split, key in (("train", "log"), ("validation", "evaluate")):
        steps = set(_cadence(key, config, manifest, until))
        steps |= {until} if status["status"] == "finished" else set()
        steps |= {0} if split == "validation" else set()
        for member in manifest["members"]:
            number = member["member"]
            diverged = status["diverged"].get(str(number), math.inf)
            missing = sorted(step for step in steps if step <= diverged and (split, number, step) not in found)
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                yield Finding(
                    True, f"metrics.jsonl lacks the {split} row of member {number} at step {missing[0]}{more}"
                )


def _cadence(key: str, config: Mapping, manifest: Mapping, until: int) -> Iterator[int]:
    """Yield the steps at which a run should have written rows. The interval may have changed when it was resumed."""
    every, end = config["every"][key], until
    for segment in reversed(manifest["segments"]):
        yield from (step for step in range(every, end + 1, every) if step > segment["step"])
        every, end = segment["changed"].get(f"every.{key}", [every])[0], segment["step"]


def _documents(workdir: Path) -> Iterator[Finding]:
    """Compare the losses by document with the validation rows of the same step."""
    documents = run_directory.read_json(workdir / "documents.json")
    if documents is None:
        return  # a run of an earlier version, or one that has not ended
    tokens = sum(documents["tokens"])
    rows = run_directory.read_rows(workdir / "metrics.jsonl")
    for row in (row for row in rows if (row["split"], row["step"]) == ("validation", documents["step"])):
        nats = documents["nats"][row["member"]]
        if row["nats"] is None or None in nats:
            continue
        if row["tokens"] != tokens or not math.isclose(sum(nats) / tokens, row["nats"], rel_tol=TOLERANCE):
            yield Finding(
                True,
                f"documents.json has {sum(nats) / tokens:.6f} nats over {tokens} tokens for member {row['member']} at "
                f"step {row['step']}, metrics.jsonl {row['nats']:.6f} over {row['tokens']}",
            )


def _members(config: Mapping, manifest: Mapping) -> Iterator[Finding]:
    wanted = [(seed, rate) for seed in config["seeds"] for rate in config["optimizer"]["learning_rate"]]
    if [(member["seed"], member["learning_rate"]) for member in manifest["members"]] != wanted:
        yield Finding(True, "the members in manifest.json are not the seeds and learning rates of config.json")


def _batches(config: Mapping, manifest: Mapping) -> Iterator[Finding]:
    """Recompute the consumed batches, which are a pure function of text, seed and step."""
    recorded = manifest.get("batches")
    if recorded is None:
        yield Finding(False, "nothing was saved yet: there are no batches to check")
        return
    try:
        text = data.make(**bind(data.make, config["data"], "data", {}))
    except Refusal as refusal:
        yield Finding(False, f"the batches were not checked, because the text is not here ({refusal})")
        return
    if differ := run_directory.differences(manifest["data"]["fingerprint"], dict(text.fingerprint)):
        changed = "; ".join(f"{key} {was[:16]}, here {now[:16]}" for key, was, now in differ)
        yield Finding(False, f"the batches were not checked, because the text here is another ({changed})")
        return
    seeds = [member["seed"] for member in manifest["members"]]
    consumed = [""] * len(seeds)
    for batch in text.batches(seeds, 0, recorded["step"]):
        consumed = batches.chain(consumed, batch)
    for seed, was, now in zip(seeds, recorded["sha256"], consumed, strict=True):
        if was != now:
            yield Finding(True, f"seed {seed} consumed other batches than it should: {was[:16]}, should be {now[:16]}")


def _versions(manifest: Mapping) -> Iterator[Finding]:
    keys = [key for key in ("versions", "python", "environment", "commit", "diff") if key in manifest]
    recorded, present = ({key: origin[key] for key in keys} for origin in (manifest, provenance([], {})))
    for key, was, now in run_directory.differences(recorded, present):
        name = key.removeprefix("versions.").removeprefix("environment.")
        yield Finding(False, f"{name} was {was}, here it is {now}: do not expect the same bits")
