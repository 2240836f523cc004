"""Accuracy by distance of runs that were trained on a probe."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import lm
from rope_lm import loop, probing, trained
from rope_lm.data.probes import Probe
from rope_lm.provenance import provenance
from rope_lm.refusal import Refusal
from rope_lm.transformer import Transformer
from scripts import entry
from tests.commands import fork
from tests.test_trained import change, run

LENGTH = 16


def train(folder: Path, words: str, steps: int, layers: int, cache: str) -> None:
    config = lm.get_config(words)
    config.steps, config.seeds, config.optimizer.learning_rate = steps, (0, 1), (1e-2,)
    config.every.update({"evaluate": steps, "save": steps, "log": steps})
    config.data.update({"length": LENGTH, "batch": 32, "validation_rows": 8, "cache": cache})
    config.model.update({"width": 32, "heads": 2, "layers": layers, "hidden": 64})
    loop.train(entry.plain(config), folder, provenance(["test"], {}))


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory) -> Path:
    """Two short runs on probes, and copies of one that say that they are of another task."""
    folder = tmp_path_factory.mktemp("probes")
    train(folder / "rotary", "data=probe:copy", 100, 1, cache)
    train(folder / "learned", "position=learned,data=probe:induction", 100, 1, cache)
    for name, section, value in [("text", "data", "text:lines.txt"), ("masked", "objective", "masked")]:
        shutil.copytree(folder / "rotary", folder / name)
        change(folder / name, "config.json", section, "name", value=value)
    return folder


def likeliest(model: Transformer, rows: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(model)
    read = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)[0].argmax(-1))
    return np.asarray(read(state, jnp.asarray(rows[:, :-1])))


@pytest.mark.parametrize("name, multiple", [("rotary", 1), ("rotary", 2), ("learned", 1)])
def test_accuracy_is_counted_answer_by_answer(runs, name, multiple):
    found = probing.measure(runs / name, 40, multiple)
    models = trained.load(runs / name).models
    probe = Probe({"rotary": "copy", "learned": "induction"}[name], LENGTH * multiple, "test")
    rows = probe[np.arange(40)]
    answers = [likeliest(model, rows) for model in models]
    counts, hits = {}, {}
    for member, row in itertools.product((0, 1), range(40)):
        mask, distance = probe.answers(row)
        for at in np.flatnonzero(mask):
            key = member, next(i for i in range(20) if 2**i <= distance[at] < 2 ** (i + 1))
            counts[key] = counts.get(key, 0) + 1
            hits[key] = hits.get(key, 0) + (answers[member][row, at] == rows[row, at + 1])
    ranges = sorted({number for _, number in counts})
    assert found["distances"] == [[2**number, 2 ** (number + 1) - 1] for number in ranges]
    assert found["answers"] == [counts[0, number] for number in ranges]
    for member in (0, 1):
        expected = [hits[member, number] / counts[member, number] for number in ranges]
        assert found["accuracy"][member] == pytest.approx(expected) and any(expected)
        overall = sum(hits[member, number] for number in ranges) / sum(found["answers"])
        assert found["overall"][member] == pytest.approx(overall)


@pytest.mark.all
def test_training_on_a_probe_beats_guessing(cache, tmp_path):
    train(tmp_path / "run", "data=probe:copy", 600, 2, cache)
    found = probing.measure(tmp_path / "run", 128, 1)
    assert found["guessing"] == 1 / 26 and min(found["overall"]) > 1 / 3


@pytest.mark.all
def test_the_command_writes_what_it_prints(runs):
    done = fork("scripts.probe", runs / "rotary", runs / "learned", "--multiples=1,2", "--rows=20")
    assert done.returncode == 0, done.stderr
    written = {name: json.loads((runs / name / "probe.json").read_text()) for name in ("rotary", "learned")}
    for name, found in written.items():
        assert f"{sum(found['rows'][0]['answers']):,}" in done.stdout and "any (guessing: 4%)" in done.stdout
        assert found["rows"][0] == probing.measure(runs / name, 20, 1)
    assert "Learned encodes indices below 16" in written["learned"]["refused"][0]["why"]
    assert [row["length"] for row in written["rotary"]["rows"]] == [LENGTH, 2 * LENGTH]


@pytest.mark.parametrize("words, says", [
    (["R/text"], "was trained on text:"),
    (["R/text", "--multiples=2"], "was trained on text:"),
    (["R/masked"], "was trained with objective=masked: a probe asks for the next token"),
    (["R/nothing"], "holds no run"),
    (["R/rotary", "--rows=99999"], "--rows=99999: must be from 1 to 16,384"),
    (["R/rotary", "--multiples=1,a"], "--multiples=1,a: must be whole numbers"),
])  # fmt: skip
def test_a_mistake_is_refused(runs, words, says, monkeypatch):
    with pytest.raises(Refusal, match=says):
        run(["scripts.probe", *(word.replace("R", str(runs), 1) for word in words)], monkeypatch)
