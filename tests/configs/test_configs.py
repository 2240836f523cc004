"""Configs: what a string picks, how flags change it, what a sweep expands to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import ablation, lm, resolved
from configs.presets import ATTENTIONS, BLOCKS, FOR_FEATURES, OBJECTIVES, POSITIONS, SCALES
from rope_lm import attention, objective, optimizer, positional, sharding, training
from rope_lm.refusal import Refusal
from rope_lm.sweep.arms import expand
from scripts import entry

ROOT = Path(__file__).parents[2]


def test_the_documented_keys_are_there():
    config = lm.get_config("position=rotary,data=stdlib,scale=tiny")
    assert {"steps", "seeds", "data", "model", "optimizer", "every"} <= set(config)
    assert {"name", "batch", "length"} <= set(config.data)
    assert {"width", "heads", "layers", "position"} <= set(config.model)
    assert {"evaluate", "save", "log"} <= set(config.every)
    assert {"tiny", "small", "gpt2"} <= set(SCALES)


def test_the_tables_of_configs_and_library_have_the_same_keys():
    assert set(POSITIONS) == set(positional.ENCODINGS)
    assert set(OBJECTIVES) == set(objective.OBJECTIVES)
    assert set(ATTENTIONS) == set(attention.ATTENTIONS)


@pytest.mark.parametrize("name", sorted(POSITIONS))
def test_every_section_is_the_arguments_of_its_function(name):
    """A section with a missing or an unknown key, or an optimizer that is in no table, is refused."""
    words = f"position={name},attention={'performer' if name in FOR_FEATURES else 'softmax'}"
    config = entry.plain(lm.get_config(words))
    spec = training.specify(config, vocabulary=257, members=1, mesh=sharding.make(1, 1, 1, 1))
    assert config["optimizer"]["name"] in optimizer.OPTIMIZERS
    assert spec.optimizer.learning_rate == config["optimizer"]["learning_rate"]
    config["optimizer"]["momentum"] = 0.9
    with pytest.raises(Refusal, match="unknown key in optimizer 'momentum'"):
        training.specify(config, vocabulary=257, members=1, mesh=sharding.make(1, 1, 1, 1))


@pytest.mark.parametrize("home, cache", [
    ("", "~/.cache/rope_lm"), ("/mine", "/mine/rope_lm"), ("not/absolute", "~/.cache/rope_lm"),
])  # fmt: skip
def test_prepared_text_is_where_the_user_keeps_caches(home, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert lm.get_config().data.cache == cache


def test_a_head_has_width_over_heads_components_unless_its_size_is_set():
    config = lm.get_config("")

    def head_size() -> int:
        plain = entry.plain(config)
        return training.specify(plain, vocabulary=257, members=1, mesh=sharding.make(1, 1, 1, 1)).abstract.head_size

    assert config.model.head_size is None and head_size() == config.model.width // config.model.heads
    config.model.heads = 3
    with pytest.raises(Refusal, match=r"width=64 is not divisible by model.heads=3.*unless model.head_size is set"):
        head_size()
    config.model.head_size = 24
    assert head_size() == 24


@pytest.mark.parametrize("name", sorted(POSITIONS))
def test_a_string_picks_the_encoding_and_its_row(name):
    config = entry.plain(lm.get_config(f"position={name}"))
    row = dict(POSITIONS[name])
    row |= {key: config["data"]["length"] for key in ("limit", "trained_length") if key in row}
    assert config["model"]["position"] == {"name": name, **row}


def test_the_limit_of_learned_positions_follows_the_length():
    config = lm.get_config("position=learned")
    config.data.length = 96
    assert config.model.position.limit == 96
    sweep = ablation.get_config("quick")
    sweep.base.data.length = 48
    assert expand(entry.plain(sweep), None)["learned"]["model"]["position"]["limit"] == 48


def test_the_hidden_width_follows_the_width_unless_it_is_set():
    config = lm.get_config("scale=tiny")
    config.model.width = 96
    assert entry.plain(config)["model"]["hidden"] == 384
    config.model.hidden = 100
    assert entry.plain(config)["model"]["hidden"] == 100


def test_a_block_is_its_row_and_one_of_three_matrices_has_as_many_parameters():
    for name, row in BLOCKS.items():
        assert entry.plain(lm.get_config(f"block={name}"))["model"]["block"] == row
    config = lm.get_config("block=llama,scale=gpt2")
    assert entry.plain(config)["model"]["hidden"] == 2048 == 768 * 4 * 2 // 3
    config.model.width = 64
    assert entry.plain(config)["model"]["hidden"] == 168


@pytest.mark.parametrize(
    "text, words",
    [
        ("position=rotery", "unknown position 'rotery': did you mean rotary"),
        ("block=lama", "unknown block 'lama': did you mean llama"),
        ("scale=tny", "unknown scale 'tny': did you mean tiny"),
        ("postion=rotary", "unknown key before '=' in the config string 'postion': did you mean position"),
        ("rotary", "expected key=value"),
    ],
)
def test_a_mistake_in_the_string_is_one_line(text, words):
    with pytest.raises(Refusal, match=words):
        lm.get_config(text)


def test_a_path_may_hold_commas(tmp_path):
    assert lm.get_config("data=text:/a,b/c.txt,scale=tiny").data.name == "text:/a,b/c.txt"
    path = tmp_path / "runs,lr=1,seed=2" / "a=b.txt"
    with pytest.raises(Refusal, match=r"unknown key before '=' in the config string 'seed'.*; and there is no file '/"):
        lm.get_config(f"data=text:{path},scale=tiny")
    path.parent.mkdir()
    path.touch()
    config = lm.get_config(f"position=alibi,data=text:{path},scale=tiny")
    assert config.data.name == f"text:{path}" and config.model.position.name == "alibi" and config.model.width == 128
    with pytest.raises(Refusal, match="'postion': did you mean position"):
        lm.get_config(f"data=text:{path},postion=alibi")
    with pytest.raises(Refusal, match=r"'': .*allowed"):
        lm.get_config("=alibi")


@pytest.mark.parametrize("name", sorted(ablation.SWEEPS))
def test_the_arms_of_a_sweep_differ_in_encoding_and_rate_alone(name):
    arms = expand(entry.plain(ablation.get_config(name)), None)
    assert set(arms) <= set(positional.ENCODINGS) and len(arms) >= 5
    stripped = []
    for config in arms.values():
        config["model"] = {key: value for key, value in config["model"].items() if key != "position"}
        config["optimizer"] = {key: value for key, value in config["optimizer"].items() if key != "learning_rate"}
        stripped.append(config)
    assert all(config == stripped[0] for config in stripped)


def test_tuning_and_comparison_share_no_seed_and_everything_else():
    quick, tuning = (entry.plain(ablation.get_config(name))["base"] for name in ("quick", "tuning"))
    assert not set(quick.pop("seeds")) & set(tuning.pop("seeds"))
    quick["optimizer"].pop("learning_rate"), tuning["optimizer"].pop("learning_rate")
    assert quick == tuning
    assert set(ablation.TUNED.values()) <= set(ablation.RATES)


def test_each_arms_rate_is_the_archived_grids_best():
    archive = json.loads((ROOT / "results" / "tuning" / "summary.json").read_text())
    assert {row["arm"]: row["best"] for row in archive["tuning"]} == ablation.TUNED
    tuning = entry.plain(ablation.get_config("tuning"))["base"]
    for row in archive["tuning"]:
        assert tuple(row["rates"]) == tuning["optimizer"]["learning_rate"] and row["seeds"] == len(tuning["seeds"])
        assert min(row["final_nats"]) == row["final_nats"][row["rates"].index(row["best"])]


def test_a_sweep_takes_another_scale_and_text():
    sweep = entry.plain(ablation.get_config("tuning,scale=tiny,data=text:/a"))
    assert (
        sweep["base"]["model"]["width"] == SCALES["tiny"]["model"]["width"]
        and sweep["base"]["data"]["name"] == "text:/a"
    )
    assert sweep["arms"]["learned"]["model"]["position"]["limit"] == SCALES["tiny"]["data"]["length"]


def test_only_names_arms():
    sweep = entry.plain(ablation.get_config("quick"))
    assert list(expand(sweep, ["rotary", "none"])) == ["none", "rotary"]
    with pytest.raises(Refusal, match="unknown arm in --only 'rotry': did you mean rotary"):
        expand(sweep, ["rotry"])
    with pytest.raises(Refusal, match="a sweep has base, arms and claims"):
        expand(entry.plain(lm.get_config("")), None)
    sweep["arms"]["rotary"]["model"]["widht"] = 3
    with pytest.raises(Refusal, match=r"key that arm rotary changes 'model.widht'"):
        expand(sweep, None)


def test_a_resolved_config_is_the_config_again(tmp_path):
    config = entry.plain(lm.get_config("position=learned"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert entry.plain(resolved.get_config(str(tmp_path / "config.json"))) == config
    with pytest.raises(Refusal, match=r"cannot be read .*name the config.json of a run"):
        resolved.get_config(str(tmp_path / "none.json"))


def test_configs_load_without_jax():
    code = "import configs.lm, configs.ablation, configs.resolved, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
