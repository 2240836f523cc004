"""Arms of a sweep: configs, settings and dated claims."""

import json

import pytest

from configs import studies
from rope_lm.refusal import Refusal
from rope_lm.sweep.arms import date_claims, digest, expand, setting
from scripts import entry

STUDIES = sorted(studies.STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_arms_of_a_setting_differ_in_encoding_and_rate_alone(name):
    alike: dict[str, list] = {}
    for arm, config in expand(entry.plain(studies.get_config(name)), None).items():
        config["model"] = {key: value for key, value in config["model"].items() if key != "position"}
        config["optimizer"] = {key: value for key, value in config["optimizer"].items() if key != "learning_rate"}
        alike.setdefault(setting(arm), []).append(config)
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
        assert rate in arm["optimizer"]["learning_rate"] == studies.RATES[setting(name)], name


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
    assert {setting(name) for name in expand(study, ["masked-softmax"])} == {"masked-softmax"}
    assert list(expand(study, ["causal-softmax/rotary"])) == ["causal-softmax/rotary"]
    everywhere = expand(study, ["rotary"])
    assert len(everywhere) == 4 and {name.rpartition("/")[2] for name in everywhere} == {"rotary"}
    with pytest.raises(Refusal, match="unknown arm in --only 'masked-sofmax': did you mean masked-softmax"):
        expand(study, ["masked-sofmax"])


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
    assert expand(sweep, None) == {"s/a": expected}
    assert sweep["base"]["objective"] == {"name": "causal"}, "the base stays as it is"


def test_an_override_of_the_base_reaches_every_arm_or_is_refused():
    base = {"steps": 4, "optimizer": {"learning_rate": (1.0,)}, "model": {"position": {"name": "none"}}}
    arms = {"a": {"optimizer": {"learning_rate": (2.0,)}}, "b": {}, "s/c": {"model": {"position": {"name": "learned"}}}}
    sweep = {"base": base, "arms": arms, "claims": {}}

    def names(*overrides: str, only: list[str] | None = None) -> list[str]:
        return list(expand(sweep, only, overrides))

    assert names("base.steps", "arms.a.optimizer.learning_rate") == ["a", "b", "s/c"]
    assert names("base.optimizer.learning_rate", only=["b", "s/c"]) == ["b", "s/c"], "of the chosen arms alone"
    with pytest.raises(
        Refusal, match=r"does not reach arms a, which .*: set it by --config.arms.ARM.optimizer.learning_rate"
    ):
        names("base.optimizer.learning_rate")
    with pytest.raises(
        Refusal, match=r"base.model.position.name does not reach arms s/c, .* set it in the sweep's function"
    ):
        names("base.model.position.name")
    arms["a"]["optimizer"]["learning_rate"] = (1.0,)
    assert names("base.optimizer.learning_rate") == ["a", "b", "s/c"], "the same value"


def test_a_claim_keeps_the_time_at_which_it_was_first_seen():
    old = "2020-01-01T00:00:00+00:00"
    before = {"a": {"threshold": 1.0, "since": old}, "b": {"threshold": 1.0, "since": old}}
    corrected = {"threshold": 1.0, "source": "another paper"}
    claims = date_claims({"a": corrected, "b": {"threshold": 1.3}, "c": {"threshold": 1.0}}, before)
    assert claims["a"] == {**corrected, "since": old}, "the source is not what is tested"
    assert claims["b"]["threshold"] == 1.3 and claims["b"]["since"] > "2026", "a changed claim is a new one"
    assert claims["c"]["since"] > "2026" and claims["c"]["since"].endswith("+00:00")


def test_a_step_is_measured_again_where_something_but_the_encoding_changes():
    config = next(iter(expand(entry.plain(studies.get_config("sizes")), None).values()))
    known = digest(config, 1)
    assert digest({**config, "model": {**config["model"], "position": {"name": "none"}}}, 1) == known
    assert digest({**config, "steps": 7}, 1) == known
    assert digest(config, 2) != known
    for section, key in (("data", "batch"), ("model", "width"), ("optimizer", "accumulation_steps")):
        assert digest({**config, section: {**config[section], key: 7}}, 1) != known
