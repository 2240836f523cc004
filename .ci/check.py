"""Holds the report of a small quick sweep against what every report has: python .ci/check.py REPORT"""

import json
import math
import sys
from pathlib import Path

report = Path(sys.argv[1])
summary = json.loads((report / "summary.json").read_text())
arms = {arm["arm"]: arm for arm in summary["arms"]}
assert set(arms) == {"none", "learned", "sinusoidal", "relative_bias", "rotary"}, sorted(arms)
for name, arm in arms.items():
    assert arm["status"] == "finished", (name, arm["status"])
    assert arm["seeds"] == [0, 1], (name, arm["seeds"])
    assert math.isfinite(arm["final_nats"]["mean"]), name
    assert arm["final_nats"]["mean"] < min(arm["first_nats"].values()), f"{name} did not learn"
    assert arm["tokens_per_second"] > 0, name
    if name != "rotary":
        over = arm["speedup_of_rotary"]
        assert over["low"] <= over["mean"] <= over["high"], (name, over)
        assert over["verdict"] in ("supported", "refuted", "equivalent", "inconclusive"), name
assert not summary["warnings"], summary["warnings"]
page = (report / "index.html").read_text()
assert "http-equiv" not in page and "<script" not in page and 'src="' not in page, "the page is not self-contained"
for name in ("loss", "speedup", "profile"):
    assert (report / "figures" / f"{name}.svg").stat().st_size > 1000, name
    assert (report / "figures" / f"{name}.png").stat().st_size > 1000, name
print("summary.json, figures and page: as they should be")
