"""Verdicts on claims, and warnings about unfair comparisons."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from rope_lm.analysis import compare, fairness, judge_all, load
from rope_lm.analysis.claims import Verdict
from rope_lm.analysis.estimates import holm
from rope_lm.refusal import Refusal
from tests.analysis.conftest import BEGAN, SIX, only, set_status, write_claim, write_report, write_run


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Rotary twice as fast as learned, and 0.13 nats below it at the end."""
    write_run(tmp_path / "s" / "rotary", "rotary", 2, SIX)
    write_run(tmp_path / "s" / "learned", "learned", 1, SIX)
    return tmp_path / "s"


def verdict(folder: Path) -> Verdict:
    return only(judge_all([load(folder)]))


@pytest.mark.parametrize(
    "claim, expected, sentence",
    [
        ({}, "supported", "rotary learns faster than learned"),
        ({"threshold": 1.3}, "supported", "rotary learns more than 1.3 times as fast as learned"),
        ({"threshold": 3.0}, "refuted", "rotary learns more than 3 times as fast as learned"),
        ({"outcome": "seconds"}, "supported", "rotary learns faster than learned, in seconds"),
        (
            {"outcome": "flops", "threshold": 1.5},
            "supported",
            "rotary learns more than 1.5 times as fast as learned, in",
        ),
        ({"relation": "within", "threshold": 1.1}, "refuted", "rotary learns as fast, to within 1.1 times, as learned"),
        (
            {"relation": "within", "threshold": 3.0, "treatment": "learned", "baseline": "rotary"},
            "supported",
            "learned",
        ),
        ({"treatment": "learned", "baseline": "rotary"}, "refuted", "learned learns faster than rotary"),
        ({"outcome": "final", "threshold": 0.05}, "supported", "ends more than 0.05 nats per token below learned"),
        ({"outcome": "final", "threshold": 0.5}, "refuted", "ends more than 0.5 nats per token below learned"),
        (
            {"outcome": "final", "threshold": 0.5, "relation": "within"},
            "supported",
            "ends within 0.5 nats per token of",
        ),
        (
            {"outcome": "final", "threshold": 0.05, "relation": "within"},
            "refuted",
            "ends within 0.05 nats per token of",
        ),
        ({"baseline": "alibi"}, "not tested", "rotary learns faster than alibi"),
        ({"setting": "elsewhere"}, "not tested", "rotary learns faster than learned"),
    ],
)
def test_a_claim_has_a_verdict(pair: Path, claim: dict[str, Any], expected: Any, sentence: str) -> None:
    write_claim(pair, **claim)
    made = verdict(pair)
    assert made.verdict == expected and sentence in made.sentence and not made.late
    assert (made.n == 0) == (expected == "not tested") == math.isnan(made.p)


def test_p_is_students_against_the_threshold_and_corrected_over_all_claims(pair: Path) -> None:
    for threshold in (1.0, 1.97, 2.5):
        write_claim(pair, threshold=threshold)
    write_claim(pair, baseline="alibi")
    made = judge_all([load(pair)])
    found = compare(load(pair), "rotary")["learned"].contrast
    # What is supported is so at the baseline's median, what is refuted where no seed is censored.
    logs = [found.median.steps.values, found.median.steps.values, found.common.steps.values]
    expected = [stats.ttest_1samp(x, math.log(at)).pvalue for x, at in zip(logs, (1.0, 1.97, 2.5), strict=True)]
    assert [verdict.p for verdict in made[:3]] == pytest.approx(expected) and math.isnan(made[3].p_holm)
    assert [verdict.p_holm for verdict in made[:3]] == pytest.approx(holm(expected)), (
        "an untested claim corrects nothing"
    )


@pytest.mark.parametrize("outcome", ["final", "steps"])
def test_p_of_no_difference_is_below_5_percent_where_the_verdict_says_so(pair: Path, outcome: str) -> None:
    found = compare(load(pair), "rotary")["learned"].contrast
    result = found.final if outcome == "final" else found.common.steps
    for share in (-0.1, -0.01, 0.01, 0.1):
        threshold = result.high + share * (result.high - result.mean)
        write_claim(pair, outcome=outcome, relation="within", threshold=threshold)
    made = judge_all([load(pair)])
    assert [result.verdict == "supported" for result in made] == [False, False, True, True]
    assert [result.p < 0.05 for result in made] == [False, False, True, True]
    assert made[1].p == pytest.approx(0.05, rel=0.05) == made[2].p


def test_a_claim_that_was_added_after_its_runs_began_is_marked(pair: Path) -> None:
    write_claim(pair, since=BEGAN)
    write_claim(pair, since="2026-01-02T00:00:01+00:00")
    assert [verdict.late for verdict in judge_all([load(pair)])] == [False, True]


def test_unfinished_runs_leave_a_claim_untested(tmp_path: Path) -> None:
    set_status(write_run(tmp_path / "s" / "rotary", "rotary", 2, SIX), "running")
    write_run(tmp_path / "s" / "learned", "learned", 1, SIX)
    write_claim(tmp_path / "s")
    assert verdict(tmp_path / "s").verdict == "not tested"


def test_a_claim_that_cannot_be_read_is_refused(pair: Path) -> None:
    write_claim(pair, outcome="stepz")
    with pytest.raises(Refusal, match="unknown outcome of claim claim 0 'stepz': did you mean steps"):
        judge_all([load(pair)])
    about = json.loads((pair / "sweep.json").read_text())
    del about["claims"]["claim 0"]["source"]
    (pair / "sweep.json").write_text(json.dumps(about))
    with pytest.raises(Refusal, match=r"sweep.json: claim 'claim 0' lacks one of baseline, outcome"):
        load(pair)


# --- what is unfair -------------------------------------------------------------------------------------------------


def test_a_fair_study_has_no_warning(study: Path) -> None:
    assert fairness.warnings([load(study)]) == []


def test_arms_with_different_seeds_are_marked(study: Path) -> None:
    shutil.rmtree(study / "causal-softmax" / "learned")
    write_run(study / "causal-softmax" / "learned", "learned", 1, (3, 4, 5, 6, 7, 8))
    text = only([text for text in fairness.warnings([load(study)]) if "differ in seeds" in text])
    assert text.startswith("The arms of study: causal-softmax differ in seeds (learned: [3, 4, 5, 6, 7, 8]; rotary")
    assert "Only seeds that both arms have are compared" in text
    assert compare(load(study).settings[0], "rotary")["learned"].speedup.n == 3


def test_a_tuning_seed_that_is_compared_is_marked(study: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "grid" / "rotary", "rotary", 1, seeds=(5, 100), rates=(1e-3, 3e-3))

    def marked(grid: Path) -> list[str]:
        return [text for text in fairness.warnings([load(study), load(grid)]) if "Seeds" in text]

    text = only(marked(tmp_path / "grid"))
    assert text.startswith("Seeds 5 chose the learning rates in grid and are compared in study")
    write_report(tmp_path / "archive", load(tmp_path / "grid"))
    (tmp_path / "archive" / "runs.json").unlink()  # as the archives of before, which had a summary alone
    assert only(marked(tmp_path / "archive")) == text.replace("in grid", "in archive")


def test_arms_at_other_rates_than_the_grids_best_are_marked(tmp_path: Path) -> None:
    def best(step: int, seed: int, rate: float) -> float:
        return 1 + 5 / (1 + (2 if rate == 1e-2 else 1) * step / 50)

    for setting, arm in [("a", "rotary"), ("a", "learned"), ("a", "none"), ("b", "rotary")]:
        write_run(tmp_path / "s" / setting / arm, arm, 1, rates=(3e-3 if arm == "learned" else 1e-2,))
    for arm in ("rotary", "learned"):
        write_run(tmp_path / "g" / "a" / arm, arm, best, (100, 101), (3e-3, 1e-2, 3e-2))
    given = [load(tmp_path / "s"), load(tmp_path / "g")]
    assert fairness.warnings(given) == [
        "Arms of s are not at their best learning rate: a/learned 0.003, not 0.01.",
        "Arms of s are on no grid given here: a/none, b/rotary.",
    ]
    assert fairness.warnings(given[:1]) == []
    shutil.rmtree(tmp_path / "g" / "a" / "rotary")
    write_run(tmp_path / "g" / "a" / "alibi", "alibi", 1, (100, 101), (3e-3, 1e-2), config={"data": {"batch": 3}})
    found = fairness.warnings([load(tmp_path / "s"), load(tmp_path / "g")])
    assert any("s and the grid of its learning rates differ in data.batch (s: 16; g: 3)" in text for text in found), (
        found
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"commit": "d" * 40}, "differ in commit (causal-softmax: cccc"),
        ({"diff": "d" * 40}, "differ in diff"),
        ({"environment": {"NPROC": "2", "XLA_FLAGS": "--a"}}, "differ in environment.XLA_FLAGS (causal-softmax: none"),
        (
            {
                "data": {
                    "fingerprint": {"text": "g", "tokenizer": "bytes-1"},
                    "bytes_per_token": 1.0,
                    "tokens": {"train": 1},
                }
            },
            "differ in fingerprint.text (causal-softmax: ffff",
        ),
    ],
)
def test_settings_and_sweeps_that_differ_are_marked(
    study: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    shutil.rmtree(study / "masked-softmax")
    masked = {"objective": {"name": "masked"}}
    write_run(study / "masked-softmax" / "rotary", "rotary", 1, SIX, config=masked, manifest=change)
    text = only(fairness.warnings([load(study)]))
    assert text.startswith("The settings of study differ") and words in text
    write_run(tmp_path / "other" / "rotary", "rotary", 1, (7,), manifest=change)
    found = fairness.warnings([load(study), load(tmp_path / "other")])
    assert any(text.startswith("The sweeps differ") for text in found)


def test_a_run_that_went_on_to_another_number_of_steps_is_marked_also_in_an_archive(tmp_path: Path) -> None:
    """Segments are as a run writes them."""
    segments = [
        {"step": 0, "time": BEGAN, "changed": {}, "host": "mine"},
        {"step": 300, "time": BEGAN, "changed": {"every.save": [500, 100]}, "host": "mine"},
        {"step": 1000, "time": BEGAN, "changed": {"steps": [1000, 2000], "every.log": [20, 10]}, "host": "mine"},
    ]
    write_run(tmp_path / "s" / "rotary", "rotary", 2, manifest={"segments": segments})
    write_run(tmp_path / "s" / "learned", "learned", 1)
    words = "rotary was continued to 2,000 steps instead of 1,000: its schedule is not that of one run."
    assert fairness.warnings([load(tmp_path / "s")]) == [words]
    write_report(tmp_path / "out", load(tmp_path / "s"))
    assert fairness.warnings([load(tmp_path / "out")]) == [words]
    assert "mine" not in (tmp_path / "out" / "runs.json").read_text()


def test_mixed_tokenizers_are_marked(tmp_path: Path) -> None:
    other = {"fingerprint": {"text": "f" * 64, "tokenizer": "bpe-1"}, "bytes_per_token": 2.0, "tokens": {"train": 1}}
    write_run(tmp_path / "s" / "rotary", "rotary", 2, manifest={"data": other})
    write_run(tmp_path / "s" / "learned", "learned", 2)
    text = only(fairness.warnings([load(tmp_path / "s")]))
    assert "differ in fingerprint.tokenizer" in text and "compared in bits per byte" in text


def test_the_folder_of_a_setting_has_its_claims(study: Path) -> None:
    for setting in ("causal-softmax", "masked-softmax"):
        write_claim(study, setting=setting)
    whole = judge_all([load(study)])
    for setting, made in zip(("causal-softmax", "masked-softmax"), whole, strict=True):
        alone = only(judge_all([load(study / setting)]))
        assert (alone.mean, alone.verdict, alone.n) == (made.mean, made.verdict, made.n) and alone.n == 6
