"""Reports compared with archived ones."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rope_lm.analysis import figures, load, reproduction
from scripts import report
from tests.analysis.conftest import summary, write_run, write_study, write_sweep

Summary = dict[str, Any]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of write_sweep. Read only."""
    return write_sweep(tmp_path_factory.mktemp("reproduction") / "sweep")


@pytest.fixture(scope="module")
def archived(sweep: Path) -> Summary:
    """Its summary. Read only."""
    return summary(load(sweep))


def changed(archived: Summary, change: Callable[[dict[str, Any]], object]) -> Summary:
    """Return a copy of the summary with a change to its arms, which are given by name."""
    made = copy.deepcopy(archived)
    change({arm["arm"]: arm for arm in made["arms"]})
    return made


def differing(summary: Summary, archived: Summary) -> list[str]:
    return [row.name for row in reproduction.check(summary, archived) if row.agrees is False]


def test_the_same_results_are_reproduced(archived: Summary) -> None:
    rows = reproduction.check(archived, archived)
    assert reproduction.reproduced(rows) and len(rows) > 20


def test_another_order_another_loss_another_start_and_a_missing_arm_are_not(archived: Summary) -> None:
    def worse(arm: dict[str, Any], by: float) -> None:
        final = arm["final_nats"]
        final["by_seed"] = {seed: value + by for seed, value in final["by_seed"].items()}
        final.update({key: final[key] + by for key in ("mean", "low", "high")})

    swapped = differing(changed(archived, lambda arms: worse(arms["rotary"], 2.0)), archived)
    assert "rotary ends below none" in swapped and "final nats of rotary" in swapped
    assert differing(changed(archived, lambda arms: worse(arms["none"], 0.2)), archived) == ["final nats of none"]
    start = changed(archived, lambda arms: arms["learned"]["first_nats"].update({"1": 6.00002}))
    assert differing(start, archived) == ["loss at step 0 of learned, seed 1"]
    order = changed(archived, lambda arms: arms["none"]["batches"].update({"2": "f" * 64}))
    assert differing(order, archived) == ["batches consumed by none, seed 2"]
    fewer = archived | {"arms": [arm for arm in archived["arms"] if arm["arm"] != "none"]}
    assert "arms" in differing(fewer, archived)


def test_arms_of_different_settings_are_not_ordered(tmp_path: Path) -> None:
    made = summary(load(write_study(tmp_path / "study")))
    rows = reproduction.check(made, made)
    assert reproduction.reproduced(rows)
    ordered = [row.name for row in rows if "ends below" in row.name]
    assert "causal-softmax/rotary ends below causal-softmax/learned" in ordered
    assert all(text.split()[0].split("/")[0] == text.split()[-1].split("/")[0] for text in ordered)


def test_arms_of_two_sweeps_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for place, speed in (("a", 2.0), ("b", 3.0)):
        for arm, times in (("rotary", speed), ("learned", 1.0)):
            write_run(tmp_path / place / "quick" / arm, arm, times)
    made = summary(*(load(tmp_path / place / "quick") for place in ("a", "b")))
    moved = copy.deepcopy(made)
    for arm in moved["arms"][:2]:
        arm["first_nats"] = {seed: nats + 1 for seed, nats in arm["first_nats"].items()}
    assert len(differing(moved, made)) == 6, "two arms of three seeds"


def test_on_another_text_only_the_order_is_compared(archived: Summary) -> None:
    made = copy.deepcopy(archived)
    made["fingerprint"]["text"] = "another"
    for arm in made["arms"]:
        arm["first_nats"] = {seed: value + 1 for seed, value in arm["first_nats"].items()}
    rows = reproduction.check(made, archived)
    assert reproduction.reproduced(rows)
    assert {row.agrees for row in rows if "step 0" in row.name} == {None}


def test_the_command_says_reproduced_or_not(
    sweep: Path,
    archived: Summary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(figures, "of", lambda findings: iter(()))
    against = tmp_path / "archived.json"
    argv = ["report", str(sweep), f"--out={tmp_path / 'r'}", f"--against={against}"]
    monkeypatch.setattr(sys, "argv", argv)
    against.write_text(json.dumps(archived))
    assert report.main() == 0 and "\nreproduced: " in capsys.readouterr().out
    start = changed(archived, lambda arms: [arm["first_nats"].update({"0": 0.0}) for arm in arms.values()])
    against.write_text(json.dumps(start))
    assert report.main() == 3
    said = capsys.readouterr().out
    assert "not reproduced" in said and "differs: loss at step 0 of rotary" in said
