"""From a plan to a run directory, in this process: what a run writes, and how it goes on."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from rope_lm import loop, run_directory
from rope_lm.checkpoint import Checkpoints
from rope_lm.plan import plan
from rope_lm.provenance import provenance
from rope_lm.refusal import Refusal
from tests.runs import small


@pytest.fixture(scope="module")
def config(text, cache) -> dict:
    """With a learning rate that does not depend on the number of steps."""
    config = small(text, cache)
    return {**config, "optimizer": {**config["optimizer"], "schedule": "constant", "warmup": 0.0}}


@pytest.fixture(scope="module")
def finished_once(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    status = loop.train(config, workdir, provenance(["test"], {}), deterministic=True)
    assert status["status"] == "finished" and status["step"] == 6
    return workdir


@pytest.fixture
def finished(finished_once, tmp_path) -> Path:
    """A copy of a run of six steps."""
    return Path(shutil.copytree(finished_once, tmp_path / "run"))


def rows(workdir: Path) -> dict:
    """The last row of every (split, member, step)."""
    found = run_directory.read_rows(workdir / "metrics.jsonl")
    return {(row["split"], row["member"], row["step"]): row for row in found}


def parameters(workdir: Path, config: dict) -> tuple[int, list[np.ndarray]]:
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        step, state, _ = checkpoints.restore(plan(config).program.abstract)
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def files(workdir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in workdir.rglob("*.json*")}


def test_a_run_writes_what_the_report_reads(config, finished):
    found = rows(finished)
    assert {step for split, _, step in found if split == "validation"} == {0, 3, 6}
    assert {step for split, _, step in found if split == "train"} == {2, 4, 6}
    assert {member for _, member, _ in found} == {0, 1}
    last = found["validation", 1, 6]
    assert last["tokens"] == 6 * 16 and last["nats"] < found["validation", 1, 0]["nats"]
    assert last["bits_per_byte"] == pytest.approx(last["nats"] / math.log(2), rel=0.01)
    train = found["train", 0, 6]
    assert train["tokens"] == 4 * 16 and train["tokens_per_second"] > 0
    assert train["learning_rate"] == pytest.approx(3e-3)
    seconds = [found["train", 0, step]["seconds"] for step in (2, 4, 6)]
    assert seconds == sorted(seconds) and seconds[0] > 0
    manifest = run_directory.read_json(finished / "manifest.json")
    assert manifest["kernel"] == "blocked" and manifest["precision"] == "float32" and manifest["compile_seconds"] > 0
    assert manifest["execution"]["kernel"] == "blocked" and manifest["flops_per_token"] > 0
    assert manifest["parameters"] == 2 * 257 * 16 + 4 * 16 * 16 + 2 * 16 * 32 + 3 * 16
    assert manifest["members"] == [{"member": i, "seed": i, "learning_rate": 3e-3} for i in (0, 1)]
    assert manifest["deterministic"] == manifest["segments"][0]["deterministic"] == {}, "a CPU needs no option"
    assert parameters(finished, config)[0] == 6


def test_losses_by_document_are_those_of_the_last_evaluation(config, finished):
    documents = run_directory.read_json(finished / "documents.json")
    assert documents["schema"] == 1 and documents["step"] == 6
    assert len(documents["tokens"]) == plan(config).documents.count
    for member in (0, 1):
        row = rows(finished)["validation", member, 6]
        assert sum(documents["tokens"]) == row["tokens"]
        assert sum(documents["nats"][member]) / row["tokens"] == pytest.approx(row["nats"], rel=1e-6)


def test_a_finished_run_is_not_run_again(config, finished, monkeypatch):
    before = files(finished)
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    assert loop.train(config, finished, {})["status"] == "finished"
    assert files(finished) == before


def test_more_steps_go_on_from_the_end(config, finished, tmp_path):
    loop.train({**config, "steps": 3}, tmp_path / "parts", {})
    loop.train(config, tmp_path / "parts", {})
    (a, whole), (b, parts) = parameters(finished, config), parameters(tmp_path / "parts", config)
    assert a == b == 6
    for x, y in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_fewer_steps_than_are_done_are_refused_and_nothing_is_written(config, finished, status):
    content = run_directory.read_json(finished / "status.json")
    (finished / "status.json").write_text(json.dumps(content | {"status": status}))
    before = files(finished)
    with pytest.raises(Refusal, match=r"steps=4: the run in .* is at step 6 already: give at least 6, or"):
        loop.train({**config, "steps": 4}, finished, {})
    assert before == files(finished)


def test_a_crash_is_recorded_and_its_cause_is_raised(config, tmp_path, monkeypatch):
    def fail(self):
        raise MemoryError("no memory for this")

    monkeypatch.setattr(loop.Loop, "_validate", fail)
    with pytest.raises(MemoryError):
        loop.train(config, tmp_path, {})
    status = run_directory.read_json(tmp_path / "status.json")
    assert status["status"] == "failed" and status["why"] == "MemoryError: no memory for this"
