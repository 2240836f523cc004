"""A sweep: arms, each trained in a process of its own, one after another or side by side."""

import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from rope_lm import journal
from rope_lm.refusal import Refusal, unknown
from rope_lm.shares import Share

Config = dict[str, Any]
STOPPED, MISTAKE = 75, 2  # exit statuses of a run that was asked to stop, and of one that was refused
SIGNALS = (signal.SIGTERM, signal.SIGINT)
ATTEMPTS = 3  # at an arm that is killed: what took its memory may be gone, and each goes on from the last checkpoint


def expand(sweep: Mapping[str, Any], only: Sequence[str] | None, overrides: Iterable[str] = ()) -> dict[str, Config]:
    """The whole config of each arm: the base with the arm's {section: {key: value}} put over it.

    An arm may be named SETTING/ARM; `only` takes such names, settings, and arms of whatever setting. `overrides`: the
    keys that flags have changed ("base.steps"). Raises Refusal for an arm that changes a key that the base does not
    have, for unknown names in `only`, and for an override of the base that does not reach every arm.
    """
    if set(sweep) != {"base", "arms", "claims"}:
        raise Refusal(f"a sweep has base, arms and claims, this config has {', '.join(sweep)}: see configs/ablation.py")
    names = {name: {name, *name.split("/")} for name in sweep["arms"]}
    for name in only or ():
        if not any(name in each for each in names.values()):
            raise unknown("arm in --only", name, set().union(*names.values()))
    chosen = [name for name in names if not only or names[name] & set(only)]
    arms = {name: _over(sweep["base"], sweep["arms"][name], name) for name in chosen}
    for key in (each.removeprefix("base.") for each in overrides if each.startswith("base.")):
        if own := [name for name, config in arms.items() if _at(config, key) != _at(sweep["base"], key)]:
            how = f"by --config.arms.ARM.{key}" if all(map(str.isidentifier, own)) else "in the sweep's function"
            raise Refusal(
                f"--config.base.{key} does not reach arms {', '.join(own)}, which have their own: set it {how}"
            )
    return arms


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value at a.b.c; None where there is none."""
    found: Any = config
    for each in key.split("."):
        found = found.get(each) if isinstance(found, Mapping) else None
    return found


def _over(base: Mapping[str, Any], arm: Mapping[str, Any], name: str) -> Config:
    config = {key: dict(value) if isinstance(value, Mapping) else value for key, value in base.items()}
    for section, changes in arm.items():
        # The keys of an objective are those of the function that its name picks: one replaces another whole.
        whole = section == "objective" or not isinstance(changes, Mapping)
        for key, value in [(None, changes)] if whole else changes.items():
            target, field = (config, section) if key is None else (config.get(section, {}), key)
            if field not in target:
                raise unknown(f"key that arm {name} changes", f"{section}.{key}" if key else section, target)
            target[field] = value
    return config


def setting(name: str) -> str:
    """The setting that an arm SETTING/ARM is compared in; "" for the arm of a sweep without settings."""
    return name.rpartition("/")[0]


def show_plan(arms: Mapping[str, Config]) -> None:
    """Builds every arm without compiling and prints what it would train, all of them. Raises Refusal for an arm that
    cannot run: before, for a mistake; after, for a lack of memory here."""
    from rope_lm import run  # imports JAX, which the sweep itself does not need

    table = Table("arm", "members", "parameters (its own)", "kernel", "FLOPs", "GB on 1, 8", box=SIMPLE)
    total, lacks = 0.0, {}
    for name, config in arms.items():
        plan = run.draft(config)
        if why := run.lack(plan):
            lacks[name] = why
        tokens = plan.steps * len(plan.members) * plan.data.batch * plan.data.length
        total += tokens * plan.flops_per_token
        sizes = [{"member": 1, "data": 1, "fsdp": count, "tensor": 1} for count in (1, 8)]
        table.add_row(
            name,
            f"{len(config['seeds'])} x {len(config['optimizer']['rate'])}",
            f"{plan.parameters:,} ({plan.parameters_position:,})",
            plan.kernel,
            f"{tokens * plan.flops_per_token:.1e}",
            ", ".join(f"{gb:,.0f}" if gb >= 10 else f"{gb:.2g}" for gb in (plan.memory(each) / 1e9 for each in sizes)),
        )
    console = Console()
    console.print(table)
    console.print("members: seeds x rates; GB: of a step, on each of so many devices (mesh.fsdp), estimated")
    steps = " or ".join(f"{each:,}" for each in sorted({config["steps"] for config in arms.values()}))
    console.print(
        f"{len(arms)} arms, {steps} steps, {total:.3g} FLOPs in all; nothing was trained (--dry)", highlight=False
    )
    if lacks:
        raise Refusal(f"{', '.join(lacks)}: {next(iter(lacks.values()))}")


def sweep(
    arms: Mapping[str, Config],
    claims: Mapping[str, Any],
    workdir: str | Path,
    flags: Sequence[str] = (),
    shares: Sequence[Share] = (Share(),),
) -> int:
    """Trains every arm in workdir/ARM, with these flags of scripts.train, as many at once as the machine has `shares`,
    and lists how each ended. Returns an exit status.

    Before, it says how long that takes, from a measured step of each setting. sweep.json keeps what was measured, and
    when each claim was first seen: one that is added, or changed, after its runs began can be told apart.
    """
    root, console = Path(workdir).resolve(), Console(stderr=True)
    try:
        for name, config in arms.items():
            path = root / "plan" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config, indent=2) + "\n")
        before = _about_sweep(root)
        journal.write_json(root / "sweep.json", before | {"claims": _dated(claims, before["claims"]), "argv": sys.argv})
        measured = before["seconds_per_step"] | _measure(arms, root, before["seconds_per_step"], shares)
        # Read again: another sweep may have begun with other arms of the same folder.
        now = _about_sweep(root)
        journal.write_json(root / "sweep.json", now | {"seconds_per_step": now["seconds_per_step"] | measured})
    except OSError as error:
        raise Refusal(f"workdir {str(root)!r} cannot be written ({error.strerror}): choose another") from error
    left = _show_time(arms, root, measured, console, len(shares))
    codes, waiting = dict.fromkeys(arms, STOPPED), iter(enumerate(arms, 1))

    def work(share: Share) -> None:
        share.take()
        while not children.stopped and (following := next(waiting, None)):
            number, name = following
            about = f", {_about(sum(list(left.values())[number - 1 :]) / len(shares))} left" if number > 1 else ""
            console.print(f"[bold]\\[{number}/{len(arms)}] {name}[/bold]{about}", highlight=False)
            prefix = f"[{number}/{len(arms)}] " if len(shares) > 1 else ""
            killed = 0
            while killed < ATTEMPTS:
                _wait(root / name, console, children)
                if children.stopped:
                    codes[name] = STOPPED
                    break
                codes[name] = _train(root, name, flags, children, share, prefix)
                if codes[name] == -signal.SIGKILL and not children.stopped:
                    console.print(f"{name}: killed", highlight=False)
                    killed += 1
                elif codes[name] != MISTAKE or not journal.holder(root / name):  # else another was there first
                    break
            if codes[name] == STOPPED:
                children.stopped = True

    with _Children().answering() as children, ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(work, shares))
    return _list(root, codes, console)


def _about_sweep(root: Path) -> dict[str, Any]:
    return {"claims": {}, "seconds_per_step": {}} | (journal.read_json(root / "sweep.json") or {})


def _dated(claims: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The claims, each with `since`, the moment from which what it tests has stood as it stands. Whom it is from and
    what was published may be put right."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    tested = lambda claim: {key: claim[key] for key in claim if key not in ("source", "published", "since")}  # noqa: E731
    dated = {}
    for name, claim in claims.items():
        was = before.get(name)
        dated[name] = {**claim, "since": was["since"] if was and tested(was) == tested(claim) else now}
    return dated


def _measure(
    arms: Mapping[str, Config], root: Path, known: Mapping[str, Any], shares: Sequence[Share]
) -> dict[str, Any]:
    """Seconds per step of one arm of each setting that has steps left, on a share of the machine, in a process of its
    own: this one must not hold the device. What is known of the same setting is not measured again; 0 where it could
    not be."""
    measured = {}
    for where, name in {setting(name): name for name in reversed(arms) if _left(root, name, arms[name])}.items():
        of = _digest(arms[name], len(shares))
        if where in known and known[where]["of"] == of and known[where]["seconds"]:
            continue
        with _Children().answering() as children, ThreadPoolExecutor(1, initializer=shares[0].take) as pool:
            words = ["--time", f"--config=configs/resolved.py:{root / 'plan' / name}.json"]
            code, said = pool.submit(_call, words, children, shares[0], subprocess.PIPE, subprocess.DEVNULL).result()
        if children.stopped or code == STOPPED:
            raise KeyboardInterrupt
        # An arm that cannot begin says why when its turn comes.
        measured[where] = {"of": of, "arm": name, "seconds": float(said) if code == 0 else 0.0}
    return measured


def _digest(config: Config, shares: int) -> str:
    """Of all that decides how long a step takes on one of so many shares of the machine, but the encoding."""
    model = {key: value for key, value in config["model"].items() if key != "position"}
    rates = len(config["optimizer"]["learning_rate"])
    decides = [
        config["data"],
        model,
        config["mesh"],
        config["optimizer"]["accumulation_steps"],
        config["seeds"],
        rates,
        shares,
    ]
    return hashlib.sha256(json.dumps([decides, config.get("objective")]).encode()).hexdigest()[:16]


def _left(root: Path, name: str, config: Config) -> int:
    """Steps."""
    status = _status(root, name, 0)
    return 0 if status["status"] == "diverged" else max(0, config["steps"] - status["step"])


def _show_time(
    arms: Mapping[str, Config], root: Path, measured: Mapping[str, Any], console: Console, at_once: int
) -> dict[str, float]:
    """Prints the plan of each setting; returns the seconds of training that each arm has left, 0 where they are not
    known."""
    table = Table("setting", "arms", "steps left", "s a step", "training left", box=SIMPLE)
    seconds = {}
    for where in dict.fromkeys(map(setting, arms)):
        steps = {name: _left(root, name, config) for name, config in arms.items() if setting(name) == where}
        step = measured[where]["seconds"] if where in measured else 0.0  # all its arms are finished
        seconds |= {name: count * step for name, count in steps.items()}
        total = sum(steps.values())
        known = (f"{step:.3g}", _about(total * step / at_once)) if step else ("", "not known" if total else "")
        table.add_row(where, ", ".join(name.rpartition("/")[2] for name in steps), f"{total:,}", *known)
    console.print(table)
    console.print(
        f"{len(arms)} arms, {_about(sum(seconds.values()) / at_once)} of training left, by a step of each setting "
        f"measured on this machine{f', {at_once} arms at once' * (at_once > 1)} (compiling and evaluating come on top)",
        highlight=False,
    )
    return seconds


def _about(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"about {seconds:.0f} s"


def _wait(workdir: Path, console: Console, children: "_Children") -> None:
    """Until no process trains in the folder: that of a sweep that was itself killed goes on by itself."""
    by = None
    while not children.stopped and (now := journal.holder(workdir)):
        if now != by:
            by = now
            console.print(f"{workdir.name}: waiting for {by}, which trains it already", highlight=False)
        time.sleep(0.5)


class _Children:
    """The processes that train at the moment."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopped = False  # whether no more should begin

    @contextmanager
    def answering(self) -> Iterator["_Children"]:
        """A signal is the runs' to answer: they save and exit, and this process waits for them."""

        def pass_on(number: int, _: object) -> None:
            self.stopped = True
            for child in list(self.running):
                child.send_signal(number)

        old = {each: signal.signal(each, pass_on) for each in SIGNALS}
        try:
            yield self
        finally:
            for each, handler in old.items():
                signal.signal(each, handler)


def _train(root: Path, name: str, flags: Sequence[str], children: _Children, share: Share, prefix: str) -> int:
    """One arm, in its own process: what kills it, or fills its memory, leaves the sweep alive."""
    words = [f"--workdir={root / name}", *flags, f"--config=configs/resolved.py:{root / 'plan' / name}.json"]
    code, _ = _call(words, children, share, None, subprocess.PIPE if prefix else None, prefix)
    if code < 0:
        _note_killed(root / name / "status.json", signal.Signals(-code).name)
    return code


def _call(
    flags: Sequence[str], children: _Children, share: Share, output: int | None, errors: int | None, prefix: str = ""
) -> tuple[int, str | None]:
    """The exit status of scripts.train with these flags and, where `output` is a pipe, what it printed; what it says
    meanwhile, where `errors` is one, is said here line by line after a prefix."""
    child = subprocess.Popen(
        [sys.executable, "-m", "scripts.train", *flags],
        cwd=Path(__file__).parents[1],
        env=os.environ | dict(share.environment),
        stdout=output,
        stderr=errors,
        text=True,
    )
    children.running.add(child)
    if children.stopped:  # by a signal that came before the child was known
        child.send_signal(signal.SIGTERM)
    try:
        for line in child.stderr or ():
            print(f"{prefix}{line}", end="", file=sys.stderr, flush=True)
        said, _ = child.communicate()
        # One that a signal ends was not yet ready to answer it, and had begun nothing.
        return STOPPED if -child.returncode in SIGNALS else child.returncode, said
    finally:
        children.running.discard(child)


def _note_killed(path: Path, name: str) -> None:
    """A run that was killed could not say so itself. One that had not begun leaves what an earlier one said."""
    with suppress(OSError):  # a full disk: the sweep's list says it all the same
        status = json.loads(path.read_text())
        if status["status"] == "running":
            why = f"killed by {name}: where it was not you, by a lack of memory; lower data.batch, data.length or seeds"
            journal.write_json(path, {**status, "status": "failed", "why": why})


def _status(root: Path, name: str, code: int) -> dict[str, Any]:
    try:
        status = json.loads((root / name / "status.json").read_text())
    except (OSError, ValueError):
        status = {"status": "not run", "why": "", "step": 0}
    if code == MISTAKE:  # it did not begin: its status is that of an earlier run
        return {**status, "status": "refused", "why": "see above"}
    return status


def _list(root: Path, codes: Mapping[str, int], console: Console) -> int:
    table = Table("arm", "status", "step", "why")
    for name, code in codes.items():
        status = _status(root, name, code)
        table.add_row(name, status["status"], str(status["step"]), status["why"])
    console.print(table)
    if STOPPED in codes.values():
        console.print("stopped: run the same command again to go on")
        return STOPPED
    return 1 if any(codes.values()) else 0
