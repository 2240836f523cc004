"""Accuracy by distance of runs that were trained on a probe."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from configs import lm
from rope_lm import loop, probing, trained
from rope_lm.data.probes import Probe
from rope_lm.provenance import provenance
from scripts import entry

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(text, cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    for name, words, steps in [
        ("rotary", "data=probe:copy", 600),
        ("learned", "position=learned,data=probe:induction", 2),
        ("masked", "data=probe:copy,objective=masked", 2),
        ("text", f"data=text:{text}", 2),
    ]:
        config = lm.get_config(words)
        config.steps, config.seeds, config.optimizer.learning_rate = steps, (0, 1), (1e-2,)
        config.every.update({"evaluate": 600, "save": 600, "log": 100})
        config.data.update({"length": 16, "batch": 32, "validation_rows": 8, "cache": cache})
        config.model.update({"width": 32, "heads": 2, "layers": 2, "hidden": 64})
        loop.train(entry.plain(config), folder / name, provenance(["test"], {}))
    return folder


def call(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "scripts.probe", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("name, multiple", [("rotary", 1), ("rotary", 2), ("learned", 1)])
def test_accuracy_is_counted_answer_by_answer(runs, name, multiple):
    found = probing.measure(runs / name, 40, multiple)
    models = trained.load(runs / name).models
    probe = Probe({"rotary": "copy", "learned": "induction"}[name], 16 * multiple, "test")
    rows = probe[np.arange(40)]
    likeliest = [np.asarray(model(jnp.asarray(rows[:, :-1]))[0]).argmax(-1) for model in models]
    counts, hits = {}, {}
    for member, row in itertools.product((0, 1), range(40)):
        mask, distance = probe.answers(row)
        for at in np.flatnonzero(mask):
            key = member, next(i for i in range(20) if 2**i <= distance[at] < 2 ** (i + 1))
            counts[key] = counts.get(key, 0) + 1
            hits[key] = hits.get(key, 0) + (likeliest[member][row, at] == rows[row, at + 1])
    ranges = sorted({each for _, each in counts})
    assert found["distances"] == [[2**each, 2 ** (each + 1) - 1] for each in ranges]
    assert found["answers"] == [counts[0, each] for each in ranges]
    for member in (0, 1):
        wanted = [hits[member, each] / counts[member, each] for each in ranges]
        assert found["accuracy"][member] == pytest.approx(wanted)
        whole = sum(hits[member, each] for each in ranges) / sum(found["answers"])
        assert found["overall"][member] == pytest.approx(whole)


def test_training_on_a_probe_beats_guessing(runs):
    found = probing.measure(runs / "rotary", 128, 1)
    assert found["guessing"] == 1 / 26 and min(found["overall"]) > 1 / 3


def test_the_command_writes_what_it_prints(runs):
    done = call(runs / "rotary", runs / "learned", "--multiples=1,2", "--rows=20")
    assert done.returncode == 0, done.stderr
    for name in ("rotary", "learned"):
        made = json.loads((runs / name / "probe.json").read_text())
        assert f"{sum(made['rows'][0]['answers']):,}" in done.stdout and "any (guessing: 4%)" in done.stdout
        assert made["rows"][0] == probing.measure(runs / name, 20, 1)
    assert (
        "Learned encodes indices below 16"
        in json.loads((runs / "learned" / "probe.json").read_text())["refused"][0]["why"]
    )
    assert [row["length"] for row in json.loads((runs / "rotary" / "probe.json").read_text())["rows"]] == [16, 32]


@pytest.mark.parametrize(
    "words, says",
    [
        (["R/text"], "was trained on text:"),
        (["R/text", "--multiples=2"], "was trained on text:"),
        (["R/masked"], "was trained with objective=masked: a probe asks for the next token"),
        (["R/nothing"], "holds no run"),
        (["R/rotary", "--rows=99999"], "--rows=99999: must be from 1 to 16,384"),
        (["R/rotary", "--multiples=1,a"], "--multiples=1,a: must be whole numbers"),
    ],
)
def test_a_mistake_is_one_line(runs, words, says):
    done = call(*(word.replace("R", str(runs), 1) for word in words))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0], done.stderr
