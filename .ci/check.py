"""Holds the report of a small sweep against what every report has: python .ci/check.py [--studies] REPORT"""

import json
import math
import sys
from pathlib import Path

report = Path(sys.argv[-1])
summary = json.loads((report / "summary.json").read_text())
page = (report / "index.html").read_text()
verdicts = ("supported", "refuted", "equivalent", "inconclusive")


def check_quick() -> None:
    arms = {arm["arm"]: arm for arm in summary["arms"]}
    assert set(arms) == {"none", "learned", "sinusoidal", "relative_bias", "rotary"}, sorted(arms)
    for name, arm in arms.items():
        assert arm["status"] == "finished", (name, arm["status"])
        assert arm["seeds"] == [0, 1], (name, arm["seeds"])
        assert math.isfinite(arm["final_nats"]["mean"]), name
        assert arm["final_nats"]["mean"] < min(arm["first_nats"].values()), f"{name} did not learn"
        assert arm["tokens_per_second"] > 0, name
        if name != "rotary":
            over = arm["speedup"]
            assert over["low"] <= over["mean"] <= over["high"], (name, over)
            assert over["verdict"] in verdicts, name
    assert not summary["warnings"], summary["warnings"]


def check_studies() -> None:
    assert {run["sweep"] for run in summary["runs"]} == {"replication", "tuned", "sizes", "embedding_scale"}
    assert all(run["status"] == "finished" for run in summary["runs"]), summary["runs"]
    settings = {(arm["sweep"], arm["setting"]) for arm in summary["arms"]}
    assert {name for sweep, name in settings if sweep == "replication"} == {
        "causal-softmax", "causal-performer", "masked-softmax", "masked-performer"
    }  # fmt: skip
    tested = [claim for claim in summary["claims"] if claim["verdict"] != "not tested"]  # of arms that --only left out
    assert len(tested) >= 8 and all(claim["verdict"] in verdicts for claim in tested), summary["claims"]
    assert not any(claim["late"] for claim in summary["claims"]), "claims were written before their runs"
    assert {row["arm"].rpartition("/")[2] for row in summary["tuning"]} >= {"rotary", "sinusoidal"}


(check_studies if "--studies" in sys.argv else check_quick)()
assert "http-equiv" not in page and "<script" not in page and 'src="' not in page, "the page is not self-contained"
for name in ("loss", "speedup", "profile"):
    for drawing in [path for path in (report / "figures").glob(f"*{name}.*")] or [report / "figures" / f"{name}.svg"]:
        assert drawing.stat().st_size > 1000, drawing
print("summary.json, figures and page: as they should be")
