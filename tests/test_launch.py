"""A sweep of settings: what its arms are, what it says before it starts, what it keeps of its claims."""

import json
import re
from pathlib import Path

import pytest

from configs import ablation, studies
from rope_lm import launch, run
from rope_lm.refusal import Refusal
from scripts import entry
from tests.test_scripts import ROOT, SMALL, call

STUDIES = sorted(studies.STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_arms_of_a_setting_differ_in_encoding_and_rate_alone(name):
    alike: dict[str, list] = {}
    for arm, config in launch.expand(entry.plain(studies.get_config(name)), None).items():
        config["model"] = {key: value for key, value in config["model"].items() if key != "position"}
        config["optimizer"] = {key: value for key, value in config["optimizer"].items() if key != "learning_rate"}
        alike.setdefault(launch.setting(arm), []).append(config)
    assert len(alike) >= 3 and all(len(configs) >= 3 for configs in alike.values())
    assert all(config == configs[0] for configs in alike.values() for config in configs)
    assert len({json.dumps(configs[0], sort_keys=True) for configs in alike.values()}) == len(alike)


def test_the_grid_is_of_the_same_arms_on_other_seeds():
    compared, tuned = (entry.plain(studies.get_config(name)) for name in ("replication", "tuned"))
    assert compared["arms"].keys() == tuned["arms"].keys()
    assert not set(compared["base"].pop("seeds")) & set(tuned["base"].pop("seeds"))
    assert compared["base"] == tuned["base"]
    for name, arm in tuned["arms"].items():
        (rate,) = compared["arms"][name]["optimizer"]["learning_rate"]
        assert rate in arm["optimizer"]["learning_rate"] == studies.RATES[launch.setting(name)], name


@pytest.mark.parametrize("name", STUDIES)
def test_claims_are_of_arms_that_are_there(name):
    study = entry.plain(studies.get_config(name))
    for claim in study["claims"].values():
        for side in ("treatment", "baseline"):
            assert f"{claim['setting']}/{claim[side]}" in study["arms"], claim
        assert claim["outcome"] in ("steps", "seconds", "flops", "final") and claim["relation"] in ("above", "within")
    assert name == "tuned" or study["claims"], "a study without a claim"


def test_only_names_settings_and_arms_of_settings():
    study = entry.plain(studies.get_config("replication"))
    assert {launch.setting(name) for name in launch.expand(study, ["masked-softmax"])} == {"masked-softmax"}
    assert list(launch.expand(study, ["causal-softmax/rotary"])) == ["causal-softmax/rotary"]
    everywhere = launch.expand(study, ["rotary"])
    assert len(everywhere) == 4 and {name.rpartition("/")[2] for name in everywhere} == {"rotary"}
    with pytest.raises(Refusal, match="unknown arm in --only 'masked-sofmax': did you mean masked-softmax"):
        launch.expand(study, ["masked-sofmax"])


def test_an_objective_replaces_another_whole_and_other_sections_key_by_key():
    sweep = {
        "base": {
            "objective": {"name": "causal"},
            "model": {"width": 8, "attention": {"name": "softmax", "kernel": "auto"}},
        },
        "arms": {
            "s/a": {"objective": {"name": "masked", "mask_rate": 0.15}, "model": {"attention": {"name": "performer"}}}
        },
        "claims": {},
    }
    expected = {
        "objective": {"name": "masked", "mask_rate": 0.15},
        "model": {"width": 8, "attention": {"name": "performer"}},
    }
    assert launch.expand(sweep, None) == {"s/a": expected}
    assert sweep["base"]["objective"] == {"name": "causal"}, "the base stays as it is"


def test_an_override_of_the_base_reaches_every_arm_or_is_refused():
    base = {"steps": 4, "optimizer": {"learning_rate": (1.0,)}, "model": {"position": {"name": "none"}}}
    arms = {"a": {"optimizer": {"learning_rate": (2.0,)}}, "b": {}, "s/c": {"model": {"position": {"name": "learned"}}}}
    sweep = {"base": base, "arms": arms, "claims": {}}
    expand = lambda *overrides, only=None: list(launch.expand(sweep, only, overrides))  # noqa: E731
    assert expand("base.steps", "arms.a.optimizer.learning_rate") == ["a", "b", "s/c"]
    assert expand("base.optimizer.learning_rate", only=["b", "s/c"]) == ["b", "s/c"], "of the chosen arms alone"
    with pytest.raises(
        Refusal, match=r"does not reach arms a, which .*: set it by --config.arms.ARM.optimizer.learning_rate"
    ):
        expand("base.optimizer.learning_rate")
    with pytest.raises(
        Refusal, match=r"base.model.position.name does not reach arms s/c, .* set it in the sweep's function"
    ):
        expand("base.model.position.name")
    arms["a"]["optimizer"]["learning_rate"] = (1.0,)
    assert expand("base.optimizer.learning_rate") == ["a", "b", "s/c"], "the same value"


def test_a_claim_keeps_the_time_at_which_it_was_first_seen(tmp_path):
    def claims() -> dict:
        return json.loads((tmp_path / "sweep.json").read_text())["claims"]

    assert launch.sweep({}, {"a": {"threshold": 1.0}, "b": {"threshold": 1.0}}, tmp_path) == 0
    assert all(claim["since"].endswith("+00:00") for claim in claims().values())
    about = json.loads((tmp_path / "sweep.json").read_text())
    for claim in about["claims"].values():
        claim["since"] = "2020-01-01T00:00:00+00:00"
    (tmp_path / "sweep.json").write_text(json.dumps(about))
    corrected = {"threshold": 1.0, "source": "another paper"}
    launch.sweep({}, {"a": corrected, "b": {"threshold": 1.3}, "c": {"threshold": 1.0}}, tmp_path)
    assert claims()["a"] == {**corrected, "since": "2020-01-01T00:00:00+00:00"}, "the source is not what is tested"
    assert claims()["b"]["threshold"] == 1.3 and claims()["b"]["since"] > "2026", "a changed claim is a new one"
    assert claims()["c"]["since"] > "2026"


@pytest.mark.parametrize(
    "name, status, code",
    [("SIGTERM", "finished", 75), ("SIGINT", "running", 75), ("SIGABRT", "finished", 1), ("SIGABRT", "running", 1)],
)
def test_an_arm_that_a_signal_ends_before_it_began_keeps_its_status(tmp_path, monkeypatch, name, status, code):
    """The signal comes while Python starts: no handler is set yet."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, signal\nsignal.signal(signal.{name}, signal.SIG_DFL)\nos.kill(os.getpid(), signal.{name})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = {"status": status, "why": "", "step": 8}
    (tmp_path / "s" / "a").mkdir(parents=True)
    (tmp_path / "s" / "a" / "status.json").write_text(json.dumps(said))
    assert launch.sweep({"a": {"steps": 8}}, {}, tmp_path / "s") == code
    found = json.loads((tmp_path / "s" / "a" / "status.json").read_text())
    if name == "SIGABRT" and status == "running":
        assert found["status"] == "failed" and "killed by SIGABRT" in found["why"]
    else:
        assert found == said


def test_a_study_trains_its_settings_and_says_before_how_long_it_takes(text, cache, tmp_path):
    flags = [*SMALL, f"--config.base.data.name=text:{text}", f"--config.base.data.cache={cache}"]
    words = ["scripts.sweep", f"--workdir={tmp_path / 's'}", "--config=configs/studies.py:replication", *flags]
    arms = ["causal-softmax/rotary", "causal-softmax/none", "masked-performer/rotary"]
    done = call(*words, f"--only={','.join(arms)}")
    assert done.returncode == 0, done.stderr
    before, _, _ = done.stderr.partition("[1/3]")
    assert "causal-softmax" in before and "masked-performer" in before and "training left, by a step" in before
    about = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert about["seconds_per_step"].keys() == {"causal-softmax", "masked-performer"}
    assert all(each["seconds"] > 0 for each in about["seconds_per_step"].values()), about
    assert len(about["claims"]) == len(studies.CLAIMS["replication"])
    for arm in arms:
        assert json.loads((tmp_path / "s" / arm / "status.json").read_text())["status"] == "finished"
        assert (tmp_path / "s" / "plan" / f"{arm}.json").exists()
    again = call(*words, f"--only={','.join(arms)}")
    assert again.returncode == 0 and "3 arms, about 0 s of training left" in again.stderr
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["claims"] == about["claims"]
    report = call("scripts.report", tmp_path / "s", f"--out={tmp_path / 'r'}")
    assert report.returncode == 0, report.stderr
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert {each["setting"] for each in summary["settings"]} == {"causal-softmax", "masked-performer"}
    assert not [text for text in summary["warnings"] if "finished" not in text], summary["warnings"]
    assert [each["late"] for each in summary["claims"]] == [False] * len(about["claims"])


def test_time_prints_the_seconds_of_a_step_and_keeps_nothing(text, cache, tmp_path):
    small = [flag.replace("config.base", "config") for flag in SMALL]
    flags = [*small, f"--config.data.name=text:{text}", f"--config.data.cache={cache}"]
    done = call("scripts.train", "--config=configs/lm.py", "--time", f"--workdir={tmp_path / 'w'}", *flags)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 60 and not Path(tmp_path / "w").exists() and ROOT.exists()


def test_dry_prints_every_arm_and_then_refuses_what_does_not_fit(text, cache, monkeypatch, capsys):
    sweep = ablation.get_config(f"quick,data=text:{text}")
    sweep.base.data.update({"length": 16, "batch": 4, "cache": cache})
    arms = launch.expand(entry.plain(sweep), ["none", "rotary"])
    launch.show_plan(arms)
    monkeypatch.setattr(run, "capacity", lambda _: 2_000_000)
    capsys.readouterr()
    with pytest.raises(
        Refusal, match=r"none, rotary: a step needs about 0\.\d GB on one device of 0\.0 GB: lower data"
    ):
        launch.show_plan(arms)
    said = capsys.readouterr().out
    assert "none" in said and "rotary" in said and "nothing was trained" in said
    with pytest.raises(Refusal, match="a step needs about"):
        run.plan(arms["none"])


def test_dry_of_a_billion_parameters_says_what_it_would_need():
    """Its batch is one that no machine's memory holds."""
    words = ["--config=configs/lm.py:scale=1b,data=probe:copy", "--config.data.batch=4096", "--dry"]
    done = call("scripts.train", *words)
    assert done.returncode == 2, done.stderr
    assert "1,007,769,600" in done.stdout and "GB on 1, 8" in done.stdout and "nothing was trained" in done.stdout
    assert re.fullmatch(
        r"error: this run: a step needs about \d{3,}\.\d GB on one device of .* GB: lower data.batch \(4096\) .*\n",
        done.stderr,
    ), done.stderr
