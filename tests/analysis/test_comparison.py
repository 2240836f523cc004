"""Comparisons of arms: their targets, their grids, and how often they err."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rope_lm.analysis import compare, fairness, judge_all, load, sensitivity, table, tune
from rope_lm.analysis.comparison import contrast
from rope_lm.analysis.estimates import MARGIN, detectable
from rope_lm.analysis.runs import Run
from rope_lm.refusal import Refusal
from tests.analysis.conftest import SIX, STEPS, Loss, diverge, only, write_claim, write_run


def test_settings_are_compared_within_themselves(study: Path) -> None:
    sweep = load(study)
    assert [setting.title for setting in sweep.settings] == ["study: causal-softmax", "study: masked-softmax"]
    causal, masked = (compare(setting, "rotary") for setting in sweep.settings)
    assert [arm.name for arm, _ in causal.tested] == ["sinusoidal", "learned"]
    assert causal["learned"].speedup.verdict == "supported" and masked["learned"].speedup.verdict == "refuted"
    assert compare(load(study / "causal-softmax"), "rotary")["learned"].speedup == causal["learned"].speedup
    with pytest.raises(
        Refusal, match=r"study has settings .causal-softmax, masked-softmax., and arms are compared within one"
    ):
        compare(sweep, "rotary")


def test_masked_and_causal_losses_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "s" / "rotary", "rotary", 2)
    write_run(tmp_path / "s" / "learned", "learned", 1, config={"objective": {"name": "masked"}})
    with pytest.raises(Refusal, match=r"different objectives .learned: masked, rotary: causal"):
        compare(load(tmp_path / "s"), "rotary")


def test_across_tokenizers_losses_are_in_bits_per_byte(tmp_path: Path) -> None:
    other = {"fingerprint": {"text": "f" * 64, "tokenizer": "bpe-1"}, "bytes_per_token": 2.0, "tokens": {"train": 1}}
    write_run(tmp_path / "s" / "rotary", "rotary", 2, manifest={"data": other})
    write_run(tmp_path / "s" / "learned", "learned", 2)
    arms = compare(load(tmp_path / "s"), "rotary")
    assert arms.unit == "bits per byte"
    nats = {row["arm"]: row["final_nats"] for row in table(load(tmp_path / "s")) if row["seed"] == 0}
    finals = {arm.name: arm.run.curves[0].final for arm in arms}
    assert finals["learned"] == pytest.approx(nats["learned"] / math.log(2))
    assert finals["rotary"] == pytest.approx(nats["rotary"] / math.log(2) / 2)
    assert arms["rotary"].final.mean == pytest.approx(arms["rotary"].bits_per_byte)
    assert arms["learned"].contrast.final.mean > 0, "half the bits a byte, at equal nats a token"


def test_a_grid_is_no_comparison(tmp_path: Path) -> None:
    write_run(tmp_path / "g" / "rotary", "rotary", 1, rates=(1e-3, 3e-3))
    with pytest.raises(Refusal, match="g is a grid of learning rates"):
        compare(load(tmp_path / "g"), "rotary")


def test_the_target_is_the_median_or_what_every_seed_comes_to(tmp_path: Path) -> None:
    """A treatment that ends above the baseline never comes to its median: they are compared at its own worst loss."""
    write_run(tmp_path / "s" / "rotary", "rotary", 1.0, SIX)
    write_run(tmp_path / "s" / "learned", "learned", 2.0, SIX)
    slow = compare(load(tmp_path / "s"), "rotary")["learned"]
    worst = max(curve.final for curve in compare(load(tmp_path / "s"), "rotary")["rotary"].run.curves)
    assert slow.speedup.target == worst and slow.speedup.bound == "" and slow.speedup.verdict == "refuted"
    assert slow.speedup.mean == pytest.approx(0.5, rel=0.03) and slow.contrast.common.steps.mean == slow.speedup.mean
    fast = compare(load(tmp_path / "s"), "learned")["rotary"]
    assert fast.speedup.target == pytest.approx(np.median([c.final for c in fast.run.curves]))
    assert (
        fast.speedup.bound == "lower" and fast.contrast.common.steps.bound == "" and fast.speedup.verdict == "supported"
    )


def test_arms_that_are_alike_are_equivalent_and_not_merely_open(tmp_path: Path) -> None:
    def loss(step: int, seed: int, rate: float) -> float:
        return 1 + 5 / (1 + 2 * (1 + 0.02 * ((seed + 1) % 3)) * step / 50)

    write_run(tmp_path / "s" / "rotary", "rotary", 2, SIX)
    write_run(tmp_path / "s" / "learned", "learned", loss, SIX)
    arm = compare(load(tmp_path / "s"), "rotary")["learned"]
    assert arm.speedup.verdict == "equivalent"
    assert arm.speedup.low > 1 / MARGIN and arm.speedup.high < MARGIN and arm.speedup.bound == ""


def test_seconds_and_flops_have_ratios_of_their_own(tmp_path: Path) -> None:
    """Rotary takes half the steps, each at half the speed and three times the FLOPs."""
    write_run(tmp_path / "s" / "learned", "learned", 1, SIX)
    folder = write_run(tmp_path / "s" / "rotary", "rotary", 2, SIX, manifest={"flops_per_token": 3e6})
    slow = folder / "metrics.jsonl"
    slow.write_text("".join(_slower(line, 4) for line in slow.read_text().splitlines()))
    found = compare(load(tmp_path / "s"), "rotary")["learned"].contrast.costs
    assert found.seconds.mean == pytest.approx(found.steps.mean / 2)
    assert found.flops.mean == pytest.approx(found.steps.mean / 3)


def _slower(line: str, times: float) -> str:
    row = json.loads(line)
    return json.dumps(row | {"seconds": row["seconds"] * times}) + "\n"


def test_the_noise_floor_is_that_of_arms_against_themselves(study: Path) -> None:
    arms = compare(load(study).settings[0], "rotary")
    # Seeds 3, 4, 5 repeat the speeds of 0, 1, 2: the halves are alike, the floor is nothing, and nothing is tested.
    assert arms.floor.pairs == 9 and arms.floor.tested == 0
    assert arms.floor.low == pytest.approx(1) and arms.floor.high == pytest.approx(1)
    assert compare(load(study / "causal-softmax"), "rotary").floor.positives == 0


def test_the_area_under_the_curve_is_paired(study: Path) -> None:
    arms = compare(load(study).settings[0], "rotary")
    mine, other = arms["rotary"].run.curves, arms["learned"].run.curves
    by_hand = np.mean([np.trapezoid(b.nats - a.nats, a.steps) / STEPS for a, b in zip(mine, other, strict=True)])
    assert arms["learned"].contrast.area.mean == pytest.approx(by_hand) and by_hand > 0


def test_a_grid_has_speedups_at_shared_rates_and_at_each_arms_best(tmp_path: Path) -> None:
    """Rotary does best at 3e-3 and learned at 1e-2, where rotary does worse."""
    rates = (1e-3, 3e-3, 1e-2)

    def loss(speed: float, best: float) -> Loss:
        return lambda step, seed, rate: (
            1 + 5 / (1 + speed * np.exp(-abs(np.log(rate / best))) * step / 50) + 0.001 * seed
        )

    write_run(tmp_path / "g" / "rotary", "rotary", loss(2, 3e-3), (100, 101), rates)
    write_run(tmp_path / "g" / "learned", "learned", loss(2, 1e-2), (100, 101), rates)
    (found,) = sensitivity(load(tmp_path / "g"), "rotary")
    assert found.baseline == "learned" and found.learning_rates == list(rates)
    low, middle, high = (speedup.mean for speedup in found.shared)
    assert low == pytest.approx(3.33, rel=0.05) and middle == pytest.approx(3.33, rel=0.05)
    assert high == pytest.approx(0.3, rel=0.05) and found.tuned.mean == pytest.approx(1, rel=0.02)
    assert {tuning.arm: tuning.at_edge for tuning in tune(load(tmp_path / "g"))} == {"learned": True, "rotary": False}
    assert sensitivity(load(tmp_path / "g"), "alibi") == []


def ends_at_nan(seed: int, rate: float) -> Loss:
    """Return losses of which one member's last is not finite."""
    return lambda step, s, r: np.nan if step == STEPS and (s, r) == (seed, rate) else 1 + 5 / (1 + r * step) + s / 1000


def test_a_member_that_ends_at_no_finite_loss_is_censored_left_out_of_losses_and_named(tmp_path: Path) -> None:
    write_run(tmp_path / "s" / "rotary", "rotary", 2, SIX)
    write_run(tmp_path / "s" / "learned", "learned", ends_at_nan(2, 3e-3), SIX)
    sweep = load(tmp_path / "s")
    arm = compare(sweep, "rotary")["learned"]
    assert [curve.seed for curve in arm.run.curves] == [0, 1, 3, 4, 5]
    assert arm.speedup.n == 6 and arm.speedup.bound == arm.contrast.common.steps.bound == "lower"
    assert len(arm.contrast.final.values) == 5 and math.isfinite(arm.target) and math.isfinite(arm.area)
    assert only(fairness.warnings([sweep])).startswith(
        "Members of learned end at a loss that is not finite (member 2): they count as never reaching"
    )


@pytest.mark.parametrize("lost", ["rotary", "learned"])
def test_seeds_that_diverge_are_censored_not_dropped(tmp_path: Path, lost: str) -> None:
    """Without three of its six seeds rotary would be 1.3 times as fast, supported."""
    for arm, speed in (("learned", 1), ("rotary", 1.3)):
        folder = write_run(tmp_path / "s" / arm, arm, speed, SIX)
        if arm == lost:
            diverge(folder, {1: 100, 3: 300, 5: 400})
    write_claim(tmp_path / "s")
    write_claim(tmp_path / "s", outcome="final", threshold=0.0)
    sweep = load(tmp_path / "s")
    found = compare(sweep, "rotary")["learned"].contrast
    steps, final = judge_all([sweep])
    assert found.steps.n == steps.n == 6 and final.n == 3 and found.steps.verdict == steps.verdict
    if lost == "rotary":
        assert (found.steps.verdict, found.steps.bound, final.bound) == ("inconclusive", "upper", "upper")
        assert found.median.steps.bound == "unknown" and found.steps.low < 1 and final.verdict == "inconclusive"
    else:
        assert (found.steps.verdict, found.steps.bound, final.bound) == ("supported", "lower", "lower")
        assert final.verdict == "supported"
    assert found.profile[0].bound == "", "what a seed comes to before it diverges counts"
    assert not any(math.isnan(arm.run.tokens_per_second) for arm in compare(sweep, "rotary"))


def test_seconds_of_ensembles_of_unequal_size_are_not_held_against_each_other(tmp_path: Path) -> None:
    write_run(tmp_path / "s" / "learned", "learned", 1, (0, 1, 2))
    write_run(tmp_path / "s" / "rotary", "rotary", 2, SIX)
    write_claim(tmp_path / "s", outcome="seconds")
    sweep = load(tmp_path / "s")
    found = compare(sweep, "rotary")["learned"].contrast
    assert found.steps.verdict == "supported" and found.costs.seconds.bound == "unknown"
    assert [verdict.verdict for verdict in judge_all([sweep])] == ["inconclusive"]


def test_an_evaluation_that_is_not_finite_is_passed_over(tmp_path: Path) -> None:
    def once(step: int, seed: int, rate: float) -> float:
        return np.nan if step == 500 and seed == 1 else 1 + 5 / (1 + step / 50)

    write_run(tmp_path / "s" / "rotary", "rotary", once)
    arm = compare(load(tmp_path / "s"), "rotary")["rotary"]
    plain, passed = (arm.run.curves[i].area for i in (0, 1))
    assert len(arm.run.curves) == 3 and passed == pytest.approx(plain, rel=1e-2)


def test_the_smallest_effect_is_by_the_spread_that_nothing_cuts_off(tmp_path: Path) -> None:
    for arm, speed in (("learned", 1), ("rotary", 1.3)):
        write_run(tmp_path / "s" / arm, arm, by_seed(speed), SIX)
    found = compare(load(tmp_path / "s"), "rotary")["learned"].contrast
    assert np.std(found.median.steps.values) < 0.9 * np.std(found.common.steps.values)
    assert math.log(found.detectable) == pytest.approx(detectable(np.std(found.common.steps.values, ddof=1), 6))


def by_seed(speed: float) -> Loss:
    """Losses whose seeds differ in speed: by up to half where the arm is slow, else not at all."""
    spread = 0.1 if speed == 1 else 0.0
    return lambda step, seed, rate: 1 + 5 / (1 + speed * (1 + spread * seed) * step / 50)


def test_a_grid_whose_every_rate_is_lost_has_no_best(tmp_path: Path) -> None:
    def lost_at_the_end(step: int, seed: int, rate: float) -> float:
        return np.nan if step == STEPS else 2.0

    write_run(tmp_path / "g" / "rotary", "rotary", lost_at_the_end, (100,), (1e-3, 1e-2))
    write_run(tmp_path / "g" / "none", "none", 1, (100,), (1e-3, 1e-2))
    lost = {tuning.arm: tuning for tuning in tune(load(tmp_path / "g"))}["rotary"]
    assert math.isnan(lost.best) and not lost.at_edge
    assert [found.tuned for found in sensitivity(load(tmp_path / "g"), "rotary")] == [None]


def test_a_rate_at_which_a_member_ends_at_no_finite_loss_is_not_chosen(tmp_path: Path) -> None:
    write_run(tmp_path / "g" / "rotary", "rotary", ends_at_nan(101, 1e-2), (100, 101), (1e-3, 1e-2))
    (tuning,) = tune(load(tmp_path / "g"))
    assert tuning.best == 1e-3 and tuning.final_nats[1] == math.inf


def simulated(arm: str, speeds: np.ndarray) -> Run:
    """A run whose members learn at these speeds, evaluated every 25 steps of 500."""
    steps = np.arange(0, 501, 25)
    rows = [
        {"split": "validation", "member": i, "step": step, "nats": 1 + 5 / (1 + speed * step / 50), "seconds": step}
        for i, speed in enumerate(speeds.tolist())
        for step in steps.tolist()
    ]
    members = [{"member": i, "seed": i, "learning_rate": 1e-2} for i in range(len(speeds))]
    config = {"steps": 500, "data": {"batch": 1, "length": 1}}
    return Run(Path(), arm, config, {"members": members, "flops_per_token": 1.0}, {}, rows, {})


@pytest.mark.parametrize("n", [3, 6, 10])
@pytest.mark.parametrize("ratio", [1.0, 1.3])
def test_censored_comparisons_err_no_more_often_than_they_say(n: int, ratio: float) -> None:
    """200 studies: seeds differ by 10%, arms within a seed by 5%; half of the baselines' seeds are censored. A verdict
    against the truth, or an interval that lies wholly on the wrong side of it, comes in at most 5% of them."""
    random, wrong, missed = np.random.default_rng([n, int(10 * ratio)]), [], []
    for _ in range(200):
        seeds = random.normal(0, 0.1, n)
        baseline = simulated("a", np.exp(seeds + random.normal(0, 0.05, n)))
        found = contrast(baseline, simulated("b", ratio * np.exp(seeds + random.normal(0, 0.05, n)))).steps
        wrong.append(found.verdict == "refuted" if ratio > 1 else found.verdict in ("supported", "refuted"))
        missed.append(found.low > ratio * 1.01)  # interpolating between evaluations is good to a hundredth
    error = 3 * math.sqrt(0.05 * 0.95 / 200)
    assert np.mean(wrong) < 0.05 + error and np.mean(missed) < 0.025 + error
