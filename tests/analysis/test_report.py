"""The report from run directories: numbers, files, the page, what it refuses and what it admits."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.presets import BLOCKS
from rope_lm import analysis
from rope_lm.analysis import compare, figures, load, load_all, methods, report, reproduction, tune
from rope_lm.refusal import Refusal
from tests.analysis.conftest import BEGAN, STEPS, write_claim, write_run, write_study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_speedups_are_those_that_the_runs_were_made_with(sweep):
    arms = {arm.name: arm for arm in compare(load(sweep), "rotary")}
    assert arms["rotary"].speedup is None
    # Loss is a function of speed * step, so the true speed-up is the ratio of speeds; interpolation adds a little.
    for name, expected in {"learned": 2.0, "sinusoidal": 2 / 1.7, "relative_bias": 1.0, "none": 4.0}.items():
        assert arms[name].speedup.mean == pytest.approx(expected, rel=0.03), name
    assert arms["learned"].speedup.verdict == "supported"
    assert arms["none"].overhead == 0 and arms["rotary"].overhead == pytest.approx(0.5 / 2 - 1)
    found = arms["learned"].contrast.costs
    assert found.seconds.mean == pytest.approx(found.steps.mean * 2, rel=0.01)
    assert found.flops.mean == pytest.approx(found.steps.mean)
    assert [arm.name for arm in compare(load(sweep), "rotary")][-1] == "none", "the best comes first"


def test_the_profile_reaches_from_loose_targets_to_the_final_one(sweep):
    arm = next(arm for arm in compare(load(sweep), "rotary") if arm.name == "learned")
    profile = arm.contrast.profile
    targets = [each.target for each in profile]
    assert targets == sorted(targets, reverse=True) and targets[-1] == pytest.approx(arm.target)
    assert profile[-1].mean == pytest.approx(arm.speedup.mean)


def test_the_summary_has_what_the_issue_names(sweep, tmp_path):
    made = report.write([load(sweep)], tmp_path / "out", "rotary", "the command")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(made))
    arm = next(arm for arm in made["arms"] if arm["arm"] == "learned")
    for key in ("encoding", "seeds", "final_nats", "steps_to_target", "tokens_per_second", "parameters"):
        assert arm[key] is not None, key
    assert {"mean", "low", "high"} <= set(arm["final_nats"])
    assert {"mean", "low", "high", "p", "verdict"} <= set(arm["speedup_of_rotary"])
    assert arm["seeds"] == [0, 1, 2] and arm["first_nats"]["0"] == 6.0


def test_two_reports_of_the_same_runs_are_the_same_bytes(sweep, tmp_path):
    sums = []
    for name in ("a", "b"):
        report.write([load(sweep)], tmp_path / name, "rotary", "x")
        files = sorted(each for each in (tmp_path / name).rglob("*") if each.is_file())
        sums.append(
            {each.relative_to(tmp_path / name): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}
        )
    assert sums[0] == sums[1]
    assert {each.suffix for each in sums[0]} == {".html", ".json", ".csv", ".tex", ".svg", ".png"}


def test_tables_have_a_row_for_each_arm(sweep, tmp_path):
    report.write([load(sweep)], tmp_path, "rotary", "x")
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 6
    tex = (tmp_path / "table.tex").read_text()
    assert tex.count(r"\\") == 6 and r"relative\_bias" in tex and r"\toprule" in tex


def test_a_grid_gives_each_arms_best_rate(tmp_path):
    rates = (1e-3, 3e-3, 1e-2)

    def loss(step, seed, rate):
        return 6 - (step / STEPS) * (5 - abs(np.log10(rate / 3e-3)) - 0.01 * seed)

    write_run(tmp_path / "grid" / "rotary", "rotary", 1, seeds=(100, 101), rates=rates, loss=loss)
    sweep = load(tmp_path / "grid")
    (tuning,) = tune(sweep)
    assert sweep.grid and tuning.best == 3e-3 and tuning.seeds == 2
    assert tuning.loss_of(1e-2) == pytest.approx(np.log10(1e-2 / 3e-3)) and np.isnan(tuning.loss_of(5e-3))
    made = report.write([sweep], tmp_path / "out", "rotary", "x")
    assert made["tuning"][0]["best"] == 3e-3 and (tmp_path / "out" / "figures" / "tuning.svg").exists()


def test_a_grid_of_unequal_rates_is_marked_and_its_cells_stand_under_their_rates(tmp_path):
    write_run(tmp_path / "grid" / "none", "none", 1, seeds=(100, 101), rates=(3e-3, 1e-2))
    write_run(tmp_path / "grid" / "rotary", "rotary", 2, seeds=(100, 101), rates=(1e-3, 3e-3))
    made = report.write([load(tmp_path / "grid")], tmp_path / "out", "rotary", "x")
    words = "The arms differ in optimizer.learning_rate (none: 0.003, 0.01; rotary: 0.001, 0.003). An arm that was tuned on more"
    assert [words in warning for warning in made["warnings"]].count(True) == 1
    (tmp_path / "out" / "runs.json").unlink()  # as the archives of before
    assert words in "".join(report.write([load(tmp_path / "out")], tmp_path / "again", "rotary", "x")["warnings"])
    tunings, shared = (
        (tmp_path / "out" / "index.html").read_text().split("The learning rate decides")[1].split("<tbody>")[1:3]
    )
    cells = [re.findall("<td>(.*?)</td>", row) for row in tunings.split("</tr>")[:2]]
    assert [[bool(cell) for cell in row[1:4]] for row in cells] == [[False, True, True], [True, True, False]]
    assert len(re.findall("<td>", shared.split("</tr>")[0])) == 3, "the one rate that both have, and each at its best"


def test_an_archived_grid_is_as_good_as_its_runs(sweep, tmp_path):
    write_run(tmp_path / "grid" / "rotary", "rotary", 1, seeds=(100, 101), rates=(1e-3, 3e-3))
    report.write([load(tmp_path / "grid")], tmp_path / "archive", "rotary", "x")
    assert tune(load(tmp_path / "archive")) == tune(load(tmp_path / "grid"))
    made = report.write([load(sweep), load(tmp_path / "archive")], tmp_path / "out", "rotary", "x")
    assert len(made["arms"]) == 5 and made["tuning"][0]["seeds"] == 2 and made["fingerprint"]["text"] == "f" * 64
    (tmp_path / "archive" / "runs.json").unlink()  # as the archives of before, which had a summary alone
    assert tune(load(tmp_path / "archive")) == tune(load(tmp_path / "grid"))
    (tmp_path / "archive" / "summary.json").write_text('{"tuning": [{"arm": "rotary"}]}')
    with pytest.raises(Refusal, match=r"summary.json is not a report's"):
        tune(load(tmp_path / "archive"))


def test_a_rate_at_which_a_member_diverged_is_not_chosen(tmp_path):
    folder = write_run(tmp_path / "grid" / "none", "none", 1, seeds=(100,), rates=(1e-3, 1e-2))
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"diverged": {"0": 7}, "why": "member 0 at step 7"}))
    (tuning,) = tune(load(tmp_path / "grid"))
    assert tuning.best == 1e-2 and tuning.finals[0] == float("inf")


def test_what_did_not_finish_is_listed_and_not_compared(sweep, tmp_path):
    write_run(sweep / "failed", "rotary", 1, status="failed")
    (sweep / "empty").mkdir()
    made = report.write([load(sweep)], tmp_path / "out", "rotary", "x")
    assert "failed" not in {arm["arm"] for arm in made["arms"]}
    assert {"failed"} == {run["arm"] for run in made["runs"] if run["status"] == "failed"}
    assert any("failed (failed)" in warning for warning in made["warnings"])
    assert "failed" in (tmp_path / "out" / "index.html").read_text()


def test_an_arm_that_was_planned_and_never_began_is_listed(sweep, tmp_path):
    (sweep / "plan").mkdir()
    for arm in ("rotary", "alibi", "fire"):
        shutil.copy(sweep / "rotary" / "config.json", sweep / "plan" / f"{arm}.json")
    (sweep / "fire").mkdir()
    failed = {"status": "failed", "why": "MemoryError: 9 GB", "step": 0, "diverged": {}}
    (sweep / "fire" / "status.json").write_text(json.dumps(failed))
    made = report.write([load(sweep)], tmp_path / "out", "rotary", "x")
    listed = {run["arm"]: (run["status"], run["why"]) for run in made["runs"]}
    assert len(made["runs"]) == 7 and listed["alibi"] == ("not run", "")
    assert listed["fire"] == ("failed", "MemoryError: 9 GB")
    assert made["warnings"] == ["Not every run of sweep finished: alibi (not run), fire (failed)."]
    assert report.write(load_all(tmp_path / "out"), tmp_path / "again", "rotary", "x")["warnings"] == made["warnings"]


def test_sweeps_of_one_name_are_told_apart(tmp_path):
    """Two archives that were both made of a folder `quick`."""
    for place, speed in (("a", 2.0), ("b", 3.0)):
        for arm, times in (("rotary", speed), ("learned", 1.0)):
            write_run(tmp_path / place / "quick" / arm, arm, times)
    given = [load(tmp_path / place / "quick") for place in ("a", "b")]
    made = report.write(given, tmp_path / "out", "rotary", "x")
    assert {arm["sweep"] for arm in made["arms"]} == {"quick (quick)", "quick (quick) 2"}
    names = {path.stem for path in (tmp_path / "out" / "figures").glob("*-loss.svg")}
    assert names == {"quick--quick--loss", "quick--quick--2-loss"}
    changed = json.loads(json.dumps(made))
    for arm in changed["arms"][:2]:
        arm["first_nats"] = {seed: nats + 1 for seed, nats in arm["first_nats"].items()}
    assert len(differing(changed, made)) == 6, "of either sweep"
    with pytest.raises(Refusal, match="is given more than once"):
        report.write([given[0], given[0]], tmp_path / "out", "rotary", "x")


def test_a_report_of_nothing_finished_says_so(tmp_path):
    write_run(tmp_path / "s" / "rotary", "rotary", 1, status="running")
    made = report.write([load(tmp_path / "s")], tmp_path / "out", "rotary", "x")
    assert made["arms"] == [] and "No run of s has finished yet" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kernel": "xla"}, "differ in kernel"),
        ({"execution": {"pieces": 2}}, "differ in execution.pieces"),
        ({"commit": "d" * 40}, "differ in commit"),
        ({"batches": {"step": 1000, "sha256": ["a" * 64] * 3}}, "differ in batches.sha256"),
        (
            {"data": {"fingerprint": {"text": "g"}, "bytes_per_token": 1.0, "tokens": {"train": 1}}},
            "differ in fingerprint.text",
        ),
        ({"versions": {"jax": "2", "flax": "1", "optax": "1"}}, "differ in versions.jax"),
        ({"deterministic": {"xla_gpu_exclude": True}}, "differ in deterministic.xla_gpu_exclude"),
        ({"execution": None}, "differ in execution.pieces"),
    ],
)
def test_arms_that_differ_in_more_than_the_encoding_are_marked(sweep, tmp_path, change, words):
    shutil.rmtree(sweep / "learned")
    write_run(sweep / "learned", "learned", 1, **change)
    made = report.write([load(sweep)], tmp_path / "out", "rotary", "x")
    assert any(words in warning for warning in made["warnings"]), made["warnings"]
    assert words in (tmp_path / "out" / "index.html").read_text()


def test_fair_arms_have_no_warning(sweep, tmp_path):
    assert report.write([load(sweep)], tmp_path / "out", "rotary", "x")["warnings"] == []


def test_replayed_steps_count_once_and_a_torn_line_is_dropped(sweep):
    path = sweep / "rotary" / "metrics.jsonl"
    again = {"step": 1000, "member": 0, "split": "validation", "nats": 0.5, "tokens": 10, "seconds": 10}
    path.write_text(path.read_text() + json.dumps(again) + "\n" + '{"step": 1050, "mem')
    run = next(run for run in load(sweep).runs if run.arm == "rotary")
    assert run.curves[0].final == 0.5 and len(run.curves[0].steps) == 21


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "config.json is not a run's"),
        ("manifest.json", "{}", "manifest.json is not a run's .it lacks members"),
        ("metrics.jsonl", "nonsense\n{}\n", "metrics.jsonl line 1 is not a row"),
    ],
)
def test_a_damaged_run_is_named_in_one_line(sweep, name, content, words):
    (sweep / "rotary" / name).write_text(content)
    with pytest.raises(Refusal, match=words):
        load(sweep)


def test_names_are_text_on_the_page(tmp_path):
    write_run(tmp_path / "s" / "<script>alert(1)<", "rotary", 1)
    write_run(tmp_path / "s" / "<script>2<" / "rotary", "rotary", 1)
    write_claim(tmp_path / "s", setting="<script>2<", published="<script>3<")
    report.write([load(tmp_path / "s")], tmp_path / "out", "rotary", "<b>command</b>")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;command" in page


def test_the_analysis_never_imports_jax(sweep, tmp_path):
    code = (
        "import sys; from rope_lm.analysis import load, compare, figures; arms = compare(load(sys.argv[1]), 'rotary');"
        "figures.loss_curves(arms); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, sweep], cwd=Path(__file__).parents[2]).returncode == 0


# --- studies --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a study of two settings and its grid, and its folder. Read only."""
    tmp_path = tmp_path_factory.mktemp("study")
    study = write_study(tmp_path / "study")
    grid, rates = tmp_path / "grid" / "causal-softmax", (1e-3, 3e-3, 1e-2)

    def loss(step, seed, rate):
        return 1 + 5 / (1 + 2 * np.exp(-abs(np.log(rate / 3e-3))) * step / 50)

    for name in ("rotary", "learned"):
        write_run(grid / name, name, 1, (100, 101), rates, loss=loss)
    write_claim(study, setting="causal-softmax")
    write_claim(study, setting="causal-softmax", baseline="sinusoidal", treatment="learned")
    write_claim(study, setting="masked-softmax", since="2027-01-01T00:00:00+00:00")
    sweeps = [load(study), load(tmp_path / "grid")]
    return report.write(sweeps, tmp_path / "out", "rotary", "the command"), tmp_path / "out"


def test_a_study_has_a_matrix_of_verdicts_in_words(written):
    made, out = written
    rows = {(row["setting"], row["treatment"]): row["cells"] for row in made["matrix"]}
    assert set(rows) == {("causal-softmax", "rotary"), ("causal-softmax", "learned"), ("masked-softmax", "rotary")}
    assert rows["causal-softmax", "rotary"]["learned"]["verdict"] == "supported"
    assert rows["masked-softmax", "rotary"]["learned"]["verdict"] == "refuted"
    page = (out / "index.html").read_text()
    matrix = page.split("Faster than what, and where?")[1].split("</table>")[0]
    assert matrix.count("<b class=") == 5 and ">supported</b>" in matrix and ">refuted</b>" in matrix


def test_each_claim_stands_beside_what_was_published(written):
    made, out = written
    assert [(each["verdict"], each["late"]) for each in made["claims"]] == [
        ("supported", False),
        ("refuted", False),
        ("refuted", True),
    ]
    table = (out / "index.html").read_text().split("The claims")[1].split("</table>")[0]
    assert table.count("30% faster") == 3 and table.count("added after its runs began") == 1
    for name, bound in (("claims.csv", "≥ "), ("claims.tex", r"$\geq$ ")):
        assert (out / name).read_text().count("30") >= 3, name
        assert bound + f"{made['claims'][0]['mean']:.2f} [" in (out / name).read_text(), "half of its seeds are bounds"
    assert [each["bound"] for each in made["claims"]][:2] == ["lower", ""] and "≥ " in table


def test_masked_and_causal_losses_never_share_an_axis(written):
    _, out = written
    names = {path.stem for path in (out / "figures").glob("*.svg")}
    assert {"causal-softmax-loss", "masked-softmax-loss", "causal-softmax-tuning", "causal-softmax-rates"} <= names
    assert "loss" not in names and "grid-factor" not in names


def test_the_methods_are_written_from_the_manifests(written):
    made, _ = written
    compared, tuned = made["methods"]
    for words in (
        "causal-softmax: causal language modelling, softmax attention (kernel: blocked)",
        "masked-softmax: masked (rate 0.15) language modelling",
        "peak learning rates learned, rotary, sinusoidal at 0.003",
        "seeds 0, 1, 2, 3, 4, 5",
        "sha256 of the text ffffffffffffffff",
        "study: transformers (pre-norm, RMSNorm, GELU by tanh, no biases, untied embeddings; 2 layers, width 64",
        "1,000 steps of 16 rows of 128 tokens",
        "weight decay 0.1 on matrices but an encoding's own, gradients clipped at 1",
        "1 x cpu (cpu)",
        "for 5 runs, begun 2026-01-02",
        "commit cccccccccccccccc",
    ):
        assert words in compared, words
    assert "seeds 100, 101" in tuned and "of a grid, learned, rotary at 0.001, 0.003, 0.01" in tuned
    hours = sum(run["hours"] for run in made["runs"] if run["sweep"] == "study")
    assert f"{hours:.2f} hours of training" in compared


@pytest.mark.parametrize(
    "block, words",
    [
        ("llama", "pre-norm, RMSNorm, SwiGLU, no biases, untied embeddings"),
        ("gpt2", "pre-norm, LayerNorm, GELU by tanh, biases, untied embeddings"),
        ("neox", "pre-norm, attention and MLP in parallel, LayerNorm, GELU, biases, untied embeddings"),
        ("bert", "post-norm, LayerNorm, GELU, biases, a transform before the logits, untied embeddings"),
    ],
)
def test_the_methods_say_what_a_layer_is_made_of(tmp_path, block, words):
    write_run(tmp_path / "s" / "rotary", "rotary", 1, changes={"model": {"block": BLOCKS[block]}})
    assert f"s: transformers ({words}; 2 layers" in methods.paragraph(load(tmp_path / "s"))


def test_the_report_of_an_archive_is_the_report_of_its_runs(written, tmp_path):
    """But for the command, byte for byte: the archive has all that the numbers came from."""
    _, out = written
    report.write(load_all(out), tmp_path / "again", "rotary", "the command")
    for path in sorted(each for each in out.rglob("*") if each.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(out)).read_bytes(), path
    with pytest.raises(Refusal, match=r"is the archive of several sweeps .study, grid."):
        load(out)
    (tmp_path / "runs.json").write_text('{"sweeps": [{"name": "x"}]}')
    with pytest.raises(Refusal, match=r"runs.json is not a report's"):
        load_all(tmp_path)


def test_an_archive_names_no_machine_and_no_command(tmp_path):
    secret = {"argv": ["/home/me/x"], "host": "mine", "overrides": {"a": "/home/me"}}
    write_run(tmp_path / "s" / "rotary", "rotary", 1, **secret)
    report.write([load(tmp_path / "s")], tmp_path / "out", "rotary", "x")
    archived = (tmp_path / "out" / "runs.json").read_text()
    assert "/home/me" not in archived and "mine" not in archived and BEGAN in archived


def test_settings_that_differ_in_size_give_speedup_against_parameters(tmp_path):
    for width, parameters, speed in ((32, 41_000, 1.5), (64, 131_000, 2.0), (96, 381_000, 3.0)):
        for name in ("rotary", "learned"):
            write_run(
                tmp_path / "sizes" / f"width{width}" / name,
                name,
                speed if name == "rotary" else 1.0,
                changes={"model": {"width": width, "hidden": 4 * width}},
                parameters=parameters,
            )
    made = report.write([load(tmp_path / "sizes")], tmp_path / "out", "rotary", "x")
    (factor,) = made["factors"]
    assert factor["of"] == "parameters" and factor["values"] == [41_000, 131_000, 381_000]
    assert (tmp_path / "out" / "figures" / "sizes-factor.svg").exists()
    assert "the speed-up against parameters" in (tmp_path / "out" / "index.html").read_text()


def test_settings_that_differ_in_one_number_give_speedup_against_it(tmp_path):
    for scale in (0.02, 1.0):
        for name in ("rotary", "learned"):
            folder = tmp_path / "scales" / f"scale{scale}" / name
            write_run(folder, name, 2 if name == "rotary" else 1, changes={"model": {"embedding_scale": scale}})
    made = report.write([load(tmp_path / "scales")], tmp_path / "out", "rotary", "x")
    assert made["factors"][0] == {
        "sweep": "scales",
        "of": "model.embedding_scale",
        "values": [0.02, 1.0],
        "settings": ["scale0.02", "scale1.0"],
    }


def test_what_cannot_be_compared_is_said_on_the_page(tmp_path):
    write_run(tmp_path / "s" / "rotary", "rotary", 2)
    write_run(tmp_path / "s" / "learned", "learned", 1, changes={"objective": {"name": "masked"}})
    made = report.write([load(tmp_path / "s")], tmp_path / "out", "rotary", "x")
    assert made["arms"] == [] and any("different objectives" in warning for warning in made["warnings"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Nothing is compared here: the arms of s have different objectives" in page


def test_the_floor_and_what_could_be_found_are_on_the_page(written):
    made, out = written
    page = (out / "index.html").read_text()
    assert page.count("The noise floor (the grey band)") == 2
    floor = made["settings"][0]["floor"]
    assert floor["pairs"] == 9 and 0.9 < floor["low"] <= 1 <= floor["high"] < 1.1
    arm = next(arm for arm in made["arms"] if arm["arm"] == "learned")
    assert 1 < arm["speedup_of_rotary"]["detectable"] < 1.2 and arm["itself"]["n"] == 3
    assert {"in_seconds", "in_flops", "to_median", "to_common"} <= set(arm["speedup_of_rotary"])


def test_the_page_says_what_no_verdict_is_corrected_for_and_what_p_can_be(written):
    page = (written[1] / "index.html").read_text()
    assert page.count("intervals are not corrected for how many there are") == 2
    assert "cannot be below 0.03125, nor below 0.0625 after the correction over 2 arms, whatever the data" in page
    assert "one comparison takes 6 seeds or more, and each of 2 takes 7." in page
    assert "takes 6 seeds or more. The smallest" in page, "the setting of one comparison"


def test_three_lines_in_a_notebook(sweep):
    """Those of the package's own documentation."""
    lines = [line[4:] for line in analysis.__doc__.splitlines() if line.startswith(">>> ")]
    assert len(lines) == 3
    names: dict = {}
    exec("\n".join(lines).replace("runs/quick", str(sweep)), names)
    assert names["arms"]["learned"].speedup.verdict == "supported"
    rows = analysis.table(load(sweep))
    assert len(rows) == 15 and {row["arm"] for row in rows} == {
        "none",
        "learned",
        "sinusoidal",
        "relative_bias",
        "rotary",
    }
    assert rows[0]["bits_per_byte"] == pytest.approx(rows[0]["final_nats"] / np.log(2))


# --- reproduction ---------------------------------------------------------------------------------------------------


@pytest.fixture
def archived(sweep, tmp_path):
    return report.write([load(sweep)], tmp_path / "archive", "rotary", "x")


def differing(summary: dict, archived: dict) -> list[str]:
    return [row.what for row in reproduction.hold(summary, archived) if row.agrees is False]


def test_the_same_results_are_reproduced(archived):
    rows = reproduction.hold(archived, archived)
    assert reproduction.reproduced(rows) and len(rows) > 20


def test_another_order_another_loss_another_start_and_a_missing_arm_are_not(archived):
    def changed(change) -> dict:
        summary = json.loads(json.dumps(archived))
        change({arm["arm"]: arm for arm in summary["arms"]})
        return summary

    def worse(arm: dict, by: float) -> None:
        final = arm["final_nats"]
        final["by_seed"] = {seed: value + by for seed, value in final["by_seed"].items()}
        final.update({key: final[key] + by for key in ("mean", "low", "high")})

    swapped = differing(changed(lambda arms: worse(arms["rotary"], 2.0)), archived)
    assert "rotary ends below none" in swapped and "final nats of rotary" in swapped
    assert differing(changed(lambda arms: worse(arms["none"], 0.2)), archived) == ["final nats of none"]
    start = changed(lambda arms: arms["learned"]["first_nats"].update({"1": 6.00002}))
    assert differing(start, archived) == ["loss at step 0 of learned, seed 1"]
    order = changed(lambda arms: arms["none"]["batches"].update({"2": "f" * 64}))
    assert differing(order, archived) == ["batches consumed by none, seed 2"]
    summary = changed(lambda arms: None)
    summary["arms"] = [arm for arm in summary["arms"] if arm["arm"] != "none"]
    assert "arms" in differing(summary, archived)


def test_arms_of_different_settings_are_not_ordered(study, tmp_path):
    made = report.write([load(study)], tmp_path / "archive", "rotary", "x")
    rows = reproduction.hold(made, made)
    assert reproduction.reproduced(rows)
    ordered = [row.what for row in rows if "ends below" in row.what]
    assert "causal-softmax/rotary ends below causal-softmax/learned" in ordered
    assert all(text.split()[0].split("/")[0] == text.split()[-1].split("/")[0] for text in ordered)


def test_on_another_text_only_the_order_is_held(archived):
    summary = json.loads(json.dumps(archived))
    summary["fingerprint"]["text"] = "another"
    for arm in summary["arms"]:
        arm["first_nats"] = {seed: value + 1 for seed, value in arm["first_nats"].items()}
    rows = reproduction.hold(summary, archived)
    assert reproduction.reproduced(rows)
    assert {row.agrees for row in rows if "step 0" in row.what} == {None}


def test_the_command_says_reproduced_or_not(sweep, tmp_path, archived):
    command = [sys.executable, "-m", "scripts.report", sweep, f"--out={tmp_path / 'r'}"]
    against = tmp_path / "archived.json"
    against.write_text(json.dumps(archived))
    run = lambda: subprocess.run(  # noqa: E731
        [*command, f"--against={against}"], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    done = run()
    assert done.returncode == 0 and "\nreproduced: " in done.stdout
    for arm in archived["arms"]:
        arm["first_nats"]["0"] += 1e-3
    against.write_text(json.dumps(archived))
    done = run()
    assert (
        done.returncode == 3 and "not reproduced" in done.stdout and "differs: loss at step 0 of rotary" in done.stdout
    )


# --- the page in a browser ------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["sweep", "study"])
def test_the_page_fits_a_desktop_and_a_phone(request, tmp_path, width, kind):
    folder = request.getfixturevalue(kind)
    if kind == "study":
        write_claim(folder, setting="causal-softmax")
    report.write([load(folder)], tmp_path, "rotary", "python -m scripts.report " + "runs/a-long-path/" * 10)
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


def test_a_legend_of_many_arms_fits_its_figure_and_leaves_room_for_the_lines():
    @figures.drawn((7.2, 4.2))
    def many(axes):
        for number in range(40):
            axes.plot([0, 1], [0, number], label=f"encoding {number}")
        figures._legend(axes)

    figure = many()
    figure.canvas.draw()
    (axes,), height = figure.axes, figure.bbox.height
    assert axes.get_legend().get_window_extent().y0 > 0
    assert axes.get_window_extent().height > 0.7 * height
