"""A trained run in use: sampling from it, and reading with it beyond the length that it was trained on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import lm
from rope_lm import distance, extrapolation, loop, plan, run_directory, trained
from rope_lm.data import Data
from rope_lm.generate import generate, pick
from rope_lm.positions import contiguous
from rope_lm.provenance import provenance
from rope_lm.refusal import Refusal
from scripts import entry
from tests.models import attention
from tests.models import model as random_model
from tests.models import tokens as random_tokens

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(text, cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for name in ("rotary", "learned", "relative_bias"):
        config = lm.get_config(f"position={name},data=text:{text}")
        config.steps, config.seeds = 150, (0, 1)
        config.every.update({"evaluate": 50, "save": 100, "log": 50})
        config.data.update({"length": 32, "batch": 8, "validation_rows": 6, "cache": cache})
        config.model.update({"width": 32, "heads": 2, "layers": 1, "hidden": 64})
        loop.train(entry.plain(config), folder / name, provenance(["test"], {}))
    return folder


def call(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True)


def test_the_models_are_those_that_the_run_validated(runs):
    """The last validation loss again, from the loaded parameters and the text."""
    made = trained.load(runs / "rotary")
    text: Data = plan.plan(_tuples(made.config)).data
    for member, model in enumerate(made.models):
        rows = [row for row in run_directory.read_rows(runs / "rotary" / "metrics.jsonl") if row["split"] == "validation"]
        known = next(row["nats"] for row in rows if row["step"] == 150 and row["member"] == member)
        assert trained.over_rows(extrapolation._nats, model, text.validation).mean() == pytest.approx(known, abs=1e-5)
    assert made.step == 150 and made.seeds == (0, 1)


def _tuples(config) -> dict:
    return {key: _tuples(value) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
            for key, value in config.items()}  # fmt: skip


def test_the_likeliest_token_is_that_of_a_full_pass(runs):
    model = trained.load(runs / "relative_bias").models[0]
    prompt = np.frombuffer(b"line 12 says", np.uint8).astype(int).tolist()
    drawn = list(generate(model, prompt, 15, temperature=0, top_p=1, seed=0))
    for number, token in enumerate(drawn):
        logits, _ = model(jnp.asarray([prompt + drawn[:number]]))
        assert int(jnp.argmax(logits[0, -1])) == token


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
    words = ["scripts.generate", f"--workdir={runs / 'rotary'}", "--prompt=line 1", "--tokens=20"]
    first, again, other = call(*words), call(*words), call(*words, "--seed=1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("line 1") and first.stdout == again.stdout != other.stdout


@pytest.mark.parametrize(
    "words, says",
    [
        (["scripts.generate", "--workdir=R/learned", "--tokens=33", "--prompt=x"], "Learned encodes indices below 32"),
        (["scripts.generate", "--workdir=R/rotary", "--top_p=0"], "top_p above 0 and at most 1"),
        (["scripts.generate", "--workdir=R/rotary", "--temperature=nan"], "temperature=nan"),
        (["scripts.generate", "--workdir=R/rotary", "--seed=4294967296"], "below 2**32"),
        (["scripts.generate", "--workdir=R/rotary", "--member=2"], "the run has 2 members"),
        (["scripts.generate", "--workdir=R/none"], "holds no run"),
        (["scripts.convert", "--workdir=R/rotary", "--out=R/rotary/hf"], "lies in the run's own folder"),
        (["scripts.probe", "R/rotary", "--rows=0"], "--rows=0: must be at least 1"),
        (["scripts.extrapolate", "R/none"], "holds no run"),
        (["scripts.extrapolate", "R", "--multiples=1,3,4"], "each must divide the greatest"),
        (["scripts.extrapolate", "R", "--multiples=0"], "whole numbers of at least 1"),
        (["scripts.extrapolate", "R", "--scalings=yarm"], "unknown --scalings 'yarm': did you mean yarn"),
        (["scripts.extrapolate", "R", "--rows=100000"], "the validation text has"),
    ],
)
def test_a_mistake_is_one_line(runs, words, says):
    done = call(*(word.replace("R", str(runs), 1) if "R" in word else word for word in words))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0], done.stderr


def test_another_architecture_is_refused_and_nothing_is_written(runs, tmp_path):
    other = Path(shutil.copytree(runs / "rotary", tmp_path / "run"))
    config = json.loads((other / "config.json").read_text())
    config["model"]["hidden"] = 128
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match=r"holds .*\['down'\].* this program has .*it is of another model"):
        trained.load(other)
    with pytest.raises(Refusal, match="it is of another model"):
        trained.load(runs / "rotary", {"name": "relative_bias", "buckets": 32, "max_distance": 128, "scale": 1.0})
    assert {each.name for each in (other / "checkpoints").iterdir()} == {"100", "150"}


@pytest.mark.parametrize("script, file", [("extrapolate", "extrapolation.json"), ("distance", "distance.json")])
def test_a_run_that_is_not_whole_or_whose_text_is_another_is_refused_and_nothing_is_written(
    runs, tmp_path, script, file
):
    other = Path(shutil.copytree(runs / "rotary", tmp_path / "run"))
    manifest, config = (json.loads((other / f"{name}.json").read_text()) for name in ("manifest", "config"))
    manifest["data"]["fingerprint"]["text"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    config["model"]["hidden"] = 128
    for says in ("was trained on another text than data.name=text:", "it is of another model"):
        done = call(f"scripts.{script}", other, "--rows=4")
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert not (other / file).exists()
        shutil.copy(runs / "rotary" / "manifest.json", other)
        (other / "config.json").write_text(json.dumps(config))


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


def test_reading_longer_text(runs, tmp_path):
    done = call("scripts.extrapolate", runs, "--multiples=1,2,4", "--rows=4")
    assert done.returncode == 0, done.stderr
    found = {name: json.loads((runs / name / "extrapolation.json").read_text()) for name in ("rotary", "learned")}
    rotary = {(row["multiple"], row["scaling"]): row for row in found["rotary"]["rows"]}
    assert set(rotary) == {(m, s) for m in (1, 2, 4) for s in ("", *extrapolation.SCALINGS) if m > 1 or not s}
    for row in rotary.values():
        assert row["tokens"] == 4 * 4 * 32 and len(row["apart"]) == len(row["sliding"]) == 2
        assert len(row["positions"]) == len(row["by_position"][0]) and row["positions"][0] == 1
    four = rotary[4, ""]
    assert four["apart"] == pytest.approx(four["sliding"], abs=1e-5), "at the whole length there is one window"
    assert rotary[4, "yarn"]["apart"] != four["apart"]
    assert [row["multiple"] for row in found["learned"]["rows"]] == [1]
    assert [row["multiple"] for row in found["learned"]["refused"]] == [2, 4]
    assert "no position from 32 on was trained" in found["learned"]["refused"][0]["why"]
    report = call("scripts.report", runs, f"--out={tmp_path}")
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "figures" / "beyond.svg").exists() and (tmp_path / "figures" / "position.svg").exists()
    arm = next(arm for arm in json.loads((tmp_path / "summary.json").read_text())["arms"] if arm["arm"] == "rotary")
    assert {(row["multiple"], row["scaling"]) for row in arm["beyond"]} == set(rotary)


# --- how far it looks -------------------------------------------------------------------------------------------------


def test_weights_are_those_of_attention(runs):
    """Of the first layer, written out from the block's own matrices: softmax of q k / sqrt(H) over what came before."""
    made = trained.load(runs / "learned").models[0]
    tokens = jnp.arange(20)[None] % 200
    found = distance.weights(made, tokens)
    assert found.shape == (1, 1, 2, 20, 20)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    graph, blocks = nnx.split(made.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda x: x[0], blocks))
    x = made.position.embed(made.embedding[...][tokens], contiguous(20))[0]
    qkv = block.qkv(block.attention_norm(x)).reshape(20, 2, 3, 16)
    logits = np.einsum("tnh,snh->nts", qkv[:, :, 0], qkv[:, :, 1]) / 4
    expected = jax.nn.softmax(np.where(np.tril(np.ones((20, 20))), logits, -np.inf), axis=-1)
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["alibi", "rotary"])
def test_rows_of_weights_sum_to_one(name, causal):
    made, text = random_model(name, causal=causal), random_tokens(1)
    before = made(text)[0]
    found = distance.weights(made, text)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert (found >= 0).all() and bool((jnp.triu(found, 1) == 0).all()) == causal
    np.testing.assert_array_equal(made(text)[0], before), "watching changes nothing"


def test_weights_are_the_same_whatever_the_kernel_of_the_model():
    text = random_tokens(1, 80)  # two blocks
    of = lambda kernel: random_model("alibi", attention={"name": "softmax", "kernel": kernel})  # noqa: E731
    np.testing.assert_allclose(*(distance.weights(of(kernel), text) for kernel in ("blocked", "xla")), atol=1e-5)


def test_weights_of_linear_attention_sum_to_one_unless_features_are_turned():
    """Where they are, the numerator alone is (RoFormer, Eq. 19)."""
    text, linear = random_tokens(1), attention("rotary_features")
    before, after = (
        distance.weights(random_model(name, attention=linear), text) for name in ("rotary", "rotary_features")
    )
    np.testing.assert_allclose(before.sum(-1), 1, atol=1e-4)
    assert jnp.abs(after.sum(-1) - 1).max() > 1e-3
    assert jnp.abs(jnp.triu(before, 1)).max() == jnp.abs(jnp.triu(after, 1)).max() == 0


@pytest.mark.parametrize("causal", [True, False])
def test_every_distance_has_a_bin(causal):
    edges = distance._edges(24, causal)
    assert (np.diff(edges) > 0).all() and edges[-1] >= 24 and edges[0] == (0 if causal else -31)


def test_distance_of_a_run_is_written_and_printed(runs):
    done = call("scripts.distance", runs / "relative_bias", "--rows=4")
    assert done.returncode == 0 and "mean distance, tokens" in " ".join(done.stdout.split()), done.stderr
    found = json.loads((runs / "relative_bias" / "distance.json").read_text())
    mass, mean = np.array(found["mass"]), np.array(found["mean"])
    assert mass.shape == (2, 1, 2, len(found["edges"]) - 1) and mean.shape == (2, 1, 2) and found["seeds"] == [0, 1]
    np.testing.assert_allclose(mass.sum(-1), 1, atol=1e-4), "every distance falls into a bin"
    assert (mean > 0).all() and (mean < 32).all()
    refused = call("scripts.distance", runs / "relative_bias", "--rows=0")
    assert refused.returncode == 2 and refused.stderr == "error: --rows=0: must be at least 1\n"
