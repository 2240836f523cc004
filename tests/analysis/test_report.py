"""Reports of run directories: numbers, files, the page, refusals and warnings."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.presets import BLOCKS
from rope_lm import analysis
from rope_lm.analysis import compare, figures, load, methods, report, tables, tune
from rope_lm.analysis.figures import drawn
from rope_lm.analysis.findings import gather
from rope_lm.analysis.summary import summarize
from rope_lm.refusal import Refusal
from tests.analysis.conftest import (
    MANIFEST,
    STEPS,
    find,
    html,
    only,
    set_status,
    summary,
    write_claim,
    write_report,
    write_run,
    write_study,
    write_sweep,
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of write_sweep. Read only."""
    return write_sweep(tmp_path_factory.mktemp("shared") / "sweep")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The summary and folder of a report on a study of two settings and its grid. Read only."""
    folder = tmp_path_factory.mktemp("study")
    study = write_study(folder / "study")
    rates = (1e-3, 3e-3, 1e-2)

    def loss(step: int, seed: int, rate: float) -> float:
        return 1 + 5 / (1 + 2 * np.exp(-abs(np.log(rate / 3e-3))) * step / 50)

    for name in ("rotary", "learned"):
        write_run(folder / "grid" / "causal-softmax" / name, name, loss, (100, 101), rates)
    write_claim(study, setting="causal-softmax")
    write_claim(study, setting="causal-softmax", baseline="sinusoidal", treatment="learned")
    write_claim(study, setting="masked-softmax", since="2027-01-01T00:00:00+00:00")
    return write_report(folder / "out", load(study), load(folder / "grid")), folder / "out"


# --- numbers --------------------------------------------------------------------------------------------------------


def test_speedups_are_the_ratios_of_the_speeds(shared: Path) -> None:
    arms = compare(load(shared), "rotary")
    assert arms["rotary"].speedup is None
    # Loss is a function of speed * step, so the true speed-up is the ratio of speeds; interpolation adds a little.
    for name, expected in {"learned": 2.0, "sinusoidal": 2 / 1.7, "relative_bias": 1.0, "none": 4.0}.items():
        assert arms[name].speedup.mean == pytest.approx(expected, rel=0.03), name
    assert arms["learned"].speedup.verdict == "supported"
    assert arms["none"].overhead == 0 and arms["rotary"].overhead == pytest.approx(0.5 / 2 - 1)
    found = arms["learned"].contrast.costs
    assert found.seconds.mean == pytest.approx(found.steps.mean * 2, rel=0.01)
    assert found.flops.mean == pytest.approx(found.steps.mean)
    assert [arm.name for arm in arms][-1] == "none", "the best comes first"


def test_the_profile_reaches_from_loose_targets_to_the_final_one(shared: Path) -> None:
    arm = compare(load(shared), "rotary")["learned"]
    profile = arm.contrast.profile
    targets = [speedup.target for speedup in profile]
    assert targets == sorted(targets, reverse=True) and targets[-1] == pytest.approx(arm.target)
    assert profile[-1].mean == pytest.approx(arm.speedup.mean)


def test_the_summary_has_the_numbers_of_every_arm(shared: Path) -> None:
    made = summary(load(shared))
    arm = only([arm for arm in made["arms"] if arm["arm"] == "learned"])
    for key in ("encoding", "seeds", "final_nats", "steps_to_target", "tokens_per_second", "parameters"):
        assert arm[key] is not None, key
    assert {"mean", "low", "high"} <= set(arm["final_nats"])
    assert {"mean", "low", "high", "p", "verdict"} <= set(arm["speedup"]) and arm["treatment"] == "rotary"
    assert {"in_seconds", "in_flops", "to_median", "to_common"} <= set(arm["speedup"])
    assert set(arm["gap"]) == {"final", "area"} and set(arm["steps_to_target"]) == {"target", "own", "treated"}
    assert arm["seeds"] == [0, 1, 2] and arm["first_nats"]["0"] == 6.0 and arm["learning_rate"] == 3e-3


def test_the_keys_of_the_summary_do_not_depend_on_the_treatment(shared: Path) -> None:
    def keys(value: Any) -> Any:
        return {key: keys(nested) for key, nested in value.items()} if isinstance(value, dict) else None

    first, second = (summarize(gather([load(shared)], treatment, "x")) for treatment in ("rotary", "learned"))
    arms = [only([arm for arm in made["arms"] if arm["arm"] == "none"]) for made in (first, second)]
    assert keys(arms[0]) == keys(arms[1]) and keys(first) == keys(second)


def test_the_floor_and_the_smallest_effect_are_in_the_summary_and_on_the_page(
    written: tuple[dict[str, Any], Path],
) -> None:
    made, out = written
    assert (out / "index.html").read_text().count("The noise floor (the grey band):") == 2
    floor = made["settings"][0]["floor"]
    assert floor["pairs"] == 9 and 0.9 < floor["low"] <= 1 <= floor["high"] < 1.1
    arm = next(arm for arm in made["arms"] if arm["arm"] == "learned")
    assert 1 < arm["speedup"]["detectable"] < 1.2 and arm["itself"]["n"] == 3


# --- grids ----------------------------------------------------------------------------------------------------------


def test_a_grid_gives_the_best_learning_rate_of_an_arm(tmp_path: Path) -> None:
    def loss(step: int, seed: int, rate: float) -> float:
        return 6 - (step / STEPS) * (5 - abs(np.log10(rate / 3e-3)) - 0.01 * seed)

    write_run(tmp_path / "grid" / "rotary", "rotary", loss, (100, 101), (1e-3, 3e-3, 1e-2))
    sweep = load(tmp_path / "grid")
    tuning = only(tune(sweep))
    assert sweep.grid and tuning.best == 3e-3 and tuning.seeds == [100, 101]
    assert np.subtract(tuning.final_nats, min(tuning.final_nats)) == pytest.approx(
        [np.log10(3), 0, np.log10(1e-2 / 3e-3)]
    )
    assert summary(sweep)["tuning"][0]["best"] == 3e-3
    assert [name for name, _ in figures.of(find(sweep))] == ["tuning"]


def test_a_grid_of_unequal_rates_is_marked_and_its_cells_stand_under_their_rates(tmp_path: Path) -> None:
    write_run(tmp_path / "grid" / "none", "none", 1, (100, 101), (3e-3, 1e-2))
    write_run(tmp_path / "grid" / "rotary", "rotary", 2, (100, 101), (1e-3, 3e-3))
    words = (
        "The arms differ in optimizer.learning_rate (none: 0.003, 0.01; rotary: 0.001, 0.003). An arm that was tuned"
    )
    grid = load(tmp_path / "grid")
    assert [words in warning for warning in find(grid).warnings].count(True) == 1
    tunings, shared = html(grid).split("The learning rate decides")[1].split("<tbody>")[1:3]
    cells = [re.findall("<td>(.*?)</td>", row) for row in tunings.split("</tr>")[:2]]
    assert [[bool(cell) for cell in row[1:4]] for row in cells] == [[False, True, True], [True, True, False]]
    assert len(re.findall("<td>", shared.split("</tr>")[0])) == 3, "the shared rate, and each arm at its best"


def test_a_rate_at_which_a_member_diverged_is_not_chosen(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "grid" / "none", "none", 1, (100,), (1e-3, 1e-2))
    set_status(folder, "finished", "member 0 at step 7", {"0": 7})
    tuning = only(tune(load(tmp_path / "grid")))
    assert tuning.best == 1e-2 and tuning.final_nats[0] == float("inf")


# --- runs that are missing, unfair, damaged -------------------------------------------------------------------------


def test_runs_that_did_not_finish_are_listed_and_not_compared(sweep: Path) -> None:
    set_status(write_run(sweep / "failed", "rotary", 1), "failed")
    (sweep / "empty").mkdir()
    made = summary(load(sweep))
    assert "failed" not in {arm["arm"] for arm in made["arms"]}
    assert {"failed"} == {run["arm"] for run in made["runs"] if run["status"] == "failed"}
    assert any("failed (failed)" in warning for warning in made["warnings"])
    assert "<td>failed</td>" in html(load(sweep))


def test_an_arm_that_was_planned_and_never_began_is_listed(sweep: Path) -> None:
    (sweep / "plan").mkdir()
    for arm in ("rotary", "alibi", "fire"):
        shutil.copy(sweep / "rotary" / "config.json", sweep / "plan" / f"{arm}.json")
    (sweep / "fire").mkdir()
    set_status(sweep / "fire", "failed", "MemoryError: 9 GB")
    made = summary(load(sweep))
    listed = {run["arm"]: (run["status"], run["why"]) for run in made["runs"]}
    assert len(made["runs"]) == 7 and listed["alibi"] == ("not run", "")
    assert listed["fire"] == ("failed", "MemoryError: 9 GB")
    assert made["warnings"] == ["Not every run of sweep finished: alibi (not run), fire (failed)."]


def test_sweeps_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Two archives that were both made from a folder `quick`."""
    for place, speed in (("a", 2.0), ("b", 3.0)):
        for arm, times in (("rotary", speed), ("learned", 1.0)):
            write_run(tmp_path / place / "quick" / arm, arm, times)
    given = [load(tmp_path / place / "quick") for place in ("a", "b")]
    found = find(*given)
    assert [sweep.name for sweep in found.sweeps] == ["quick (quick)", "quick (quick) 2"]
    names = [name for name, _ in figures.of(found)]
    assert len(set(names)) == len(names) == 6 and {"quick--quick--loss", "quick--quick--2-loss"} < set(names)
    with pytest.raises(Refusal, match="is given more than once"):
        find(given[0], given[0])


def test_a_report_of_nothing_finished_says_so(tmp_path: Path) -> None:
    set_status(write_run(tmp_path / "s" / "rotary", "rotary", 1), "running")
    assert summary(load(tmp_path / "s"))["arms"] == []
    assert "No run of s has finished yet" in html(load(tmp_path / "s"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kernel": "xla", "execution": {"kernel": "xla", "pieces": 1}}, "differ in kernel"),
        ({"execution": {"kernel": "blocked", "pieces": 2}}, "differ in execution.pieces"),
        ({"commit": "d" * 40}, "differ in commit"),
        ({"batches": {"step": 1000, "sha256": ["a" * 64] * 3}}, "differ in batches.sha256"),
        (
            {"data": MANIFEST["data"] | {"fingerprint": {"text": "g", "tokenizer": "bytes-1"}}},
            "differ in fingerprint.text",
        ),
        ({"versions": {"jax": "2", "flax": "1", "optax": "1"}}, "differ in versions.jax"),
        ({"deterministic": {"xla_gpu_exclude": True}}, "differ in deterministic.xla_gpu_exclude"),
        ({"execution": None}, "differ in execution.pieces"),
        (
            {"environment": MANIFEST["environment"] | {"NVIDIA_TF32_OVERRIDE": "0"}},
            "differ in environment.NVIDIA_TF32_OVERRIDE (learned: 0; rotary: none)",
        ),
    ],
)
def test_arms_that_differ_in_more_than_the_encoding_are_marked(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    write_run(tmp_path / "s" / "rotary", "rotary", 2)
    write_run(tmp_path / "s" / "learned", "learned", 1, manifest=change)
    assert words in only(find(load(tmp_path / "s")).warnings)
    assert words in html(load(tmp_path / "s"))


def test_fair_arms_have_no_warning(shared: Path) -> None:
    assert find(load(shared)).warnings == []


def test_repeated_steps_count_once_and_a_torn_line_is_dropped(sweep: Path) -> None:
    path = sweep / "rotary" / "metrics.jsonl"
    again = {"step": 1000, "member": 0, "split": "validation", "nats": 0.5, "tokens": 10, "seconds": 10}
    path.write_text(path.read_text() + json.dumps(again) + "\n" + '{"step": 1050, "mem')
    run = next(run for run in load(sweep).runs if run.arm == "rotary")
    assert run.curves[0].final == 0.5 and len(run.curves[0].steps) == 21


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[]", "config.json is not in the format that a run writes .no steps, data"),
        ("manifest.json", "{}", "manifest.json is not in the format that a run writes .no members"),
        ("metrics.jsonl", "nonsense\n{}\n", "metrics.jsonl line 1 is damaged"),
        ("distance.json", '{"mass": []}', "distance.json is not in the format that scripts.distance writes .no mean"),
        ("documents.json", '{"nats": []}', "documents.json is not in the format that a run writes .no tokens"),
    ],
)
def test_a_damaged_run_is_named_in_one_line(sweep: Path, name: str, content: str, words: str) -> None:
    (sweep / "rotary" / name).write_text(content)
    with pytest.raises(Refusal, match=words):
        load(sweep)


def test_names_are_text_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "s" / "<script>alert(1)<", "rotary", 1)
    write_run(tmp_path / "s" / "<script>2<" / "rotary", "rotary", 1)
    write_claim(tmp_path / "s", setting="<script>2<", published="<script>3<")
    page = html(load(tmp_path / "s"))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_analysis_never_imports_jax_or_selects_a_backend(shared: Path) -> None:
    code = (
        "import sys; from rope_lm.analysis import load, compare, figures; arms = compare(load(sys.argv[1]), 'rotary');"
        "figures.loss_curves(arms); sys.exit('jax' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, shared], cwd=Path(__file__).parents[2]).returncode == 0


# --- studies --------------------------------------------------------------------------------------------------------


def test_a_study_has_a_matrix_of_verdicts_in_words(written: tuple[dict[str, Any], Path]) -> None:
    made, out = written
    rows = {(row["setting"], row["treatment"]): row["cells"] for row in made["matrix"]}
    assert set(rows) == {("causal-softmax", "rotary"), ("causal-softmax", "learned"), ("masked-softmax", "rotary")}
    assert rows["causal-softmax", "rotary"]["learned"]["verdict"] == "supported"
    assert rows["masked-softmax", "rotary"]["learned"]["verdict"] == "refuted"
    page = (out / "index.html").read_text()
    matrix = page.split("Faster than what, and where?")[1].split("</table>")[0]
    assert matrix.count("<b class=") == 5 and ">supported</b>" in matrix and ">refuted</b>" in matrix


def test_each_claim_stands_beside_its_published_finding(written: tuple[dict[str, Any], Path]) -> None:
    made, out = written
    assert [(claim["verdict"], claim["late"]) for claim in made["claims"]] == [
        ("supported", False),
        ("refuted", False),
        ("refuted", True),
    ]
    table = (out / "index.html").read_text().split("The claims")[1].split("</table>")[0]
    assert table.count("30% faster") == 3 and table.count("added after its runs began") == 1
    for name, bound in (("claims.csv", "≥ "), ("claims.tex", r"$\geq$ ")):
        text = (out / name).read_text()
        assert text.count("30") >= 3 and text.count("(added after its runs began)") == 1, name
        assert bound + f"{made['claims'][0]['mean']:.2f} [" in text, "half of its seeds are bounds"
    assert [claim["bound"] for claim in made["claims"]][:2] == ["lower", ""] and "≥ " in table


def test_masked_and_causal_losses_never_share_an_axis(written: tuple[dict[str, Any], Path]) -> None:
    _, out = written
    names = {path.stem for path in (out / "figures").glob("*.svg")}
    assert {"causal-softmax-loss", "masked-softmax-loss", "causal-softmax-tuning", "causal-softmax-rates"} <= names
    assert "loss" not in names and "grid-factor" not in names


def test_the_methods_are_written_from_the_manifests(written: tuple[dict[str, Any], Path]) -> None:
    made, _ = written
    compared, tuned = made["methods"]
    for words in (
        "causal-softmax: causal language modelling, softmax attention (kernel: blocked)",
        "masked-softmax: masked (mask_rate 0.15) language modelling",
        "peak learning rates learned, rotary, sinusoidal at 0.003",
        "seeds 0, 1, 2, 3, 4, 5",
        "sha256 of the text ffffffffffffffff",
        "study: transformers (pre-norm, RMSNorm, GELU by tanh, no biases, untied embeddings; 2 layers, width 64",
        "1,000 steps of 16 rows of 128 tokens",
        "with AdamW (b1 0.9, b2 0.95, epsilon 1e-08, weight decay 0.1 on matrices except an encoding's own, gradients",
        "The validation set is 128 fixed rows",
        "1 x cpu (cpu)",
        "for 5 runs, begun 2026-01-02",
        "commit cccccccccccccccc",
    ):
        assert words in compared, words
    assert "seeds 100, 101" in tuned and "of a grid, learned, rotary at 0.001, 0.003, 0.01" in tuned
    hours = sum(run["hours"] for run in made["runs"] if run["sweep"] == "study")
    assert f"{hours:.2f} hours of training" in compared and "unknown" not in compared + tuned


@pytest.mark.parametrize(
    "block, words",
    [
        ("llama", "pre-norm, RMSNorm, SwiGLU, no biases, untied embeddings"),
        ("gpt2", "pre-norm, LayerNorm, GELU by tanh, biases, untied embeddings"),
        ("neox", "pre-norm, attention and MLP in parallel, LayerNorm, GELU, biases, untied embeddings"),
        ("bert", "post-norm, LayerNorm, GELU, biases, a transform before the logits, untied embeddings"),
    ],
)
def test_the_methods_name_the_parts_of_a_layer(tmp_path: Path, block: str, words: str) -> None:
    write_run(tmp_path / "s" / "rotary", "rotary", 1, config={"model": {"block": BLOCKS[block]}})
    assert f"s: transformers ({words}; 2 layers" in methods.paragraph(load(tmp_path / "s"))


def test_settings_that_differ_in_size_give_speedup_against_parameters(tmp_path: Path) -> None:
    for width, parameters, speed in ((32, 41_000, 1.5), (64, 131_000, 2.0), (96, 381_000, 3.0)):
        for name in ("rotary", "learned"):
            write_run(
                tmp_path / "sizes" / f"width{width}" / name,
                name,
                speed if name == "rotary" else 1.0,
                config={"model": {"width": width, "hidden": 4 * width}},
                manifest={"parameters": parameters},
            )
    sizes = load(tmp_path / "sizes")
    factor = only(summary(sizes)["factors"])
    assert factor["of"] == "parameters" and factor["values"] == [41_000, 131_000, 381_000]
    assert "sizes-factor" in {name for name, _ in figures.of(find(sizes))}
    assert "sizes: speed-up against parameters" in html(sizes)


def test_settings_that_differ_in_one_number_give_speedup_against_it(tmp_path: Path) -> None:
    for scale in (0.02, 1.0):
        for name in ("rotary", "learned"):
            folder = tmp_path / "scales" / f"scale{scale}" / name
            write_run(folder, name, 2 if name == "rotary" else 1, config={"model": {"embedding_scale": scale}})
    assert only(summary(load(tmp_path / "scales"))["factors"]) == {
        "sweep": "scales",
        "of": "model.embedding_scale",
        "values": [0.02, 1.0],
        "settings": ["scale0.02", "scale1.0"],
    }


def test_a_refused_comparison_is_named_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "s" / "rotary", "rotary", 2)
    write_run(tmp_path / "s" / "learned", "learned", 1, config={"objective": {"name": "masked"}})
    made = summary(load(tmp_path / "s"))
    assert made["arms"] == [] and any("different objectives" in warning for warning in made["warnings"])
    assert "Nothing is compared here: the arms of s have different objectives" in html(load(tmp_path / "s"))


def test_the_page_says_that_verdicts_are_not_corrected_and_how_low_p_can_be(
    written: tuple[dict[str, Any], Path],
) -> None:
    page = (written[1] / "index.html").read_text()
    assert page.count("intervals are not corrected for the number of comparisons") == 2
    assert "cannot be below 0.03125, nor below 0.0625 after the correction over 2 arms, whatever the data" in page
    assert "one comparison takes 6 seeds or more, and each of 2 takes 7." in page
    assert "takes 6 seeds or more. The smallest" in page, "the setting of one comparison"


def test_three_lines_in_a_notebook(shared: Path) -> None:
    """The lines in the package's own documentation."""
    lines = [line[4:] for line in analysis.__doc__.splitlines() if line.startswith(">>> ")]
    assert len(lines) == 3
    names: dict = {}
    exec("\n".join(lines).replace("runs/quick", str(shared)), names)
    assert names["arms"]["learned"].speedup.verdict == "supported"
    rows = analysis.table(load(shared))
    assert len(rows) == 15 and len({row["arm"] for row in rows}) == 5
    assert rows[0]["bits_per_byte"] == pytest.approx(rows[0]["final_nats"] / np.log(2))


# --- files and figures ----------------------------------------------------------------------------------------------


def test_tables_have_a_row_for_each_arm(written: tuple[dict[str, Any], Path]) -> None:
    _, out = written
    assert len((out / "table.csv").read_text().splitlines()) == 6
    tex = (out / "table.tex").read_text()
    assert tex.count(r"\\") == 6 and r"\toprule" in tex
    assert tables._tex(["a_b", "1%"]) == r"a\_b & 1\% \\"


def test_the_folder_of_a_report_has_its_files(written: tuple[dict[str, Any], Path]) -> None:
    made, out = written
    assert json.loads((out / "summary.json").read_text()) == made
    assert {path.suffix for path in out.rglob("*.*")} == {".html", ".json", ".csv", ".tex", ".svg", ".png"}
    drawings = len(list((out / "figures").glob("*.svg")))
    assert (out / "index.html").read_text().count("<figure>") == drawings == 8, "each figure is on the page once"


def test_a_legend_of_many_arms_fits_its_figure_and_leaves_room_for_the_lines() -> None:
    @drawn((7.2, 4.2))
    def many(axes: figures.Axes) -> None:
        for number in range(40):
            axes.plot([0, 1], [0, number], label=f"encoding {number}")
        figures._legend(axes)

    figure = many()
    figure.draw_without_rendering()
    (axes,), height = figure.axes, figure.bbox.height
    assert axes.get_legend().get_window_extent().y0 > 0
    assert axes.get_window_extent().height > 0.7 * height


# --- the page in a browser ------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["sweep", "study"])
def test_the_page_fits_a_desktop_and_a_phone(
    request: pytest.FixtureRequest, tmp_path: Path, width: int, kind: str
) -> None:
    folder = request.getfixturevalue(kind)
    if kind == "study":
        write_claim(folder, setting="causal-softmax")
    found = gather([load(folder)], "rotary", "python -m scripts.report " + "runs/a-long-path/" * 10)
    report.write(found, tmp_path)
    page = (tmp_path / "index.html").read_text()
    probe = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join()</script>"
    # Chromium's own window is at least 500 wide: a frame has the width of a phone.
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe + "</body>"))
    frame = (
        f'<iframe id="f" src="probe.html" style="width:{width}px;height:3000px;border:0"></iframe><script>'
        "f.onload = () => { document.title = f.contentDocument.title }</script>"
    )
    (tmp_path / "frame.html").write_text(frame)
    flags = ["--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    flags += [
        "--no-sandbox",
        "--disable-component-update",
        "--allow-file-access-from-files",
        "--virtual-time-budget=5000",
    ]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,3000", "--enable-logging=stderr"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", f"file://{tmp_path / 'frame.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    inner, scroll = map(int, title.split(","))
    assert inner == width and scroll <= width, f"the page is {scroll} wide in {inner}"
    for words in ("Does rotary converge faster?", "supported", "2104.09864", "Every run"):
        assert words in page
