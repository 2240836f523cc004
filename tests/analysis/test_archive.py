"""Archives: new ones hold all that a report shows, and those of earlier versions give the numbers that they gave."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from rope_lm import migrate
from rope_lm.analysis import fairness, load, load_all, tables, tune
from rope_lm.analysis.findings import gather
from rope_lm.analysis.summary import summarize
from rope_lm.refusal import Refusal
from tests.analysis.conftest import (
    BEGAN,
    html,
    summary,
    write_archive,
    write_claim,
    write_report,
    write_run,
)

RESULTS = Path(__file__).parents[2] / "results"
ARCHIVES = sorted(path.parent.name for path in RESULTS.glob("*/summary.json"))
# Archives whose summary.json was written together with the grid of another archive.
BESIDE = {"quick": ["tuning"], "quick_h200": ["tuning"]}
# Words, and what an archive of the first schema has no data for.
NOT_RECOMPUTED = {"command", "methods", "warnings", "beyond"}


def measure(folder: Path) -> None:
    """Write the measurements of a finished run: per document, beyond the trained length, by distance."""
    rows = [
        {
            "multiple": multiple,
            "scaling": "",
            "seeds": [0, 1],
            "apart": [1.5, 1.6],
            "sliding": [1.4, 1.5],
            "positions": [1.0, 64.0, 128.0 * multiple],
            "by_position": [[3.0, 2.0, 1.5], [3.1, 2.1, 1.6]],
        }
        for multiple in (1, 2)
    ]
    written = {
        "documents": {"schema": 1, "step": 1000, "tokens": [3, 4], "nats": [[6.0, 8.0], [6.5, 8.5]]},
        "extrapolation": {"schema": 1, "length": 128, "rows": rows},
        "distance": {"schema": 1, "edges": [0, 1, 2], "mass": [[[[0.7, 0.3]]]] * 2, "mean": [[[0.3]]] * 2},
    }
    for name, value in written.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def test_the_report_of_an_archive_is_the_report_of_its_runs(tmp_path: Path) -> None:
    """All files are equal byte by byte, except that the page names its command. The grid is given without its runs."""
    study = tmp_path / "study"
    for arm, speed in (("rotary", 2.0), ("learned", 1.0)):
        measure(write_run(study / "causal-softmax" / arm, arm, speed, (0, 1)))
    write_claim(study, setting="causal-softmax")
    write_run(tmp_path / "runs" / "causal-softmax" / "rotary", "rotary", 1, (100, 101), (1e-3, 3e-3))
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "summary.json").write_text(json.dumps(summary(load(tmp_path / "runs"))))
    write_report(tmp_path / "out", load(study), load(tmp_path / "grid"))
    write_report(tmp_path / "again", *load_all(tmp_path / "out"))
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")]
    names = {path.stem for path in files}
    assert {"causal-softmax-beyond", "causal-softmax-position", "causal-softmax-heads", "runs", "index"} <= names
    for path in files:
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


def test_an_archive_holds_measurements_and_the_curves_of_grids(tmp_path: Path) -> None:
    measure(write_run(tmp_path / "s" / "rotary", "rotary", 2, (0, 1)))
    write_run(tmp_path / "g" / "rotary", "rotary", 1, (100, 101), (1e-3, 3e-3))
    sweep, grid = load(tmp_path / "s"), load(tmp_path / "g")
    archived = load_all(write_archive(tmp_path / "archive", sweep, grid))
    assert json.loads((tmp_path / "archive" / "runs.json").read_text())["schema"] == 2
    assert archived[0].runs[0].measured == sweep.runs[0].measured
    assert set(sweep.runs[0].measured) == {"documents", "extrapolation", "distance"}
    assert [curve.nats.tolist() for curve in archived[1].runs[0].curves] == [
        curve.nats.tolist() for curve in grid.runs[0].curves
    ]
    assert tune(archived[1]) == tune(grid)


def test_a_grid_may_be_given_as_its_summary_alone(tmp_path: Path) -> None:
    for setting in ("a", "b"):
        write_run(tmp_path / "grid" / setting / "rotary", "rotary", 1, (100, 101), (1e-3, 3e-3))
        write_run(tmp_path / "grid" / setting / "none", "none", 1, (100, 101), (3e-3, 1e-2))
    grid, alone = load(tmp_path / "grid"), tmp_path / "alone"
    alone.mkdir()
    (alone / "summary.json").write_text(json.dumps(summary(grid)))
    assert tune(load(alone)) == tune(grid)
    assert [text.replace("grid", "alone") for text in fairness.warnings([grid])] == fairness.warnings([load(alone)])
    assert "diverged" not in html(load(alone))
    (alone / "summary.json").write_text('{"tuning": [{"arm": "rotary"}]}')
    with pytest.raises(Refusal, match=r"summary.json holds no learning-rate grid of a report"):
        load(alone)


def test_an_archive_of_several_sweeps_a_damaged_and_a_later_one_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "s" / "rotary", "rotary", 2)
    write_run(tmp_path / "t" / "rotary", "rotary", 2)
    folder = write_archive(tmp_path / "archive", load(tmp_path / "s"), load(tmp_path / "t"))
    with pytest.raises(Refusal, match=r"is the archive of several sweeps .s, t.: use load_all"):
        load(folder)
    later = json.loads((folder / "runs.json").read_text()) | {"schema": 3}
    (folder / "runs.json").write_text(json.dumps(later))
    with pytest.raises(Refusal, match=r"runs.json has schema 3, this version reads up to 2"):
        load_all(folder)
    for damaged in ('{"sweeps": [{"name": "x"}]}', '{"schema": 2, "sweeps": [{"name": "x"}]}', "[]"):
        (folder / "runs.json").write_text(damaged)
        with pytest.raises(Refusal, match=r"runs.json is not an archive that a report wrote"):
            load_all(folder)


def test_an_archive_names_no_machine_and_no_command(tmp_path: Path) -> None:
    secret = {"argv": ["/home/me/x"], "host": "mine", "overrides": {"a": "/home/me"}}
    write_run(tmp_path / "s" / "rotary", "rotary", 1, manifest=secret)
    text = (write_archive(tmp_path / "out", load(tmp_path / "s")) / "runs.json").read_text()
    assert "/home/me" not in text and "mine" not in text and BEGAN in text


# --- archives of earlier versions -----------------------------------------------------------------------------------


def disagreements(archived: Any, ours: Any, at: str = "") -> list[str]:
    """Return the places where a value of the archive is another one here, or missing."""
    if isinstance(archived, dict):
        keys = [key for key in archived if key not in NOT_RECOMPUTED]
        return [text for key in keys for text in disagreements(archived[key], (ours or {}).get(key), f"{at}.{key}")]
    if isinstance(archived, list) and isinstance(ours, list) and len(archived) == len(ours):
        return [
            text
            for i, pair in enumerate(zip(archived, ours, strict=True))
            for text in disagreements(*pair, f"{at}[{i}]")
        ]
    number = isinstance(archived, float) and isinstance(ours, float)
    same = ours == pytest.approx(archived, rel=1e-9) if number else archived == ours
    return [] if same else [f"{at}: {archived!r} in the archive, {ours!r} here"]


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_in_results_gives_its_numbers(name: str) -> None:
    """Every number of its summary.json, and every cell of its tables, is computed from the archived curves."""
    old = migrate.summary(json.loads((RESULTS / name / "summary.json").read_text()))
    sweeps = [sweep for folder in (name, *BESIDE.get(name, [])) for sweep in load_all(RESULTS / folder)]
    findings = gather(sweeps, old.get("treatment", "rotary"), "")
    if name in BESIDE:  # it counts the seeds of the grid and does not name them
        assert not any(row.pop("seeds") for row in old["tuning"])
    if not (RESULTS / name / "runs.json").exists():  # a grid whose runs were not archived
        old = {key: old[key] for key in ("schema", "treatment", "tuning")}
    assert disagreements(old, summarize(findings)) == []
    shown = [*map(tables.numbers, findings.comparisons), tables.claims(findings.claims)]
    cells = {cell.rpartition("/")[2] for table in shown for row in table.lines for cell in row}
    for path in RESULTS.glob(f"{name}/*.csv"):
        rows = list(csv.reader(path.open(encoding="utf-8")))[1:]
        assert {cell.rpartition("/")[2] for row in rows for cell in row} <= cells, path


def test_the_archives_in_results_have_a_page() -> None:
    page = html(*(sweep for name in ARCHIVES for sweep in load_all(RESULTS / name)))
    for words in ('<b class="supported">', "tuned: causal-softmax", "1 x NVIDIA H200 (gpu)", "(kernel: xla)"):
        assert words in page, words
    assert "unknown" not in page.split("<h2>Methods</h2>")[1].split("<h2>")[0]
