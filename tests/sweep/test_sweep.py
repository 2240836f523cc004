"""Sweeps that really train."""

import json
from pathlib import Path

import pytest

from configs import studies
from rope_lm import loop, settings
from rope_lm.provenance import provenance
from rope_lm.sweep.arms import expand
from rope_lm.sweep.main import sweep
from rope_lm.sweep.pool import Local
from scripts import entry
from tests.commands import fork
from tests.test_scripts import SMALL


class InProcess(Local):
    """Trains in this process, which has compiled programs and imported JAX already."""

    def measure(self, arm: str) -> float:
        return 0.5

    def train(self, names: list[str], seconds_left: dict[str, float]) -> dict[str, int]:
        origin = provenance(["test"], {})
        configs = {arm: json.loads((self.root / "plan" / f"{arm}.json").read_text()) for arm in names}
        ended = {arm: loop.train(settings.tuples(config), self.root / arm, origin) for arm, config in configs.items()}
        return {arm: 0 if status["status"] == "finished" else 1 for arm, status in ended.items()}


@pytest.mark.all
def test_the_arms_of_a_study_are_trained_and_reported_by_setting(text, cache, tmp_path):
    study = studies.get_config("replication")
    study.base.steps, study.base.seeds = 4, (0, 1)
    study.base.every.update({"evaluate": 2, "log": 2, "save": 4})
    study.base.data.update({"name": f"text:{text}", "cache": cache, "length": 16, "batch": 4, "validation_rows": 4})
    study.base.model.update({"width": 16, "layers": 1, "hidden": 32})
    names = ["causal-softmax/rotary", "causal-softmax/none", "masked-performer/rotary"]
    arms = expand(entry.plain(study), names)
    assert sweep(arms, entry.plain(study)["claims"], tmp_path / "s", InProcess(tmp_path / "s", 1, [])) == 0
    about = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert about["seconds_per_step"].keys() == {"causal-softmax", "masked-performer"}
    assert len(about["claims"]) == len(studies.CLAIMS["replication"])
    report = fork("scripts.report", tmp_path / "s", f"--out={tmp_path / 'r'}")
    assert report.returncode == 0, report.stderr
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert {setting["setting"] for setting in summary["settings"]} == {"causal-softmax", "masked-performer"}
    assert [claim["late"] for claim in summary["claims"]] == [False] * len(about["claims"])


def test_time_prints_the_seconds_of_a_step_and_keeps_nothing(text, cache, tmp_path):
    small = [flag.replace("config.base", "config") for flag in SMALL]
    flags = [*small, f"--config.data.name=text:{text}", f"--config.data.cache={cache}"]
    done = fork("scripts.train", "--config=configs/lm.py", "--time", f"--workdir={tmp_path / 'w'}", *flags)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 60 and not Path(tmp_path / "w").exists()
