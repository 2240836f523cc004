"""The tables that a sweep prints: the plan, the time left, and how each arm ended."""

from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from rope_lm.refusal import Refusal
from rope_lm.sweep.arms import Config, setting, status, steps_left


def show_plan(arms: Mapping[str, Config]) -> None:
    """Compile every arm and print what it would train.

    Raises Refusal at once for an arm with a mistake, and after the table for arms that need more memory than there is.
    """
    from rope_lm import plan  # imports JAX, which a sweep that trains does not need

    table = Table("arm", "members", "parameters (its own)", "kernel", "FLOPs", "GB: step, evaluation", box=SIMPLE)
    total, short = 0.0, {}
    for arm, config in arms.items():
        planned = plan.draft(config)
        memory = "too little"
        try:
            compiled = planned.compiled
            memory = ", ".join(f"{size / 1e9:.2g}" for size in (compiled.step_bytes, compiled.evaluate_bytes))
        except Refusal as refusal:
            short[arm] = refusal
        tokens = planned.steps * len(planned.members) * planned.data.batch * planned.data.length
        flops = tokens * planned.flops_per_token
        total += flops
        table.add_row(
            arm,
            f"{len(config['seeds'])} x {len(config['optimizer']['learning_rate'])}",
            f"{planned.parameters:,} ({planned.parameters_position:,})",
            planned.program.execution.kernel,
            f"{flops:.1e}",
            memory,
        )
    console = Console()
    console.print(table)
    console.print(f"members: seeds x learning rates; GB: on each of {planned.mesh.size} devices", highlight=False)
    steps = " or ".join(f"{count:,}" for count in sorted({config["steps"] for config in arms.values()}))
    console.print(
        f"{len(arms)} arms, {steps} steps, {total:.3g} FLOPs in all; nothing was trained (--dry)", highlight=False
    )
    if short:
        raise Refusal(f"{', '.join(short)}: {next(iter(short.values()))}")


def show_time(
    root: Path, arms: Mapping[str, Config], step_seconds: Mapping[str, float], at_once: int
) -> dict[str, float]:
    """Print the training time left for each setting, from its `step_seconds`; return that of each arm, 0 if unknown."""
    table = Table("setting", "arms", "steps left", "s a step", "training left", box=SIMPLE)
    seconds: dict[str, float] = {}
    for name in dict.fromkeys(map(setting, arms)):
        steps = {arm: steps_left(root, arm, config) for arm, config in arms.items() if setting(arm) == name}
        step = step_seconds.get(name, 0.0)
        seconds |= {arm: count * step for arm, count in steps.items()}
        total = sum(steps.values())
        known = (f"{step:.3g}", about(total * step / at_once)) if step else ("", "unknown" if total else "")
        table.add_row(name, ", ".join(arm.rpartition("/")[2] for arm in steps), f"{total:,}", *known)
    console = Console(stderr=True)
    console.print(table)
    side_by_side = f", {at_once} arms at once" if at_once > 1 else ""
    console.print(
        f"{len(arms)} arms, {about(sum(seconds.values()) / at_once)} of training left, by a step of each setting "
        f"measured on this machine{side_by_side} (compiling and evaluating take more)",
        highlight=False,
    )
    return seconds


def show_end(root: Path, arms: Mapping[str, str]) -> None:
    """Print how each arm ended. `arms` maps each to "refused" if its process did not begin, else to ""."""
    table = Table("arm", "status", "step", "why")
    for arm, refused in arms.items():
        ended = status(root, arm)  # that of an earlier run, if this one was refused
        state, why = (refused, "see above") if refused else (ended["status"], ended["why"])
        table.add_row(arm, state, str(ended["step"]), why)
    Console(stderr=True).print(table)


def about(seconds: float) -> str:
    """Return a duration in words: "about 1.5 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"about {seconds:.0f} s"
