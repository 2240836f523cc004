"""A trained run in use: sampling from it, reading longer text with it, and how far it attends."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import lm
from rope_lm import distance, extrapolation, loop, run_directory, trained
from rope_lm.generate import generate, pick
from rope_lm.positions import contiguous
from rope_lm.provenance import provenance
from rope_lm.refusal import Refusal
from rope_lm.transformer import Transformer
from scripts import entry
from tests.commands import call, fork

STEPS, LENGTH = 12, 16
PROMPT = np.frombuffer(b"line 12 says", np.uint8).astype(int).tolist()


@pytest.fixture(scope="module")
def runs(text, cache, tmp_path_factory) -> Path:
    """A folder of two runs; tests copy what they change."""
    folder = tmp_path_factory.mktemp("sweep")
    for name in ("rotary", "learned"):
        config = lm.get_config(f"position={name},data=text:{text}")
        config.steps, config.seeds, config.optimizer.learning_rate = STEPS, (0, 1), (1e-2,)
        config.every.update({"evaluate": STEPS, "save": 8, "log": STEPS})
        config.data.update({"length": LENGTH, "batch": 4, "validation_rows": 6, "cache": cache})
        config.model.update({"width": 32, "heads": 2, "layers": 1, "hidden": 64})
        loop.train(entry.plain(config), folder / name, provenance(["test"], {}))
    return folder


def logits(model: Transformer, tokens: Any) -> np.ndarray:
    """The logits of a full pass over tokens [B T]."""
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)[0])(state, jnp.asarray(tokens)))


def test_the_models_are_those_that_the_run_validated(runs):
    """The last validation loss again, from the loaded parameters and the text."""
    run = trained.load(runs / "rotary")
    text = trained.text(runs / "rotary", 6)
    metrics = run_directory.read_rows(runs / "rotary" / "metrics.jsonl")
    for member, model in enumerate(run.models):
        recorded = [row for row in metrics if row["split"] == "validation" and row["member"] == member]
        nats = trained.over_rows(extrapolation._nats, model, text)
        assert nats.mean() == pytest.approx(recorded[-1]["nats"], abs=1e-5) and recorded[-1]["step"] == STEPS
        assert recorded[-1]["nats"] < recorded[0]["nats"] - 0.5
    assert run.step == STEPS and run.seeds == (0, 1) and run.diverged == (False, False)


def test_members_that_diverged_are_left_out(runs, tmp_path):
    run = trained.load(runs / "rotary")
    one = trained.Trained(**{**vars(run), "diverged": (True, False)}).finite()
    assert one.seeds == (1,) and one.models == run.models[1:] and one.diverged == (False,)
    with pytest.raises(Refusal, match=r"every member of the run in .*rotary' diverged: train it at a lower"):
        trained.Trained(**{**vars(run), "diverged": (True, True)}).finite()


# --- text -------------------------------------------------------------------------------------------------------------


def test_the_likeliest_token_is_that_of_a_full_pass(runs):
    model = trained.load(runs / "rotary").models[0]
    drawn = list(generate(model, PROMPT, 15, temperature=0, top_p=1, seed=0))
    likeliest = logits(model, [PROMPT + drawn]).argmax(-1)[0]
    assert drawn == likeliest[len(PROMPT) - 1 : -1].tolist()


def test_sampling_keeps_to_the_nucleus_and_to_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def draw(temperature: float, top_p: float) -> np.ndarray:
        drawn = jax.vmap(lambda key: pick(logits, key, temperature, top_p))(keys)
        return np.bincount(drawn, minlength=4) / len(keys)

    np.testing.assert_allclose(draw(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(draw(1.0, 0.7), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(draw(0.5, 1.0), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.03)
    np.testing.assert_array_equal(draw(0.0, 0.3), [1, 0, 0, 0])


def test_the_command_writes_the_same_for_the_same_seed(runs):
    words = ["scripts.generate", f"--workdir={runs / 'rotary'}", "--prompt=line 1", "--tokens=8"]
    first, again, other = fork(*words), fork(*words), fork(*words, "--seed=1")
    assert first.returncode == 0 and first.stdout.startswith("line 1"), first.stderr
    assert first.stdout == again.stdout != other.stdout


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in this process. Raises the Refusal that a process of its own prints as one line."""
    monkeypatch.setattr(sys, "argv", words)
    importlib.import_module(words[0]).main()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, says", [
    (["scripts.generate", "--workdir=R/learned", "--tokens=17", "--prompt=x"], "Learned encodes indices below 16"),
    (["scripts.generate", "--workdir=R/rotary", "--tokens=2000000000"], "00. tokens need .* GB, the device has"),
    (["scripts.generate", "--workdir=R/rotary", "--top_p=0"], "top_p above 0 and at most 1"),
    (["scripts.generate", "--workdir=R/rotary", "--temperature=nan"], "temperature=nan"),
    (["scripts.generate", "--workdir=R/rotary", "--seed=4294967296"], r"below 2\*\*32"),
    (["scripts.generate", "--workdir=R/rotary", "--member=2"], "the run has 2 members"),
    (["scripts.generate", "--workdir=R/none"], "holds no run"),
    (["scripts.convert", "--workdir=R/rotary", "--out=R/rotary/hf"], "is inside the run's own folder"),
    (["scripts.probe", "R/rotary", "--rows=0"], "--rows=0: must be at least 1"),
    (["scripts.extrapolate", "R/none"], "holds no run"),
    (["scripts.extrapolate", "R", "--multiples=1,3,4"], "each must divide the greatest"),
    (["scripts.extrapolate", "R", "--multiples=0"], "whole numbers of at least 1"),
    (["scripts.extrapolate", "R", "--scalings=yarm"], "unknown --scalings 'yarm': did you mean yarn"),
    (["scripts.extrapolate", "R", "--rows=100000"], "the validation text has"),
    (["scripts.distance", "R/rotary", "--rows=0"], "--rows=0: must be at least 1"),
])  # fmt: skip
def test_a_mistake_is_refused(runs, words, says, monkeypatch):
    with pytest.raises(Refusal, match=says):
        run([word.replace("R", str(runs), 1) for word in words], monkeypatch)


def test_a_mistake_is_one_line(runs):
    done = call("scripts.distance", runs / "rotary", "--rows=0")
    assert done.returncode == 2 and done.stderr == "error: --rows=0: must be at least 1\n"


@pytest.fixture
def copied(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs / "rotary", tmp_path / "run"))


def change(workdir: Path, file: str, *keys: str, value: object) -> None:
    """Change one value in a JSON file of a run."""
    tree = node = json.loads((workdir / file).read_text())
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    (workdir / file).write_text(json.dumps(tree))


def test_another_architecture_is_refused_and_nothing_is_written(runs, copied):
    change(copied, "config.json", "model", "hidden", value=128)
    with pytest.raises(Refusal, match=r"holds \S*down\S* as .*, this program has .*: it is of another model"):
        trained.load(copied)
    with pytest.raises(Refusal, match="it is of another model"):
        trained.load(runs / "rotary", {"name": "relative_bias", "buckets": 32, "max_distance": 128, "scale": 1.0})
    assert {folder.name for folder in (copied / "checkpoints").iterdir()} == {"8", "12"}


@pytest.mark.parametrize("script", ["extrapolate", "distance"])
@pytest.mark.parametrize("file, keys, value, says", [
    ("manifest.json", ("data", "fingerprint", "text"), "0" * 64, "was trained on another text than data.name=text:"),
    ("config.json", ("model", "hidden"), 128, "it is of another model"),
])  # fmt: skip
def test_a_run_with_other_text_or_model_is_refused_and_nothing_is_written(
    copied, script, file, keys, value, says, monkeypatch
):
    change(copied, file, *keys, value=value)
    before = sorted(copied.iterdir())
    with pytest.raises(Refusal, match=says):
        run([f"scripts.{script}", str(copied), "--rows=4"], monkeypatch)
    assert sorted(copied.iterdir()) == before


# --- longer text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", [1, 5, 8])
def test_pieces_and_windows_read_every_token_once(short):
    tokens, length = 8 * short, 2 * short
    rows = np.arange(2 * (tokens + 1)).reshape(2, -1)
    pieces = extrapolation._cut(rows, range(0, tokens, length), length)
    assert pieces.shape == (2, 4, length + 1) and (pieces[:, 1:, 0] == pieces[:, :-1, -1]).all()
    starts = extrapolation._starts(tokens, length, max(1, short // 2))
    windows = extrapolation._cut(rows, starts, length)
    targets = extrapolation._fresh(windows[:, :, 1:], starts)
    np.testing.assert_array_equal(targets, rows[:, 1:])


@pytest.mark.parametrize("multiples, scalings", [
    ((1, 2), ("yarn",)),
    pytest.param((1, 2, 4), tuple(extrapolation.SCALINGS), marks=pytest.mark.all),
])  # fmt: skip
def test_reading_longer_text(runs, multiples, scalings):
    done = fork(
        "scripts.extrapolate",
        runs,
        f"--multiples={','.join(map(str, multiples))}",
        f"--scalings={','.join(scalings)}",
        "--rows=4",
    )
    assert done.returncode == 0, done.stderr
    found = {name: json.loads((runs / name / "extrapolation.json").read_text()) for name in ("rotary", "learned")}
    rotary = {(row["multiple"], row["scaling"]): row for row in found["rotary"]["rows"]}
    assert set(rotary) == {(m, s) for m in multiples for s in ("", *scalings) if m > 1 or not s}
    longest = multiples[-1]
    for row in rotary.values():
        assert row["tokens"] == 4 * longest * LENGTH and len(row["apart"]) == len(row["sliding"]) == 2
        assert len(row["positions"]) == len(row["by_position"][0]) and row["positions"][0] == 1
    plain = rotary[longest, ""]
    assert plain["apart"] == pytest.approx(plain["sliding"], abs=1e-5), "at the whole length there is one window"
    assert rotary[longest, "yarn"]["apart"] != plain["apart"]
    assert [row["multiple"] for row in found["learned"]["rows"]] == [1]
    assert [row["multiple"] for row in found["learned"]["refused"]] == list(multiples[1:])
    assert f"positions from {LENGTH} on were not trained" in found["learned"]["refused"][0]["why"]


@pytest.mark.all
def test_the_report_draws_what_was_read(runs, tmp_path):
    assert fork("scripts.extrapolate", runs, "--multiples=1,2", "--scalings=yarn", "--rows=4").returncode == 0
    report = call("scripts.report", runs, f"--out={tmp_path}")
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "figures" / "beyond.svg").exists() and (tmp_path / "figures" / "position.svg").exists()
    arm = next(arm for arm in json.loads((tmp_path / "summary.json").read_text())["arms"] if arm["arm"] == "rotary")
    assert {(row["multiple"], row["scaling"]) for row in arm["beyond"]} == {(1, ""), (2, ""), (2, "yarn")}


# --- distance ---------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_attention(runs):
    """Compared with softmax(q k / sqrt(H)) of the first layer, from the block's own matrices."""
    model = trained.load(runs / "learned").models[0]
    tokens = jnp.arange(LENGTH)[None]
    graph, blocks = nnx.split(model.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda x: x[0], blocks))
    x = model.position.embed(model.embedding[...][tokens], contiguous(LENGTH))[0]
    qkv = block.qkv(block.attention_norm(x)).reshape(LENGTH, 2, 3, 16)
    logits = np.einsum("tnh,snh->nts", qkv[:, :, 0], qkv[:, :, 1]) / 4
    expected = jax.nn.softmax(np.where(np.tril(np.ones((LENGTH, LENGTH))), logits, -np.inf), axis=-1)
    np.testing.assert_allclose(model.weights(tokens)[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_every_distance_has_a_bin(causal):
    edges = distance._edges(24, causal)
    assert (np.diff(edges) > 0).all() and edges[-1] >= 24 and edges[0] == (0 if causal else -31)


def test_mass_and_mean_are_those_of_the_weights_of_the_second_half_of_the_queries(runs):
    found = distance.measure(runs / "rotary", 3)
    model, rows = trained.load(runs / "rotary").models[1], trained.text(runs / "rotary", 3)
    weights = np.asarray(model.weights(jnp.asarray(rows[:, :-1])))[:, :, :, LENGTH // 2 :]  # [L B N Q S]
    back = np.arange(LENGTH // 2, LENGTH)[:, None] - np.arange(LENGTH)
    np.testing.assert_allclose(found["mean"][1], (weights * np.abs(back)).sum(-1).mean((1, 3)), rtol=1e-5)
    assert found["edges"] == [0, 1, 2, 4, 8, 16] and found["seeds"] == [0, 1]
    for number, (low, high) in enumerate(zip(found["edges"], found["edges"][1:], strict=False)):
        mass = (weights * ((low <= back) & (back < high))).sum(-1).mean((1, 3))
        np.testing.assert_allclose(np.array(found["mass"])[1, :, :, number], mass, atol=1e-6)


def test_distance_of_a_run_is_written_and_printed(copied):
    done = fork("scripts.distance", copied, "--rows=4")
    assert done.returncode == 0 and "mean distance, tokens" in " ".join(done.stdout.split()), done.stderr
    found = json.loads((copied / "distance.json").read_text())
    mass, mean = np.array(found["mass"]), np.array(found["mean"])
    assert mass.shape == (2, 1, 2, len(found["edges"]) - 1) and mean.shape == (2, 1, 2)
    np.testing.assert_allclose(mass.sum(-1), 1, atol=1e-4, err_msg="every distance falls into a bin")
    assert (mean > 0).all() and (mean < LENGTH).all()
