"""The plan of a sweep, as --dry prints it."""

import pytest

from configs import ablation, lm
from rope_lm import plan
from rope_lm.refusal import Refusal
from rope_lm.sweep.arms import expand
from rope_lm.sweep.tables import about, show_plan
from scripts import entry


@pytest.fixture
def arms(text, cache) -> dict:
    sweep = ablation.get_config(f"quick,data=text:{text}")
    sweep.base.data.update({"length": 16, "batch": 4, "validation_rows": 4, "cache": cache})
    sweep.base.model.update({"width": 16, "heads": 2, "layers": 1, "hidden": 32})
    return expand(entry.plain(sweep), ["none", "rotary"])


def test_dry_prints_every_arm_and_then_refuses_what_does_not_fit(arms, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    show_plan(arms)
    said = capsys.readouterr().out
    assert "none" in said and "rotary" in said and "nothing was trained" in said
    planned = plan.draft(arms["rotary"])
    assert f"{planned.compiled.step_bytes / 1e9:.2g}, {planned.compiled.evaluate_bytes / 1e9:.2g}" in said
    assert f"{planned.parameters:,}" in said
    monkeypatch.setattr(plan, "capacity", lambda _: 2000)
    with pytest.raises(
        Refusal, match=r"none, rotary: the state of training needs 0\.0 GB on one device of 0\.0 GB: lower"
    ):
        show_plan(arms)
    said = capsys.readouterr().out
    assert said.count("too little") == 2 and "nothing was trained" in said


def test_dry_of_a_billion_parameters_says_what_it_would_need(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    config = entry.plain(lm.get_config("scale=1b,data=probe:copy"))
    monkeypatch.setattr(plan, "capacity", lambda _: 16 * 10**9)
    with pytest.raises(
        Refusal, match=r"this run: the state of training needs 16\.1 GB on one device of 16\.0 GB: lower"
    ):
        show_plan({"this run": config})
    said = capsys.readouterr().out
    assert "1,007,769,600" in said and "too little" in said and "nothing was trained" in said


@pytest.mark.parametrize(
    "seconds, words",
    [(0, "about 0 s"), (89, "about 89 s"), (90, "about 1.5 min"), (3000, "about 50 min"), (86_400, "about 24 h")],
)
def test_durations_are_rounded(seconds, words):
    assert about(seconds) == words
