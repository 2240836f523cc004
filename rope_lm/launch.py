"""A sweep: arms, each trained in a process of its own, one after another."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from rope_lm import journal
from rope_lm.refusal import Refusal, unknown

Config = dict[str, Any]
STOPPED, MISTAKE = 75, 2  # exit statuses of a run that was asked to stop, and of one that was refused
SIGNALS = (signal.SIGTERM, signal.SIGINT)
ATTEMPTS = 3  # at an arm that is killed: what took its memory may be gone, and each goes on from the last checkpoint


def expand(sweep: Mapping[str, Any], only: Sequence[str] | None) -> dict[str, Config]:
    """The whole config of each arm: the base with the arm's {section: {key: value}} put over it.

    Raises Refusal for an arm that changes a key that the base does not have, and for unknown names in `only`.
    """
    if set(sweep) != {"base", "arms"}:
        raise Refusal(f"a sweep has base and arms, this config has {', '.join(sweep)}: see configs/ablation.py")
    for name in only or ():
        if name not in sweep["arms"]:
            raise unknown("arm in --only", name, sweep["arms"])
    return {name: _over(sweep["base"], arm, name) for name, arm in sweep["arms"].items() if not only or name in only}


def _over(base: Mapping[str, Any], arm: Mapping[str, Any], name: str) -> Config:
    config = {key: dict(value) if isinstance(value, Mapping) else value for key, value in base.items()}
    for section, changes in arm.items():
        for key, value in changes.items() if isinstance(changes, Mapping) else [(None, changes)]:
            target, field = (config, section) if key is None else (config.get(section, {}), key)
            if field not in target:
                raise unknown(f"key that arm {name} changes", f"{section}.{key}" if key else section, target)
            target[field] = value
    return config


def show_plan(arms: Mapping[str, Config]) -> None:
    """Builds every arm without compiling and prints what it would train. Raises Refusal for an arm that cannot run."""
    from rope_lm import run  # imports JAX, which the sweep itself does not need

    table = Table("arm", "members", "parameters (its own)", "kernel", "FLOPs", "GB on 1, 8", box=SIMPLE)
    total = 0.0
    for name, config in arms.items():
        plan = run.plan(config)
        tokens = plan.steps * len(plan.members) * plan.data.batch * plan.data.length
        total += tokens * plan.flops_per_token
        sizes = [{"member": 1, "data": 1, "fsdp": count, "tensor": 1} for count in (1, 8)]
        table.add_row(
            name,
            f"{len(config['seeds'])} x {len(config['optimizer']['rate'])}",
            f"{plan.parameters:,} ({plan.parameters_position:,})",
            plan.kernel,
            f"{tokens * plan.flops_per_token:.1e}",
            ", ".join(f"{plan.memory(each) / 1e9:.2g}" for each in sizes),
        )
    console = Console()
    console.print(table)
    console.print("members: seeds x rates; GB: of a step, on each of so many devices (mesh.fsdp), estimated")
    steps = " or ".join(f"{each:,}" for each in sorted({config["steps"] for config in arms.values()}))
    console.print(
        f"{len(arms)} arms, {steps} steps, {total:.3g} FLOPs in all; nothing was trained (--dry)", highlight=False
    )


def sweep(arms: Mapping[str, Config], workdir: str | Path, flags: Sequence[str] = ()) -> int:
    """Trains every arm in workdir/ARM, with these flags of scripts.train, and lists how each ended. Returns an exit
    status."""
    root = Path(workdir).resolve()
    try:
        (root / "plan").mkdir(parents=True, exist_ok=True)
        for name, config in arms.items():
            (root / "plan" / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n")
        described = {"arms": {name: name for name in arms}, "argv": sys.argv}
        (root / "sweep.json").write_text(json.dumps(described, indent=2) + "\n")
    except OSError as error:
        raise Refusal(f"workdir {str(root)!r} cannot be written ({error.strerror}): choose another") from error
    console = Console(stderr=True)
    began, codes = time.monotonic(), dict.fromkeys(arms, STOPPED)
    for number, name in enumerate(arms):
        left = (time.monotonic() - began) / number * (len(arms) - number) if number else 0
        about = f", about {left / 60:.0f} min left" if number else ""
        console.print(f"[bold]\\[{number + 1}/{len(arms)}] {name}[/bold]{about}", highlight=False)
        _wait(root / name, console)
        for _ in range(ATTEMPTS):
            codes[name] = _train(root, name, flags)
            if codes[name] != -signal.SIGKILL:
                break
            console.print(f"{name}: killed", highlight=False)
        if codes[name] == STOPPED:
            break
    return _list(root, codes, console)


def _wait(workdir: Path, console: Console) -> None:
    """Until no process trains in the folder: that of a sweep that was itself killed goes on by itself."""
    by = None
    while now := journal.holder(workdir):
        if now != by:
            by = now
            console.print(f"{workdir.name}: waiting for {by}, which trains it already", highlight=False)
        time.sleep(0.5)


def _train(root: Path, name: str, flags: Sequence[str]) -> int:
    """One arm, in its own process: what kills it, or fills its memory, leaves the sweep alive."""
    config = root / "plan" / f"{name}.json"
    command = [sys.executable, "-m", "scripts.train", f"--workdir={root / name}", *flags]
    child = subprocess.Popen([*command, f"--config=configs/resolved.py:{config}"], cwd=Path(__file__).parents[1])
    # A signal is the run's to answer: it saves and exits, and this process waits for it.
    old = {each: signal.signal(each, lambda number, _: child.send_signal(number)) for each in SIGNALS}
    try:
        code = child.wait()
        if code < 0:
            _note_killed(root / name / "status.json", signal.Signals(-code).name)
        return code
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)


def _note_killed(path: Path, name: str) -> None:
    """A run that was killed could not say so itself."""
    with suppress(OSError):  # a full disk: the sweep's list says it all the same
        why = f"killed by {name}: where it was not you, by a lack of memory; lower data.batch, data.length or seeds"
        journal.write_json(path, {**json.loads(path.read_text()), "status": "failed", "why": why})


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
