"""Runs of earlier versions are read under today's names."""

import shutil
from pathlib import Path

import pytest

from configs import resolved
from rope_lm import loop, migrate, run_directory, trained
from rope_lm.analysis import load_all
from rope_lm.generate import generate
from rope_lm.verification import verify
from scripts import entry

OLD = Path(__file__).parent / "goldens" / "run_275d45d"  # two members, six steps of yarn on probe:copy


@pytest.fixture
def old(tmp_path) -> Path:
    """A copy of a run directory that commit 275d45d wrote."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_every_renamed_key_gets_its_new_name():
    for before, after in migrate.CONFIG.items():
        section, _, key = before.rpartition(".")
        assert migrate.config({key: 1}, section)[after.rpartition(".")[2]] == 1
        assert migrate.config({after.rpartition(".")[2]: 1}, section) == migrate.config({key: 1}, section)


def test_a_config_of_todays_stays_as_it_is(old):
    config, manifest, _ = run_directory.read(old)
    assert config["optimizer"]["name"] == "adamw" and config["model"]["head_size"] is None
    assert migrate.config(config) == config and migrate.manifest(manifest) == manifest


def test_names_in_the_history_of_a_manifest_are_todays():
    segments = [{"step": 0, "changed": {}}, {"step": 4, "changed": {"optimizer.rate": [[1], [2]], "steps": [4, 8]}}]
    manifest = migrate.manifest({"segments": segments, "overrides": {"data.validation": 4}})
    assert manifest["segments"][1]["changed"] == {"optimizer.learning_rate": [[1], [2]], "steps": [4, 8]}
    assert manifest["overrides"] == {"data.validation_rows": 4}


def test_an_old_run_goes_on_and_is_verified_analysed_and_used(old, capfd):
    assert not [finding for finding in verify(old) if finding.wrong]
    config = entry.plain(resolved.get_config(str(old / "config.json")))
    assert loop.train(config, old, {})["step"] == 6, "it is finished"
    config["steps"] = 8
    assert loop.train(config, old, {})["status"] == "finished"
    config, manifest, _ = run_directory.read(old)
    assert manifest["segments"][1]["step"] == 6 and manifest["segments"][1]["changed"] == {"steps": [6, 8]}
    assert all(
        "learning_rate" in row for row in run_directory.read_rows(old / "metrics.jsonl") if row["split"] == "train"
    )
    assert not [finding for finding in verify(old) if finding.wrong]
    (sweep,) = load_all(old)
    assert [curve.steps.tolist() for curve in sweep.runs[0].curves] == [[0, 3, 6, 8]] * 2
    run = trained.load(old)
    assert run.step == 8 and run.seeds == (0, 1)
    assert len(list(generate(run.models[1], [1, 2], count=3, temperature=0.0, top_p=1.0, seed=0))) == 3
